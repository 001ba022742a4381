"""Learning rates may be lowered after a loss that is not finite, and only then."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import records
from tests.training.run.killed_runs import CONFIG, STEPS, refusal
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.trainer import train


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ("in the loss", r"step 15: the loss is not finite \(learning rates: .*\); its batch is saved in .*"),
        ("in an evaluation", r"step 16: the predictions of the evaluation hold a NaN or an infinity"),
    ],
)
def test_rates_may_be_lowered_after_a_loss_that_is_not_finite(
    clicks: PreparedData, tmp_path: Path, device: torch.device, seen: str, message: str
) -> None:
    run = tmp_path / "run"
    config = replace(CONFIG, sparse_lr=0.01, dense_lr=0.02, sparse_optimizer="sgd")
    lower = replace(config, dense_lr=0.01)
    original = loop.Loop._forward

    def overflow(self: loop.Loop, batch: Any) -> Any:
        """A loss that is not finite at the higher rate, as of weights that run away."""
        loss, rest = original(self, batch)
        bad = self.position.step + 1 >= 15 and self._config.dense_lr > 0.015
        if not bad:
            return loss, rest
        return loss * math.nan, (rest[0] * (math.nan if seen == "in the loss" else 1), *rest[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_forward", overflow)
        for _ in range(2):  # the same command meets the same loss again
            with pytest.raises(UserError) as raised:
                train(config, clicks, run, device)
            assert re.fullmatch(
                message + "; run the same command with a lower --sparse-lr or --dense-lr to resume from the checkpoint "
                "of step 12",
                str(raised.value),
            )
        with pytest.raises(UserError, match=r"holds a run with --dense-lr 0\.02, not 0\.03"):
            train(replace(config, dense_lr=0.03), clicks, run, device)
        with pytest.raises(UserError, match=r"holds a run with --dropout 0\.5, not 0\.1"):
            train(replace(lower, dropout=0.1), clicks, run, device)
        reported: list[str] = []
        train(lower, clicks, run, device, say=reported.append)
    assert reported[:2] == [
        f"Resuming from step 12 of {run}",
        "learning rates after step 12: --dense-lr 0.01 instead of 0.02",
    ]
    assert json.loads((run / "config.json").read_text())["config"]["dense_lr"] == 0.01
    rates = {line["step"]: line["lr"]["dense"] for line in records(run) if line["split"] == "train"}
    assert rates[STEPS] <= 0.01
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


def test_rates_are_not_lowered_without_a_reason(clicks: PreparedData, unfinished: Path, device: torch.device) -> None:
    found = refusal(clicks, unfinished, device, replace(CONFIG, dense_lr=1e-4))
    assert "holds a run with --dense-lr 0.001, not 0.0001; give the same options" in found

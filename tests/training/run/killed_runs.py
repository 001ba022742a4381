"""A small training, killed in the middle of a step, and what becomes of its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(
    factor_dim=3, over_arch_layer_sizes=(4,), batch_size=150, epochs=2, checkpoint_every=4, eval_every=4, lr_patience=1,
    lr_factor=0.5,
)  # fmt: skip
STEPS = 26  # two epochs of 13


class KilledError(Exception):
    """Anything that is not the user's mistake."""


def train_until(step: int, data: PreparedData, folder: Path, device: torch.device, error: Exception) -> None:
    """Train, with an error in the middle of a step."""
    original = loop.Loop._step

    def fail(self: loop.Loop, batches: Any) -> None:
        original(self, batches)
        if self.position.step == step:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", fail)
        train(CONFIG, data, folder, device)


def content(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refusal(data: PreparedData, run: Path, device: torch.device, config: TrainConfig = CONFIG, **options: Any) -> str:
    """Why ``train`` refuses; it is one line, and every file is as it was."""
    before = content(run)
    with pytest.raises(UserError) as raised:
        train(config, data, run, device, RunOptions(**options))
    assert content(run) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(seal(manifest))

"""--compile-dense: everything after the look-ups is compiled, sharded and pipelined, and computes the same."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import RunOptions


def train(data: PreparedData, output: Path, *words: str) -> tuple[list[float], float]:
    """Losses, and the AUC of the test split."""
    command = ["train", "--data", str(data.folder), "--output", str(output), "--recipe", "smoke", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        main([*command, "--batch-size", "1000", "--dropout", "0.2", "--eval-every", "4"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    return losses, json.loads((output / "summary.json").read_text())["test"]["auc"]


def test_a_compiled_training_learns_the_same(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, auc = train(data, tmp_path / "eager")
    modes: list[str] = []

    def compile_in_python(*args: object, mode: str, **options: object) -> object:
        modes.append(mode)  # a C++ compiler takes seconds, and is not what is tested
        return compile_(*args, backend="aot_eager", **options)

    compile_ = partial(torch.compile)
    monkeypatch.setattr(torch, "compile", compile_in_python)
    torch._dynamo.reset()
    found, found_auc = train(data, tmp_path / "compiled", "--compile-dense", "reduce-overhead")
    assert modes == ["reduce-overhead"] * 3  # numeric fields, FM and MLP
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert found == pytest.approx(losses, rel=1e-5)
    assert found_auc == pytest.approx(auc, abs=1e-4)


def test_another_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--compile-dense max: choose one of off, default, reduce-overhead$"):
        RunOptions(compile_dense="max")  # type: ignore[arg-type]

"""A training whose checkpoints are in memory, a file system of fsspec that lasts as long as this process."""

import os
import signal
from pathlib import Path

import fsspec
import pytest
import torch

from tests.faults.runs import assert_same_run, make_data
from torchrec_deepfm.distributed.stop_signals import Preempted
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.checkpoint.dcp import CpuStager, Cut, TensorCuts
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(
    factor_dim=4, over_arch_layer_sizes=(8,), dropout=0.3, batch_size=100, epochs=2, checkpoint_every=3, warmup=0.2,
    sparse_optimizer="adagrad",
)  # fmt: skip


def test_a_run_resumes_from_memory(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    train(CONFIG, data, tmp_path / "undisturbed", device)
    step = loop.Loop._step

    def step_and_stop(self: loop.Loop, batches: object) -> None:
        step(self, batches)  # type: ignore[arg-type]
        if self.position.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    url = f"memory:/{tmp_path}/checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", step_and_stop)
        with pytest.raises(Preempted, match=r"^stopped by SIGTERM after step 11, saved in memory:/.*/step_00000011; "):
            train(CONFIG, data, tmp_path / "run", device, RunOptions(checkpoints=url))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    memory = fsspec.filesystem("memory")
    assert sorted(path.rpartition("_")[2] for path in memory.ls(f"{tmp_path}/checkpoints", detail=False)) == [
        "00000009",
        "00000011",
    ]
    # The newest is damaged: the one before is used.
    path = f"{tmp_path}/checkpoints/step_00000011/__0_0.distcp"
    memory.pipe_file(path, memory.cat_file(path)[:-1])
    reported: list[str] = []
    train(CONFIG, data, tmp_path / "run", device, RunOptions(checkpoints=url), say=reported.append)
    assert reported[0].startswith(f"not used: {url}/step_00000011: __0_0.distcp has ")
    assert reported[1] == f"Resuming from step 9 of {tmp_path / 'run'}"
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_all_checkpoints_are_damaged(tmp_path: Path, device: torch.device) -> None:
    data = make_data(tmp_path / "data")
    url = f"memory:/{tmp_path}/checkpoints"
    train(CONFIG, data, tmp_path / "run", device, RunOptions(checkpoints=url))
    memory = fsspec.filesystem("memory")
    for path in memory.glob(f"{tmp_path}/checkpoints/*/.metadata"):
        memory.rm_file(path)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError) as raised:
        train(CONFIG, data, tmp_path / "run", device, RunOptions(checkpoints=url))
    assert str(raised.value).endswith(
        ".metadata is missing; no checkpoint is intact: name another --output to train from the start"
    )
    assert (tmp_path / "run" / "checkpoint").is_dir()


def test_what_is_staged_no_longer_changes() -> None:
    weight = torch.tensor([1.0, 2.0])
    staged = CpuStager().stage({"weight": TensorCuts((2,), [Cut((0,), weight)])})
    weight.zero_()
    assert staged["weight"].cuts[0].tensor.tolist() == [1.0, 2.0]

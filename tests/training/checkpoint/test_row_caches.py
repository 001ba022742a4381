"""Every write into live tables ends in a purge of TorchRec's row caches.

The kernel that has such a cache (``fused_uvm_caching``) needs CUDA. Here the real ``purge`` of the CPU kernel, which a
sharded module's look-ups call, keeps what a cache would read from then on: the rows at the time of the last purge.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag

from tests.faults.runs import make_data, read_tensors
from tests.support.evaluations import evaluated
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.ema import MovingAverage
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(
    factor_dim=3, over_arch_layer_sizes=(4,), batch_size=100, epochs=4, checkpoint_every=5, eval_every=5, keep_last=9,
    sparse_lr=0.5, patience=2,
)  # fmt: skip
TABLE = ".embedding_bags."


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The rows of each table at the last purge, by the table's name."""
    rows: dict[str, Tensor] = {}
    purge = BatchedFusedEmbeddingBag.purge

    def purge_and_keep(self: BatchedFusedEmbeddingBag) -> None:
        purge(self)
        for table, weight in zip(self.config.embedding_tables, self.split_embedding_weights(), strict=True):
            rows[table.name] = weight.detach().clone()

    monkeypatch.setattr(BatchedFusedEmbeddingBag, "purge", purge_and_keep)
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_data(tmp_path_factory.mktemp("data") / "data")


def assert_tables(cached: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str = "model.") -> None:
    tables = {name: value for name, value in tensors.items() if TABLE in name and name.startswith(prefix)}
    assert len(tables) == len(cached) > 0
    for name, value in tables.items():
        assert torch.equal(cached[name.split(TABLE)[1].removesuffix(".weight")], value), name


class StopError(Exception):
    pass


def test_resume_best_weights_and_evaluation(
    data: PreparedData, tmp_path: Path, device: torch.device, cached: dict[str, Tensor]
) -> None:
    run = tmp_path / "run"
    step = loop.Loop._step

    def stop(self: loop.Loop, batches: Any) -> None:
        if self.position.step == 7:
            raise StopError
        step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", stop)
        with pytest.raises(StopError):
            train(CONFIG, data, run, device)
    before = dict(cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "run", lambda self: (_ for _ in ()).throw(StopError))
        with pytest.raises(StopError):
            train(CONFIG, data, run, device)
    assert_tables(cached, read_tensors(run / "checkpoints" / "step_00000005"))
    assert any(not torch.equal(value, cached[name]) for name, value in before.items())
    summary = train(CONFIG, data, run, device).summary
    assert "restored_step" in summary, "the best step is the last one, so nothing is tested"
    assert_tables(cached, read_tensors(run / "checkpoints" / f"step_{summary['restored_step']:08d}"))
    cached.clear()
    evaluated(run, data, "test", device)
    assert_tables(cached, read_tensors(run / "checkpoint"))


def test_initial_weights_and_the_moving_average(device: torch.device, cached: dict[str, Tensor]) -> None:
    sizes = {"big": 40, "small": 6}
    model = build_model(replace(CONFIG, ema=0.9), sizes, 2, device).model

    def tensors() -> dict[str, Tensor]:
        state = model.state_dict()
        return {f"model.{name}": state[name].local_shards()[0].tensor.clone() for name in state if TABLE in name}

    initial = tensors()
    assert_tables(cached, initial)
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if TABLE in name:
                value.local_shards()[0].tensor.fill_(7)
    trained = tensors()
    with average.in_place():
        assert_tables(cached, initial)
    assert_tables(cached, trained)

"""A training that resumes under another plan, on another number of ranks: all pairs out of a list.

Each (plan, ranks) trains some steps and saves. Then each reads what each has saved, evaluates, and trains one more step
on the same samples. What it gets must not depend on who reads: the state says all.
"""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints

from tests.support.ranks import CPU, run_ranks
from tests.support.samples import batches_of_rank, draw, read_state, to_batch
from torchrec_deepfm.distributed.process_group import on_main
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.checkpoint.dcp import TensorCuts
from torchrec_deepfm.training.checkpoint.manager import Checkpoints
from torchrec_deepfm.training.checkpoint.tensors import TrainingTensors
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.ema import MovingAverage
from torchrec_deepfm.training.optim.optimizers import make_optimizer

SIZES = {"a": 37, "b": 24, "c": 5}
NUMERIC = 2
GLOBAL_BATCH = 8
STEPS = 6
FUSED = [
    "table_wise-1",
    "data_parallel-1",
    "table_wise-2",
    "row_wise-2",
    "data_parallel-2",
    "column_wise-2",
    "row_wise-4",
]
CASES = {"rowwise_adagrad": FUSED, "adagrad": FUSED, "adam": ["data_parallel-1", "table_wise-2", "row_wise-2"]}
SAMPLES = draw(GLOBAL_BATCH * (STEPS + 1), SIZES, NUMERIC, longest=3, seed=3)
FRESH = draw(40, SIZES, NUMERIC, longest=3, seed=4)


def options(optimizer: str, world_size: int) -> TrainConfig:
    return TrainConfig(
        factor_dim=6, over_arch_layer_sizes=(8, 6), dropout=0.0, batch_size=GLOBAL_BATCH // world_size,
        sparse_optimizer=optimizer, sparse_lr=0.1, dense_lr=0.01, data_parallel_rows=5, batch_norm=False,
    )  # fmt: skip


def constraints(plan: str) -> dict[str, ParameterConstraints]:
    """Of the two larger tables; c is small and stays with Adam under every plan."""
    kernel = EmbeddingComputeKernel.DENSE if plan == "data_parallel" else EmbeddingComputeKernel.FUSED
    of_two = ParameterConstraints(sharding_types=[plan], compute_kernels=[kernel.value], min_partition=4)
    return {"t_a": of_two, "t_b": of_two}


class Trained:
    """A model and its optimizer under one plan."""

    def __init__(self, plan: str, optimizer: str) -> None:
        config = options(optimizer, dist.get_world_size())
        sharded = build_model(config, SIZES, NUMERIC, CPU, constraints=constraints(plan))
        self.plan = sharded.plan
        self.model = sharded.model
        self.optimizer = make_optimizer(self.model, config)
        self.tensors = TrainingTensors(self.model, self.optimizer, config.sparse_optimizer)
        self.average = MovingAverage(self.model, 0.8)

    def step(self, number: int) -> None:
        batch = batches_of_rank(SAMPLES, list(SIZES), GLOBAL_BATCH)[number]
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.backward()
        self.optimizer.step()
        self.average.update(number + 1)

    def averages(self) -> dict[str, torch.Tensor]:
        with self.average.in_place():
            return read_state(self.model)

    def to_save(self) -> dict[str, TensorCuts]:
        return self.tensors.to_save() | self.average.to_save()

    def logits(self) -> list[float]:
        """Of samples that no step has seen; every rank evaluates all of them."""
        self.model.eval()
        with torch.no_grad():
            _, (_, logits, _) = self.model(to_batch(FRESH, list(SIZES)))
        self.model.train()
        return logits.tolist()

    def optimizer_values(self) -> dict[str, torch.Tensor]:
        """All values put together from all ranks, one number per row of rowwise Adagrad: the mean over its columns."""
        everyones: list[Any] = [None] * dist.get_world_size()
        mine = {
            name: (pieces.size, [(cut.offsets, cut.tensor.detach().numpy()) for cut in pieces.cuts])
            for name, pieces in self.tensors.to_save().items()
            if name.startswith("optimizer.")
        }
        dist.all_gather_object(everyones, mine)
        whole = {}
        for name, (size, _) in mine.items():
            value = torch.full(size, torch.nan)
            for theirs in everyones:
                for offsets, cut in theirs[name][1]:
                    value[tuple(slice(at, at + n) for at, n in zip(offsets, cut.shape, strict=True))] = (
                        torch.from_numpy(cut)
                    )
            assert not value.isnan().any(), f"{name}: the ranks leave a hole"
            begins = self.tensors.columns.get(name.removeprefix("optimizer.").removesuffix(".sum"), [0])
            if name.endswith(".sum") and value.dim() == 2 and value.shape[1] == len(begins) and len(begins) > 1:
                widths = torch.diff(torch.tensor([*begins, 8])).double()  # 6 + 1 columns in 8
                value = (value.double() * widths / 8).sum(1, keepdim=True).float()
            whole[name] = value
        return whole


def wait_for(files: list[Path]) -> None:
    deadline = time.monotonic() + 100.0
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "another number of ranks has failed"
        time.sleep(0.2)


def everything(folder: Path, optimizer: str) -> dict[str, Any]:
    """What each plan of this number of ranks sees of what all have saved; of rank 0."""
    cases = CASES[optimizer]
    plans = [case.split("-")[0] for case in cases if case.endswith(f"-{dist.get_world_size()}")]
    for plan in plans:
        trained = Trained(plan, optimizer)
        used = {sharding.sharding_type for module in trained.plan.plan.values() for sharding in module.values()}
        assert used == {plan, "data_parallel"}, used
        for number in range(STEPS):
            trained.step(number)
        checkpoints = Checkpoints(str(folder / f"{plan}-{dist.get_world_size()}"), keep_last=1)
        checkpoints.save(STEPS, trained.to_save(), {"columns": trained.tensors.columns, "plan": plan})
        saved = {"logits": trained.logits(), "weights": read_state(trained.model), "values": trained.optimizer_values()}
        saved["averages"] = trained.averages()
        trained.step(STEPS)  # while it is written: what is saved must not move
        checkpoints.close()
        saved["next"] = read_state(trained.model)
        if dist.get_rank() == 0:
            torch.save(saved, folder / f"{plan}-{dist.get_world_size()}.pt")
            (folder / f"{plan}-{dist.get_world_size()}.done").touch()
    on_main(lambda: wait_for([folder / f"{case}.done" for case in cases]))
    seen = {}
    for plan in plans:
        trained = Trained(plan, optimizer)
        for source in cases:
            checkpoints = Checkpoints(str(folder / source), keep_last=1)
            [(step, manifest)] = list(checkpoints.intact([]))
            state, finish = trained.tensors.to_read(manifest["columns"])
            averages, finish_averages = trained.average.to_read(int(source.split("-")[1]))
            for cut in (cut for cuts in (state | averages).values() for cut in cuts.cuts):
                cut.tensor.detach().fill_(torch.nan)  # nothing stays of the source before
            assert checkpoints.read(step, manifest, state | averages) is None
            finish()
            finish_averages()
            found = {
                "logits": trained.logits(), "weights": read_state(trained.model), "values": trained.optimizer_values(),
                "averages": trained.averages(),
            }  # fmt: skip
            trained.step(STEPS)
            found["next"] = read_state(trained.model)
            checkpoints.close()
            seen[f"{plan}-{dist.get_world_size()}", source] = found
    return seen if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module", params=CASES)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """By (who reads, who wrote)."""
    folder = tmp_path_factory.mktemp(request.param)
    world_sizes = {int(case.split("-")[1]) for case in CASES[request.param]}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run_ranks, everything, ranks, folder, request.param) for ranks in world_sizes]
        found: dict[Any, Any] = {"folder": folder, "optimizer": request.param}
        for job in jobs:
            found |= job.result()[0]
    return found


def test_every_value_arrives(seen: dict[Any, Any]) -> None:
    for source, reader in itertools.product(CASES[seen["optimizer"]], repeat=2):
        saved = torch.load(seen["folder"] / f"{source}.pt", weights_only=True)
        found = seen[reader, source]
        assert found["weights"].keys() == saved["weights"].keys()
        for name, value in saved["weights"].items():
            assert torch.equal(found["weights"][name], value), (reader, name)
            assert torch.equal(found["averages"][name], saved["averages"][name]), (reader, name)
            assert not torch.equal(saved["averages"][name], value), name
        assert found["values"].keys() == saved["values"].keys()
        for name, value in saved["values"].items():
            assert value.abs().sum() > 0, name
            torch.testing.assert_close(found["values"][name], value, rtol=1e-6, atol=0, msg=f"{reader} {source} {name}")
        torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(saved["logits"]), rtol=0, atol=1e-6)


def same_semantics(reader: str, source: str, optimizer: str) -> bool:
    """Rowwise Adagrad under column-wise sharding keeps a number per shard: another optimizer, step by step."""
    return optimizer != "rowwise_adagrad" or ("column" in reader) == ("column" in source)


def test_the_next_step_is_the_same(seen: dict[Any, Any]) -> None:
    for source, reader in itertools.product(CASES[seen["optimizer"]], repeat=2):
        saved = torch.load(seen["folder"] / f"{source}.pt", weights_only=True)
        if same_semantics(reader, source, seen["optimizer"]):
            for name, value in saved["next"].items():
                found = seen[reader, source]["next"][name]
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=f"{reader} {source} {name}")
            moved = [name for name, value in saved["next"].items() if not torch.equal(value, saved["weights"][name])]
            assert any("t_a" in name for name in moved)


def test_the_manifest_names_the_columns(seen: dict[Any, Any]) -> None:
    for case in CASES[seen["optimizer"]]:
        manifest = json.loads((seen["folder"] / case / f"step_{STEPS:08d}" / "checkpoint.json").read_text())
        columns = {tuple(begins) for name, begins in manifest["columns"].items() if "t_c" not in name}
        assert columns == {(0, 4) if case == "column_wise-2" else (0,)}

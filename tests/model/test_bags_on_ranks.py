"""Bags of ids with weights, from the files to what the model learns, against plain torch.

Two real ranks, a table replicated and the others sharded, through TorchRec's pipeline. The columns c1 and c3 have
one id a row, c2 and c4 have 0 to 4, c4 with weights: the collection is weighted, so the others weigh 1.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.support.data.folders import LISTS, bag, ids, label, make, number, weights
from tests.support.ranks import CPU, run_ranks
from tests.support.samples import read_state, write_state
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import make_optimizer
from torchrec_deepfm.training.trainer import train

K, RATE, BATCH, STEPS = 3, 0.3, 8, 4  # BATCH of both ranks together
CONFIG = TrainConfig(
    factor_dim=K,
    over_arch_layer_sizes=(5,),
    activation="tanh",
    dropout=0.0,
    sparse_optimizer="sgd",
    sparse_lr=RATE,
    dense_lr=0.02,
    batch_size=BATCH // 2,
    data_parallel_rows=11,  # replicates c3
)
ROWS = (20, 13)
TABLE = "model.sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(state[name].shape, generator=generator) * 0.4 for name in sorted(state)}


def on_a_rank(folder: str) -> dict[str, Any]:
    data = PreparedData.open(Path(folder))
    sharded = build_model(CONFIG, data.num_embeddings, 2, CPU, is_weighted=bool(data.schema.weighted))
    model = sharded.model
    write_state(model, noise(read_state(model)))
    before = read_state(model)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loader = Loader(data, "train", batch_size=BATCH // world_size, rank=rank, world_size=world_size, drop_last=True)
    optimizer = make_optimizer(model, CONFIG)
    pipeline: TrainPipelineSparseDist[Batch, Any] = TrainPipelineSparseDist(
        model, optimizer, CPU, execute_all_batches=True
    )
    batches = iter(loader)
    logits = [pipeline.progress(batches)[1] for _ in range(STEPS)]
    return {
        "before": before,
        "logits": logits,
        "after": read_state(model),
        "pipelined": len(pipeline._pipelined_modules),
    }


def plain_bags(rows: range) -> dict[str, list[tuple[list[int], list[float]]]]:
    return {
        "c1": [([ids(row)[0]], [1.0]) for row in rows],
        "c2": [(bag("c2", row), [1.0] * len(bag("c2", row))) for row in rows],
        "c3": [([ids(row)[2]], [1.0]) for row in rows],
        "c4": [(bag("c4", row), weights("c4", row)) for row in rows],
    }


def plain_logits(state: dict[str, Tensor], rows: range) -> Tensor:
    """The equation of the paper over one row after another, with sums of weighted rows of the tables."""
    x = torch.tensor([number(row) for row in rows])
    bags = plain_bags(rows)
    result = []
    for i in range(len(rows)):
        fields = [x[i, j] * state["model.dense_arch.rows"][j] for j in range(2)]
        for name, column in bags.items():
            total = torch.zeros(K + 1)
            for key, weight in zip(*column[i], strict=True):
                total = total + weight * state[TABLE.format(name)][key, : K + 1]
            fields.append(total)
        logit = state["model.bias"][0] + sum(field[K] for field in fields)
        for a in range(len(fields)):
            for b in range(a):
                logit = logit + fields[a][:K] @ fields[b][:K]
        hidden = torch.cat([field[:K] for field in fields])
        layers = "model.over_arch.layers."
        hidden = torch.tanh(state[f"{layers}0.weight"] @ hidden + state[f"{layers}0.bias"])
        result.append(logit + (state[f"{layers}2.weight"] @ hidden)[0])
    return torch.stack(result)


def plain_training(before: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    state = {name: value.clone().requires_grad_() for name, value in before.items()}
    sharded = [state[TABLE.format(name)] for name in ("c1", "c2", "c4")]
    others = [value for value in state.values() if not any(value is table for table in sharded)]
    optimizers = [torch.optim.SGD(sharded, lr=RATE), torch.optim.Adam(others, lr=CONFIG.dense_lr)]
    logits = []
    for step in range(STEPS):
        rows = range(step * BATCH, (step + 1) * BATCH)
        found = plain_logits(state, rows)
        labels = torch.tensor([float(label(row)) for row in rows])
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(found, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        logits.append(found.detach())
    return logits, {name: value.detach() for name, value in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bags") / "data", ROWS, LISTS).folder


def assert_learns_what_plain_torch_learns(ranks: list[dict[str, Any]]) -> None:
    logits, after = plain_training(ranks[0]["before"])
    for step, expected in enumerate(logits):
        found = torch.cat([rank["logits"][step] for rank in ranks])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert rank["pipelined"] == 1
        assert set(rank["after"]) == set(after)
        for name, expected in after.items():
            torch.testing.assert_close(rank["after"][name], expected, rtol=1e-4, atol=1e-5)


def test_two_ranks_learn_what_plain_torch_learns(folder: Path) -> None:
    assert_learns_what_plain_torch_learns(run_ranks(on_a_rank, 2, str(folder)))


def test_one_rank_learns_what_plain_torch_learns(folder: Path, device: torch.device) -> None:
    assert_learns_what_plain_torch_learns([on_a_rank(str(folder))])


def test_a_folder_with_bags_trains_as_any_other(folder: Path, device: torch.device, tmp_path: Path) -> None:
    result = train(CONFIG, PreparedData.open(folder), tmp_path / "run", device)
    assert result.summary["steps"] == CONFIG.epochs * (sum(ROWS) // CONFIG.batch_size)


@pytest.mark.parametrize("kind", ["one-hot", "raw values", "multi-hot"])
def test_a_folder_of_torchrecs_scripts_trains_as_it_is(
    kind: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "days"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for day, rows in enumerate((20, 13, 9)):
        np.save(folder / f"day_{day}_dense.npy", draw.random((rows, 3), np.float32))
        np.save(folder / f"day_{day}_labels.npy", draw.integers(0, 2, (rows, 1), np.int32))
        if kind == "multi-hot":
            arrays = {str(j): draw.integers(0, 9, (rows, 1 + 2 * j), np.int32) for j in range(4)}
            np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **arrays)
        else:
            largest = 2**32 if kind == "raw values" else 9
            np.save(folder / f"day_{day}_sparse.npy", draw.integers(0, largest, (rows, 4)))
    data = PreparedData.open(folder, num_embeddings=30 if kind == "raw values" else None)
    result = train(CONFIG, data, tmp_path / "run", device)
    assert result.summary["steps"] == CONFIG.epochs * (33 // CONFIG.batch_size)
    assert (data.rows("validation"), data.rows("test")) == (5, 4)

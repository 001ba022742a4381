"""The schedule by hand, and the fused optimizers against their definitions on a model that nothing shards."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.support.samples import draw, read_state, to_batch, write_state
from torchrec_deepfm import DeepFM, DeepFMTrain, console, embedding_tables
from torchrec_deepfm.training import build
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.loop import Loop
from torchrec_deepfm.training.optim.optimizers import make_optimizer, make_scheduler, schedule

TABLE = "model.sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 3, [1.0, 1.0, 1.0]),
        ({"warmup": 0.25, "decay": 0.5, "decay_power": 2.0}, 8, [0.5, 1.0, 1.0, 1.0, 1.0, 0.5625, 0.25, 0.0625]),
        ({"warmup": 0.25, "decay": 0.5, "decay_power": 1.0}, 8, [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"warmup": 1.0}, 4, [0.25, 0.5, 0.75, 1.0]),
        ({"decay": 1.0, "decay_power": 1.0}, 4, [1.0, 0.75, 0.5, 0.25]),
        ({"warmup": 0.1, "decay": 0.1}, 4, [1.0, 1.0, 1.0, 1.0]),  # less than half a step is none
    ],
    ids=str,
)
def test_schedule(options: dict[str, float], steps: int, expected: list[float]) -> None:
    factor = schedule(TrainConfig(**options), steps)  # type: ignore[arg-type]
    assert [factor(step) for step in range(steps)] == expected


def test_the_schedule_ends_at_zero() -> None:
    factor = schedule(TrainConfig(decay=0.5), 4)
    assert (factor(4), factor(5)) == (0.0, 0.0)


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def sgd_by_hand(
    tables: dict[str, list[list[float]]], bias: float, pairs: list[tuple[int, int, int]], lr: float
) -> dict[str, list[list[float]]]:
    """One SGD step on logit = bias + w_i + w_j + <v_i, v_j>, rows [v1, v2, w, padding], loss the mean cross entropy."""
    new = {name: [list(row) for row in table] for name, table in tables.items()}
    for i, j, label in pairs:
        a, b = tables["a"][i], tables["b"][j]
        error = (sigmoid(bias + a[2] + b[2] + a[0] * b[0] + a[1] * b[1]) - label) / len(pairs)
        for row, slopes in ((new["a"][i], [b[0], b[1], 1.0, 0.0]), (new["b"][j], [a[0], a[1], 1.0, 0.0])):
            for column, slope in enumerate(slopes):
                row[column] -= lr * error * slope
    return new


def test_each_step_has_its_own_rate_in_the_fused_kernel(device: torch.device) -> None:
    config = TrainConfig(
        factor_dim=2, terms=("linear", "fm"), init_std=0.5, sparse_optimizer="sgd", sparse_lr=4.0, dense_lr=0.1,
        warmup=0.5, decay=0.5, decay_power=1.0, batch_size=4,
    )  # fmt: skip
    factors = [1 / 3, 2 / 3, 1.0, 1.0, 2 / 3, 1 / 3]  # neighbours differ, so a rate one step late would be seen
    model = build_model(config, {"a": 5, "b": 3}, 0, device).model
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config, total_steps=len(factors))
    pipeline: TrainPipelineSparseDist[Batch, tuple[Tensor, ...]] = TrainPipelineSparseDist(model, optimizer, device)
    samples = draw(4 * len(factors), {"a": 5, "b": 3}, 0)
    steps = [samples[start : start + 4] for start in range(0, len(samples), 4)]
    batches = iter([to_batch(step, ["a", "b"]) for step in steps])

    def tables() -> dict[str, list[list[float]]]:
        state = read_state(model)
        return {name: state[TABLE.format(name)].double().tolist() for name in "ab"}

    for number, (step, factor) in enumerate(zip(steps, factors, strict=True)):
        before, bias = tables(), read_state(model)["model.bias"].item()
        pipeline.progress(batches)
        scheduler.step()
        pairs = [(sample.bags["a"][0], sample.bags["b"][0], sample.label) for sample in step]
        expected = sgd_by_hand(before, bias, pairs, lr=4.0 * factor)
        for name, table in tables().items():
            moved = torch.tensor(table) - torch.tensor(before[name])
            assert moved.abs().max() > 0.01
            torch.testing.assert_close(
                torch.tensor(table), torch.tensor(expected[name]), rtol=1e-6, atol=1e-6, msg=f"step {number}, {name}"
            )
        if number == 0:  # Adam's first step is its rate, whatever the gradient
            assert abs(read_state(model)["model.bias"].item()) == pytest.approx(0.1 * factor, rel=1e-4)


Update = Callable[[], None]


def sgd(weight: nn.Parameter, lr: float) -> Update:
    return torch.optim.SGD([weight], lr=lr).step


def adagrad(weight: nn.Parameter, lr: float) -> Update:
    return torch.optim.Adagrad([weight], lr=lr, eps=1e-8).step


def adam(weight: nn.Parameter, lr: float) -> Update:
    return torch.optim.Adam([weight], lr=lr).step


def rowwise_adagrad(weight: nn.Parameter, lr: float) -> Update:
    """One moment per row: the sum over the steps of the mean over its columns of g^2."""
    moment = torch.zeros(weight.shape[0], 1)

    def step() -> None:
        gradient = weight.grad
        assert gradient is not None
        moment.add_(gradient.square().mean(dim=1, keepdim=True))
        with torch.no_grad():
            weight.sub_(lr * gradient / (moment.sqrt() + 1e-8))

    return step


SIZES = {"big": 40, "small": 6, "other": 25}
UPDATES = {"sgd": sgd, "adagrad": adagrad, "rowwise_adagrad": rowwise_adagrad}


def train_sharded(model: DistributedModelParallel, config: TrainConfig, batches: list[Batch]) -> dict[str, Tensor]:
    optimizer = make_optimizer(model, config)
    for batch in batches:
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
    return read_state(model)


def train_plain(model: nn.Module, config: TrainConfig, batches: list[Batch]) -> dict[str, Tensor]:
    updates = []
    for name, parameter in model.named_parameters():
        if "embedding_bags" in name and parameter.shape[0] > config.data_parallel_rows:
            updates.append(UPDATES[config.sparse_optimizer](parameter, config.sparse_lr))
        else:
            updates.append(adam(parameter, config.dense_lr))
    for batch in batches:
        model.zero_grad()
        model(batch)[0].backward()
        for update in updates:
            update()
    return read_state(model)


@pytest.mark.parametrize("data_parallel_rows", [0, 10])
@pytest.mark.parametrize("sparse_optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_fused_optimizers_are_what_they_are_called(
    device: torch.device, sparse_optimizer: str, data_parallel_rows: int
) -> None:
    config = TrainConfig(
        factor_dim=6, over_arch_layer_sizes=(8,), dropout=0.0, init_std=0.3, activation="tanh", dense_lr=0.01,
        sparse_optimizer=sparse_optimizer, sparse_lr=0.1, data_parallel_rows=data_parallel_rows,
    )  # type: ignore[arg-type]  # fmt: skip
    sharded = build_model(config, SIZES, 2, device)
    kinds = {name: table.sharding_type for plan in sharded.plan.plan.values() for name, table in plan.items()}  # type: ignore[attr-defined]
    assert {name for name, kind in kinds.items() if kind == "data_parallel"} == (
        {"t_small"} if data_parallel_rows else set()
    )
    plain = DeepFMTrain(
        DeepFM(EmbeddingBagCollection(tables=embedding_tables(SIZES, 6)), 2, (8,), 6, dropout=0.0, activation=nn.Tanh)
    )
    before = read_state(sharded.model)
    write_state(plain, before)
    batches = [to_batch(draw(16, SIZES, 2, longest=3, seed=seed), list(SIZES)) for seed in range(5)]
    expected = train_plain(plain, config, batches)
    actual = train_sharded(sharded.model, config, batches)
    for name, weight in expected.items():
        assert (weight - before[name]).abs().max() > 1e-3, f"{name} did not move"
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_rank_without_tables_records_their_rate_too() -> None:
    """Rank 0 writes the record, and a plan may give it no table, so no group with the tables' rate."""
    config = TrainConfig(sparse_lr=0.3, dense_lr=0.02, warmup=0.5)
    optimizer: Any = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=config.dense_lr)
    scheduler = make_scheduler(optimizer, config, total_steps=8)
    seen: Any = SimpleNamespace(_optimizer=optimizer, _scheduler=scheduler, _config=config)
    for factor in (0.25, 0.5, 0.75, 1.0, 1.0):
        assert Loop._learning_rates(seen) == pytest.approx({"sparse": 0.3 * factor, "dense": 0.02 * factor})
        optimizer.step()
        scheduler.step()


def test_adam_drops_types_that_cut_columns_and_shards_without_a_warning(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several types the planner must not choose what Adam then refuses; TorchRec warns of each kernel ``dense``."""
    console.quiet()
    asked: dict[str, Any] = {}

    def plan_model(*args: Any, **options: Any) -> Any:
        asked.update({name: one.sharding_types for name, one in options["constraints"].items()})
        return real(*args, **options)

    real = build.plan_model
    monkeypatch.setattr(build, "plan_model", plan_model)
    config = TrainConfig(factor_dim=6, over_arch_layer_sizes=(8,), sparse_optimizer="adam", sparse_lr=0.001)
    rules = ["big=column_wise,row_wise", "other=any"]
    built = build_model(config, SIZES, 2, device, constraints=rules)
    assert asked["t_big"] == ["row_wise"]
    assert "row_wise" in asked["t_other"]
    assert not [kind for kind in asked["t_other"] if "column" in kind or kind == "grid_shard"]
    kernels = {each.compute_kernel for module in built.plan.plan.values() for each in module.values()}  # type: ignore[attr-defined]
    assert kernels == {"dense"}
    assert "caching params" not in caplog.text

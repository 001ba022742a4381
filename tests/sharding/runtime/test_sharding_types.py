"""Every sharding type on real ranks against the model that nothing shards: logits, gradients, weights after five steps.

On two ranks, on four, and on four that take themselves for two hosts of two. Each type for all tables, a model with all
seven types in it, and the same turned by three. Bags of 0 to 3 ids with weights; tables of fewer rows than ranks; three
column shards, which two ranks can't share out evenly. The oracle is plain torch: unsharded ``nn.EmbeddingBag``s, the
whole batch, ``torch.optim``.

RowWiseAdagrad keeps one moment per row. Under a type that cuts columns each column shard is a table of its own for the
kernel, with a moment of its own: the mean of g^2 over the shard's columns instead of the row's. So there the oracle is
that definition, in plain torch, and a test sees that it is another one than the row's.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchrec.distributed.comm
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from tests.support.ranks import CPU, run_ranks
from tests.support.samples import Sample, draw, read_state, write_state
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
from torchrec_deepfm.distributed.process_group import on_main
from torchrec_deepfm.sharding.plan.io import load_plan, save_plan
from torchrec_deepfm.sharding.plan.torchrec_plan import find_embedding_bags, to_sharding_plan
from torchrec_deepfm.training.build import Sharded, build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import make_optimizer

# Rows of 12 columns [v (10) | w | padding]: three column shards of 4.
K, SIZES = 10, {"a": 37, "b": 1, "c": 24, "d": 3, "e": 50, "f": 7, "g": 41}
NUMERIC, BATCH, STEPS, FILE_STEPS = 2, 8, 5, 2
WEIGHT_DECAY, L2, CLIP_NORM = {"adagrad": 2.0}, {"adam": 0.3}, {"adam": 1.5}
RATES, DENSE_RATE = {"adam": 0.01, "sgd": 0.1, "adagrad": 0.02, "rowwise_adagrad": 0.02}, 0.005
TYPES = [
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_column_wise",
    "table_row_wise",
    "grid_shard",
]
CUT_COLUMNS = {"column_wise", "table_column_wise", "grid_shard"}
CUT_ROWS = {"row_wise", "table_row_wise", "grid_shard"}
FEW_ROWS = {"b": "table_wise", "d": "column_wise"}  # a rank without a row is more than FBGEMM's kernel on CPU can do
WHOLE_TABLES = {"c": "data_parallel", "e": "table_row_wise"}
CASES: dict[str, dict[str, str]] = {
    **{kind: dict.fromkeys(SIZES, kind) | (FEW_ROWS if kind in CUT_ROWS else {}) for kind in TYPES},
    "whole rows": dict.fromkeys("ag", "row_wise") | dict.fromkeys("bdf", "table_wise") | WHOLE_TABLES,
    "all seven": dict(zip(SIZES, TYPES, strict=True)),
    "all seven, shuffled": dict(zip(SIZES, [TYPES[i] for i in (6, 4, 5, 0, 2, 3, 1)], strict=True)),
}
OPTIMIZERS = list(RATES)[1:]
TRAINED = {case: OPTIMIZERS if CUT_COLUMNS & set(kinds.values()) else list(RATES) for case, kinds in CASES.items()}
LAYOUTS = {"2 ranks": (2, 2), "4 ranks": (4, 4), "2 hosts of 2": (4, 2)}
# Of four ranks on one host, the rest says no more than two ranks and two hosts do.
SEEN = {layout: list(CASES) for layout in LAYOUTS} | {"4 ranks": ["table_row_wise", "all seven", "all seven, shuffled"]}
SAMPLES = draw(BATCH * STEPS, SIZES, NUMERIC, longest=3, seed=11)
TABLE = "model.sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"


def config(optimizer: str, world_size: int) -> TrainConfig:
    return TrainConfig(
        factor_dim=K, over_arch_layer_sizes=(6,), activation="tanh", dropout=0.0, batch_size=BATCH // world_size,
        sparse_optimizer=optimizer, sparse_lr=RATES[optimizer], dense_lr=DENSE_RATE,
        embedding_weight_decay=WEIGHT_DECAY.get(optimizer, 0.0), embedding_l2=L2.get(optimizer, 0.0),
        clip_norm=CLIP_NORM.get(optimizer, 0.0),
    )  # type: ignore[arg-type]  # fmt: skip


def rules(case: str) -> list[str]:
    """What a user would type."""
    return [
        f"{name}={kind}" + (":min_partition=4" if kind in CUT_COLUMNS else "") for name, kind in CASES[case].items()
    ]


def weight_of(feature: str, number: int) -> float:
    """Of the n-th id in a sample's bag."""
    return 0.5 + ((ord(feature) + 3 * number) % 5) / 4


def weighted_batch(samples: list[Sample]) -> Batch:
    bags = [sample.bags[key] for key in SIZES for sample in samples]
    weights = [weight_of(key, n) for key in SIZES for sample in samples for n in range(len(sample.bags[key]))]
    return Batch(
        dense_features=torch.tensor([sample.numbers for sample in samples]),
        sparse_features=KeyedJaggedTensor(
            keys=list(SIZES),
            values=torch.tensor([i for bag in bags for i in bag], dtype=torch.int32),
            lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
            weights=torch.tensor(weights),
        ),
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.int32),
    )


def unsharded() -> DeepFMTrain:
    ebc = EmbeddingBagCollection(tables=embedding_tables(SIZES, K), is_weighted=True)
    return DeepFMTrain(DeepFM(ebc, NUMERIC, (6,), K, dropout=0.0, activation=nn.Tanh))


@functools.cache
def noise() -> dict[str, Tensor]:
    """Weights such that logits are about 1, and their last bit far below 1e-6."""
    generator = torch.Generator().manual_seed(5)
    shapes = {name: value.shape for name, value in unsharded().state_dict().items()}
    return {name: torch.randn(shapes[name], generator=generator) * 0.1 for name in sorted(shapes)}


def train(sharded: Sharded, optimizer: str, steps: int = STEPS) -> dict[str, Any]:
    """Logits and dense gradients of this rank, and the weights after the first step and the last."""
    model, share = sharded.model, BATCH // dist.get_world_size()
    write_state(model, noise())
    combined = make_optimizer(model, config(optimizer, dist.get_world_size()))
    reported: dict[str, Any] = {"logits": []}
    for step in range(steps):
        first = step * BATCH + dist.get_rank() * share
        combined.zero_grad()
        loss, (_, logits, _) = model(weighted_batch(SAMPLES[first : first + share]))
        loss.backward()
        if step == 0:
            reported["gradients"] = {
                name: value.grad.clone()
                for name, value in model.named_parameters()
                if "embedding_bags" not in name and value.grad is not None
            }
        combined.step()
        reported["logits"].append(logits)
        if (step, optimizer) in ((0, "sgd"), (FILE_STEPS - 1, OPTIMIZERS[-1])):
            reported[f"after step {step}"] = read_state(model)
    reported["weights"] = read_state(model)
    return reported


def kinds(sharded: Sharded) -> dict[str, str]:
    [module] = sharded.plan.plan.values()
    return {name: sharding.sharding_type for name, sharding in module.items()}  # type: ignore[attr-defined]


def build(optimizer: str, **options: Any) -> Sharded:
    return build_model(config(optimizer, dist.get_world_size()), SIZES, NUMERIC, CPU, is_weighted=True, **options)


def take_for_hosts_of(ranks: int) -> None:
    """Let TorchRec see as many ranks per host as a launcher on several hosts would tell it."""
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "LOCAL_RANK": str(dist.get_rank() % ranks)}
    torchrec.distributed.comm._INTRA_PG = torchrec.distributed.comm._CROSS_PG = None


def everything(layouts: list[str], folder: Path) -> dict[Any, Any]:
    """What a rank reports, by layout, case and optimizer; all tests read one launch for each number of ranks."""
    reported: dict[Any, Any] = {}
    for layout in layouts:
        take_for_hosts_of(LAYOUTS[layout][1])
        for case in SEEN[layout]:
            for optimizer in TRAINED[case]:
                sharded = build(optimizer, constraints=rules(case))
                reported[layout, case, optimizer] = train(sharded, optimizer) | {
                    "kinds": kinds(sharded),
                    "shards": {table.name: table.shards for table in sharded.plan_file.tables},
                }
            reported[layout, case] = through_a_file(sharded, folder / f"{layout} {case}.json")
    return reported


def through_a_file(sharded: Sharded, path: Path) -> dict[str, Any]:
    """The plan written, read, and trained with."""
    on_main(lambda: save_plan(sharded.plan_file, path))
    loaded = load_plan(path)
    again = build(OPTIMIZERS[-1], plan=path)
    return {
        "file": loaded == sharded.plan_file == again.plan_file,
        "plan": to_sharding_plan(loaded, find_embedding_bags(unsharded()), CPU) == sharded.plan,
        "weights": train(again, OPTIMIZERS[-1], steps=FILE_STEPS)["weights"],
    }


Update = Callable[[], None]
Columns = tuple[tuple[tuple[int, int], ...], ...]  # first and end of the columns of each moment, by table


def rowwise_adagrad(weight: nn.Parameter, columns: tuple[tuple[int, int], ...]) -> Update:
    """One moment per row and group of columns: the sum over the steps of the mean over these columns of g^2."""
    moments = torch.zeros(len(weight), len(columns))

    def step() -> None:
        assert weight.grad is not None
        with torch.no_grad():
            for number, (first, end) in enumerate(columns):
                gradient = weight.grad[:, first:end]
                moments[:, number] += gradient.square().mean(dim=1)
                weight[:, first:end] -= (
                    RATES["rowwise_adagrad"] * gradient / (moments[:, number].sqrt() + 1e-8).unsqueeze(1)
                )

    return step


@functools.cache
def plain_training(optimizer: str, columns: Columns) -> dict[str, Any]:
    """The same on one process and whole batches, with torch's own optimizers."""
    model = unsharded()
    write_state(model, noise())
    tables = {name: model.get_parameter(TABLE.format(name)) for name in SIZES}
    others = [value for value in model.parameters() if not any(value is table for table in tables.values())]
    updates: list[Update] = [torch.optim.Adam(others, lr=DENSE_RATE).step]
    if optimizer == "adam":
        updates.append(torch.optim.Adam(tables.values(), lr=RATES[optimizer]).step)
    elif optimizer == "sgd":
        updates.append(torch.optim.SGD(tables.values(), lr=RATES[optimizer]).step)
    elif optimizer == "adagrad":
        updates.append(torch.optim.Adagrad(tables.values(), lr=RATES[optimizer], eps=1e-8).step)
    else:
        updates += [rowwise_adagrad(table, cuts) for table, cuts in zip(tables.values(), columns, strict=True)]
    reported: dict[str, Any] = {"logits": []}
    for step in range(STEPS):
        model.zero_grad()
        loss, (_, logits, _) = model(weighted_batch(SAMPLES[step * BATCH : (step + 1) * BATCH]))
        loss.backward()
        if step == 0:
            reported["gradients"] = {
                name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
            }
        rows = [*tables.values(), model.get_parameter("model.dense_arch.rows")]
        (L2.get(optimizer, 0.0) / 2 * sum(weight[:, :K].square().sum() for weight in rows)).backward()
        if optimizer in CLIP_NORM:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM[optimizer])
        for update in updates:
            update()
        for table in tables.values():
            table.data *= 1 - RATES[optimizer] * WEIGHT_DECAY.get(optimizer, 0.0)
        reported["logits"].append(logits.detach())
    reported["weights"] = read_state(model)
    return reported


WHOLE_ROWS: Columns = tuple(((0, 12),) for _ in SIZES)


def columns_of(reported: dict[str, Any]) -> Columns:
    """How the shards cut each table's columns."""
    return tuple(
        tuple(sorted({(s.offsets[1], s.offsets[1] + s.sizes[1]) for s in reported["shards"][f"t_{name}"]}))
        for name in SIZES
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[Any, Any]]]:
    """What each rank reported, by layout."""
    folder = tmp_path_factory.mktemp("plans")
    two = run_ranks(everything, 2, ["2 ranks"], folder)
    four = run_ranks(everything, 4, ["4 ranks", "2 hosts of 2"], folder)
    return {"2 ranks": two, "4 ranks": four, "2 hosts of 2": four}


IN_LAYOUTS = [(layout, case) for layout, cases in SEEN.items() for case in cases]


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(
    ("layout", "case", "optimizer"),
    [(layout, case, optimizer) for layout, case in IN_LAYOUTS for optimizer in TRAINED[case]],
)
def test_a_sharded_model_is_the_unsharded_one(
    launched: dict[str, list[dict[Any, Any]]], layout: str, case: str, optimizer: str
) -> None:
    reported = [rank[layout, case, optimizer] for rank in launched[layout]]
    assert reported[0]["kinds"] == {f"t_{name}": kind for name, kind in CASES[case].items()}
    columns = columns_of(reported[0])
    assert {name for name, cuts in zip(SIZES, columns, strict=True) if len(cuts) == 3} == {
        name for name, kind in CASES[case].items() if kind in CUT_COLUMNS
    }
    expected = plain_training(optimizer, columns)
    for step, logits in enumerate(expected["logits"]):
        close(torch.cat([rank["logits"][step] for rank in reported]), logits, f"logits of step {step}")
    before = noise()
    for rank in reported:
        for name, gradient in expected["gradients"].items():
            if "embedding_bags" not in name:
                close(rank["gradients"][name], gradient, f"gradient of {name}")
            elif optimizer == "sgd":
                close((before[name] - rank["after step 0"][name]) / RATES["sgd"], gradient, f"gradient of {name}")
        assert set(rank["weights"]) == set(expected["weights"])
        for name, weight in expected["weights"].items():
            assert (weight - before[name]).abs().max() > 1e-3, f"{name} learns nothing here"
            close(rank["weights"][name], weight, name)


@pytest.mark.parametrize(("layout", "case"), [each for each in IN_LAYOUTS if each[1] in CUT_COLUMNS])
def test_a_moment_per_column_shard_is_another_optimizer(
    launched: dict[str, list[dict[Any, Any]]], layout: str, case: str
) -> None:
    """Else the test above would not see which definition holds."""
    reported = launched[layout][0][layout, case, "rowwise_adagrad"]
    whole = plain_training("rowwise_adagrad", WHOLE_ROWS)["weights"]
    for name, kind in CASES[case].items():
        if kind in CUT_COLUMNS:
            assert (reported["weights"][TABLE.format(name)] - whole[TABLE.format(name)]).abs().max() > 1e-3


@pytest.mark.parametrize(("layout", "case"), IN_LAYOUTS)
def test_a_plan_goes_through_a_file(launched: dict[str, list[dict[Any, Any]]], layout: str, case: str) -> None:
    for rank in launched[layout]:
        found = rank[layout, case]
        assert found["file"]
        assert found["plan"]
        trained = rank[layout, case, OPTIMIZERS[-1]]
        for name, weight in trained[f"after step {FILE_STEPS - 1}"].items():
            assert torch.equal(found["weights"][name], weight), f"{name} is another one with the plan than without"


def test_hosts_hold_what_they_should(launched: dict[str, list[dict[Any, Any]]]) -> None:
    """Types that go by hosts stay on one, or a column block on one; and the tables are shared out over both."""
    reported = launched["2 hosts of 2"][0]
    for case in ("table_column_wise", "table_row_wise", "grid_shard"):
        hosts = set()
        for name, kind in CASES[case].items():
            if kind == case:
                by_block: dict[int, set[int]] = {}
                for shard in reported["2 hosts of 2", case, "sgd"]["shards"][f"t_{name}"]:
                    block = shard.offsets[1] if case == "grid_shard" else 0
                    by_block.setdefault(block, set()).add(shard.rank // 2)
                assert all(len(found) == 1 for found in by_block.values())
                hosts |= set.union(*by_block.values())
        assert hosts == {0, 1}

"""Sharding changes where the weights lie, and neither what they are at the start nor what they learn.

Two real ranks, under every kind of plan that a table can get on a CPU, against one rank and against the model that
nothing shards.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.support.ranks import CPU, run_ranks
from tests.support.samples import batches_of_rank, draw, read_state, to_batch, write_state
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
from torchrec_deepfm.distributed.process_group import on_main
from torchrec_deepfm.sharding.runtime.init_tables import BLOCK_ROWS, initialize_tables
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import fuse_sparse_optimizer
from torchrec_deepfm.training.scoring.evaluation import gather_predictions
from torchrec_deepfm.training.scoring.metrics import Metrics, compute_metrics

K = 5  # rows of 8 columns [v (5) | w | padding (2)]: the second column shard begins inside v
# Halves of "a" begin and end inside blocks. Not in alphabetical order: sorting the fields by name has to fail.
SIZES = {"a": 2 * BLOCK_ROWS + 3001, "c": 9, "b": 50}
EBC = "model.sparse_arch.embedding_bag_collection"
TABLE = f"{EBC}.embedding_bags.t_{{}}.weight"
RATE = 0.5
STEPS, BATCH = 3, 12
PLANS = ["table_wise", "column_wise", "row_wise", "data_parallel"]


class CpuRowWiseSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which can shard rows on a CPU but does not offer it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value]


def make_model() -> DeepFMTrain:
    tables = embedding_tables(SIZES, K)
    ebc = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    return DeepFMTrain(DeepFM(ebc, 2, (6,), K, dropout=0.0))


def sharding_of(plan: str, last: int) -> dict[str, Any]:
    """The first table goes to the last rank, so that with two of them the keys change their order."""
    return {
        "table_wise": {"t_a": table_wise(last), "t_b": table_wise(0), "t_c": table_wise(last)},
        "column_wise": {f"t_{name}": column_wise(ranks=[last, 0]) for name in SIZES},
        "row_wise": {f"t_{name}": row_wise() for name in SIZES},
        "data_parallel": {f"t_{name}": data_parallel() for name in SIZES},
    }[plan]


def shard(model: DeepFMTrain, plan: str) -> DistributedModelParallel:
    ebc = model.model.sparse_arch.embedding_bag_collection
    if plan != "data_parallel":
        fuse_sparse_optimizer(ebc.parameters(), TrainConfig(sparse_optimizer="sgd", sparse_lr=RATE))
    world_size = dist.get_world_size()
    sharder = CpuRowWiseSharder()
    module_plan = construct_module_sharding_plan(
        ebc, sharding_of(plan, world_size - 1), sharder, local_size=world_size, world_size=world_size, device_type="cpu"
    )
    return DistributedModelParallel(model, device=CPU, plan=ShardingPlan(plan={EBC: module_plan}), sharders=[sharder])


def noise() -> dict[str, Tensor]:
    """Weights without zeros, the same wherever they are drawn."""
    shapes = {name: value.shape for name, value in make_model().state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shapes[name], generator=generator) * 0.3 for name in sorted(shapes)}


def batches() -> list[Any]:
    samples = draw(STEPS * BATCH, SIZES, 2, longest=3)
    return batches_of_rank(samples, ["c", "a", "b"], BATCH)


def initial_weights(plan: str) -> dict[str, Tensor]:
    model = shard(make_model(), plan)
    initialize_tables(model, embedding_tables(SIZES, K), factor_dim=K, std=0.01, seed=3)
    state = read_state(model)
    return {name: state[TABLE.format(name)] for name in SIZES}


def train_three_steps(plan: str) -> dict[str, Any]:
    model = shard(make_model(), plan)
    write_state(model, noise())
    keys: list[str] = []
    ebc = model.module.model.sparse_arch.embedding_bag_collection
    ebc.register_forward_hook(lambda _module, _args, output: keys.extend(output.keys()))
    dense = torch.optim.SGD(dict(in_backward_optimizer_filter(model.named_parameters())).values(), lr=RATE)
    logits = []
    for batch in batches():
        dense.zero_grad()
        loss, (_, batch_logits, _) = model(batch)
        loss.backward()
        dense.step()
        logits.append(batch_logits)
    return {"logits": logits, "weights": read_state(model), "keys": keys[: len(SIZES)]}


# Numbers of samples per rank: unequal, none on the first, none on the second.
UNEVEN = {"unequal": [70, 30], "none on rank 0": [0, 5], "none on rank 1": [4, 0]}


def predictions(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randint(-6, 6, (rows,), generator=generator).float() / 4  # with ties between the ranks
    return logits, (torch.rand(rows, generator=generator) < 0.4).float()


def gathered(counts: list[int]) -> Metrics:
    logits, labels = predictions(sum(counts))
    first = sum(counts[: dist.get_rank()])
    mine = slice(first, first + counts[dist.get_rank()])
    found = gather_predictions(logits[mine], labels[mine], batch_size=100)
    return on_main(lambda: compute_metrics(found.logits, found.labels, bins=7) if found else None)  # type: ignore[return-value]


def everything() -> dict[str, Any]:
    """What a rank reports; all tests here read one launch."""
    return {
        "initial": {plan: initial_weights(plan) for plan in PLANS},
        "trained": {plan: train_three_steps(plan) for plan in PLANS},
        "metrics": {name: gathered(counts) for name, counts in UNEVEN.items()},
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("plan", PLANS)
def test_initial_weights_depend_on_no_plan_and_no_number_of_ranks(
    ranks: list[dict[str, Any]], device: torch.device, plan: str
) -> None:
    reference = initial_weights("table_wise")  # on one rank, each table whole
    alone = initial_weights(plan)
    for name, weight in reference.items():
        assert torch.equal(alone[name], weight)
        for rank in ranks:
            assert torch.equal(rank["initial"][plan][name], weight)


@pytest.mark.parametrize("rows", [1, 2, 40, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_a_row_begins_as_it_would_in_a_larger_table(rows: int) -> None:
    weights = []
    for size in (rows, BLOCK_ROWS + 100):
        ebc = EmbeddingBagCollection(tables=embedding_tables({"a": size}, 16))
        initialize_tables(ebc, ebc.embedding_bag_configs(), factor_dim=16, std=0.01, seed=3)
        weights.append(ebc.state_dict()["embedding_bags.t_a.weight"])
    assert torch.equal(weights[0], weights[1][:rows])


def test_initial_weights_are_what_the_row_layout_asks_for(ranks: list[dict[str, Any]]) -> None:
    tables = ranks[0]["initial"]["column_wise"]
    for name, weight in tables.items():
        assert weight.shape == (SIZES[name], 8)
        assert (weight[:, K:] == 0.0).all(), "w and the padding start at zero"
        assert (weight[:, :K] != 0.0).all()
    v = tables["a"][:, :K]
    assert v.std().item() == pytest.approx(0.01, rel=0.02)
    assert v.mean().item() == pytest.approx(0.0, abs=2e-4)
    assert v.unique(dim=0).shape == v.shape, "blocks of rows repeat"
    assert not torch.equal(tables["a"][:9], tables["c"]), "tables repeat"


@pytest.fixture(scope="module")
def unsharded() -> dict[str, Any]:
    """The same steps on the whole batches, without TorchRec's sharding and with one plain SGD over all parameters."""
    model = DeepFMTrain(DeepFM(EmbeddingBagCollection(tables=embedding_tables(SIZES, K)), 2, (6,), K, dropout=0.0))
    before = noise()
    write_state(model, before)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    samples = draw(STEPS * BATCH, SIZES, 2, longest=3)
    logits = []
    for start in range(0, len(samples), BATCH):
        optimizer.zero_grad()
        loss, (_, batch_logits, _) = model(to_batch(samples[start : start + BATCH], list(SIZES)))
        loss.backward()
        optimizer.step()
        logits.append(batch_logits)
    after = read_state(model)
    for name, weight in after.items():
        assert (weight - before[name]).abs().max() > 1e-3, f"{name} learns nothing here"
    return {"logits": logits, "weights": after}


def assert_learns_the_same(by_rank: list[dict[str, Any]], unsharded: dict[str, Any]) -> None:
    for step, expected in enumerate(unsharded["logits"]):
        logits = torch.cat([rank["logits"][step] for rank in by_rank])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for rank in by_rank:
        assert set(rank["weights"]) == set(unsharded["weights"])
        for name, expected in unsharded["weights"].items():
            torch.testing.assert_close(rank["weights"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_learn_what_the_unsharded_model_learns(
    ranks: list[dict[str, Any]], unsharded: dict[str, Any], plan: str
) -> None:
    assert_learns_the_same([rank["trained"][plan] for rank in ranks], unsharded)


@pytest.mark.parametrize("plan", PLANS)
def test_one_rank_learns_what_the_unsharded_model_learns(
    device: torch.device, unsharded: dict[str, Any], plan: str
) -> None:
    assert_learns_the_same([train_three_steps(plan)], unsharded)


def test_the_comparison_saw_keys_in_another_order(ranks: list[dict[str, Any]]) -> None:
    """Else it would say nothing about a model that takes the features by position."""
    for rank in ranks:
        assert rank["trained"]["table_wise"]["keys"] == ["b", "a", "c"]


@pytest.mark.parametrize("name", UNEVEN)
def test_metrics_of_uneven_ranks_are_those_of_the_whole_set(ranks: list[dict[str, Any]], name: str) -> None:
    logits, labels = predictions(sum(UNEVEN[name]))
    expected = compute_metrics(logits.numpy(), labels.numpy(), bins=7)
    assert [rank["metrics"][name] for rank in ranks] == [expected, expected]
    assert expected.auc is not None


def test_the_mean_of_the_ranks_would_be_another_auc() -> None:
    """Else the comparison above could not tell the two apart."""
    logits, labels = predictions(100)
    parts = [compute_metrics(logits[cut].numpy(), labels[cut].numpy()).auc for cut in (slice(70), slice(70, 100))]
    whole = compute_metrics(logits.numpy(), labels.numpy()).auc
    assert abs(0.7 * parts[0] + 0.3 * parts[1] - whole) > 1e-3

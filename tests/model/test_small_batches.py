"""Ranks whose batch holds one sample or none: they take part in every collective, and the others get their logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection

from tests.model.test_sharded_model import PLANS, SIZES, K, make_model, shard
from tests.support.ranks import run_ranks
from tests.support.samples import draw, read_state, to_batch, write_state
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables

UNEVEN = [(0, 3), (1, 0), (0, 0), (1, 1)]  # batch sizes of the two ranks
EVEN = [(0, 0), (1, 1)]


def sizes_of(plan: str) -> list[tuple[int, int]]:
    """Row-wise shards gather their results over gloo, which wants batches of one size."""
    return EVEN if plan == "row_wise" else UNEVEN


def everything() -> dict[str, list[dict[str, Any]]]:
    """What each rank of each plan sees of each pair of batch sizes."""
    results: dict[str, list[dict[str, Any]]] = {}
    for plan in PLANS:
        model = shard(make_model(), plan)
        unsharded = DeepFMTrain(
            DeepFM(EmbeddingBagCollection(tables=embedding_tables(SIZES, K)), 2, (6,), K, dropout=0.0)
        )
        results[plan] = []
        for number, sizes in enumerate(sizes_of(plan)):
            write_state(unsharded, {name.removeprefix("module."): value for name, value in read_state(model).items()})
            samples = draw(4, SIZES, 2, longest=3, seed=number)[: sizes[dist.get_rank()]]
            batch = to_batch(samples, list(SIZES)) if samples else empty_batch()
            loss, (_, logits, labels) = model(batch)
            _, (_, expected, _) = unsharded(batch)
            loss.backward()
            results[plan].append(
                {"loss": loss.item(), "logits": logits, "expected": expected, "labels": tuple(labels.shape)}
            )
    return results


def empty_batch() -> Any:
    batch = to_batch([], list(SIZES))
    batch.dense_features = torch.empty(0, 2)
    return batch


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[dict[str, Any]]]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("plan", PLANS)
def test_small_and_empty_batches(plan: str, ranks: list[dict[str, list[dict[str, Any]]]]) -> None:
    for rank, results in enumerate(ranks):
        for sizes, result in zip(sizes_of(plan), results[plan], strict=True):
            assert result["logits"].shape == (sizes[rank],)
            assert result["labels"] == (sizes[rank],)
            torch.testing.assert_close(result["logits"], result["expected"], rtol=1e-5, atol=1e-6)
            assert (result["loss"] == 0.0) == (sizes[rank] == 0)

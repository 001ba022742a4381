"""DeepFMTrain in TorchRec's pipelines: the losses of a plain loop, and the sparse arch really pipelined."""

from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

from tests.model.training_loops import pipelined, plain_loop, through
from tests.support.ranks import CPU, run_ranks
from tests.support.samples import batches_of_rank, draw
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import fuse_sparse_optimizer, make_optimizer

SIZES = {"a": 30, "b": 20, "c": 7}
CONFIG = TrainConfig(
    factor_dim=3, over_arch_layer_sizes=(8,), dropout=0.0, init_std=0.5, sparse_lr=0.3, dense_lr=0.02, batch_size=16
)
STEPS = 6


class Arithmetic(nn.Module):
    """Computes on the ids before the tables see them, which a pipeline cannot run ahead of the model."""

    def __init__(self, model: DeepFMTrain) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Any:
        ids = batch.sparse_features
        same = KeyedJaggedTensor(keys=list(SIZES), values=ids.values() + 0, lengths=ids.lengths())
        return self.model(Batch(dense_features=batch.dense_features, sparse_features=same, labels=batch.labels))


def batches() -> list[Batch]:
    return batches_of_rank(draw(STEPS * 32, SIZES, 2, longest=3), list(SIZES), 32)


def every_pipeline() -> dict[str, Any]:
    """Losses, and what was pipelined, of every pipeline on its own copy of one model."""

    def fresh() -> DistributedModelParallel:
        return build_model(CONFIG, SIZES, 2, CPU).model

    model = fresh()
    reported: dict[str, Any] = {"plain": plain_loop(model, make_optimizer(model, CONFIG), batches())}
    model = fresh()
    base = TrainPipelineBase(model, make_optimizer(model, CONFIG), CPU)
    reported["base"] = [loss.item() for loss, _, _ in through(base, batches())]

    model = fresh()
    sparse = TrainPipelineSparseDist(model, make_optimizer(model, CONFIG), CPU)
    reported["sparse"] = [loss.item() for loss, _, _ in through(sparse, batches())]
    reported["sparse modules"] = pipelined(sparse)
    sparse.detach()

    model.eval()
    with torch.no_grad():
        reported["plain logits"] = torch.stack([model(batch)[1][1] for batch in batches()])
        evaluation = EvalPipelineSparseDist(model, None, CPU)
        reported["logits"] = torch.stack([logits for _, logits, _ in through(evaluation, batches())])
    reported["evaluation modules"] = pipelined(evaluation)

    ebc = EmbeddingBagCollection(tables=embedding_tables(SIZES, 3), device=torch.device("meta"))
    fuse_sparse_optimizer(ebc.parameters(), CONFIG)
    wrapped = DistributedModelParallel(Arithmetic(DeepFMTrain(DeepFM(ebc, 2, (8,), 3))), device=CPU)
    fallback = TrainPipelineSparseDist(wrapped, make_optimizer(wrapped, CONFIG), CPU)
    reported["fallback losses"] = len(through(fallback, batches()))
    reported["fallback modules"] = pipelined(fallback)
    return reported


def assert_pipelines_are_plain_loops(reported: dict[str, Any]) -> None:
    assert len(set(reported["plain"])) == STEPS
    assert reported["base"] == pytest.approx(reported["plain"], rel=1e-6)
    assert reported["sparse"] == pytest.approx(reported["plain"], rel=1e-6)
    torch.testing.assert_close(reported["logits"], reported["plain logits"], rtol=1e-6, atol=1e-6)
    assert reported["sparse modules"] == ["ShardedEmbeddingBagCollection"]
    assert reported["evaluation modules"] == ["ShardedEmbeddingBagCollection"]


def assert_the_fallback_is_seen(reported: dict[str, Any]) -> None:
    """It trains, and only the list of pipelined modules shows that nothing is overlapped."""
    assert reported["fallback losses"] == STEPS
    assert reported["fallback modules"] == []


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(every_pipeline, 2)


def test_on_one_rank(device: torch.device) -> None:
    reported = every_pipeline()
    assert_pipelines_are_plain_loops(reported)
    assert_the_fallback_is_seen(reported)


@pytest.mark.parametrize("rank", [0, 1])
def test_on_two_ranks(ranks: list[dict[str, Any]], rank: int) -> None:
    assert_pipelines_are_plain_loops(ranks[rank])
    assert_the_fallback_is_seen(ranks[rank])


def test_two_ranks_see_halves_of_one_batch(ranks: list[dict[str, Any]], device: torch.device) -> None:
    model = build_model(CONFIG, SIZES, 2, device).model
    alone = plain_loop(model, make_optimizer(model, CONFIG), batches())
    assert ranks[0]["plain"] != ranks[1]["plain"]
    means = [(a + b) / 2 for a, b in zip(ranks[0]["plain"], ranks[1]["plain"], strict=True)]
    assert means == pytest.approx(alone, rel=1e-5)

"""CowClip against the paper's rule in numpy, on gradients of a model that nothing shards; one rank and two."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch

from tests.support.ranks import CPU, run_ranks
from tests.support.samples import draw, read_state, to_batch, write_state
from tests.training.optim.test_optimizers import UPDATES, adam, train_sharded
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.start import check_options

K = 6
SIZES = {"small": 6, "middle": 20, "big": 60}
BASE = TrainConfig(
    factor_dim=K, over_arch_layer_sizes=(8,), dropout=0.0, init_std=0.3, activation="tanh", dense_lr=0.01,
    sparse_lr=0.03, clip_embedding="cowclip", cowclip_ratio=0.02, cowclip_bound=0.012,
)  # fmt: skip
CONFIGS = {
    "replicated": replace(BASE, sparse_optimizer="adam", embedding_l2=0.01),
    "fused": replace(BASE, sparse_optimizer="rowwise_adagrad"),
    "both": replace(BASE, sparse_optimizer="sgd", sparse_lr=3.0, data_parallel_rows=10, touched_embedding_l2=0.5),
}
WISE = ("table_wise", "row_wise")


def batches() -> list[Batch]:
    return [to_batch(draw(16, SIZES, 2, seed=seed), list(SIZES)) for seed in range(4)]


def clip_as_in_the_paper(table: nn.Parameter, ids: list[int], config: TrainConfig) -> tuple[int, int]:
    """Clip each row by itself; return how many rows of the batch were clipped, and how many by the bound."""
    weight, gradient = table.detach().numpy(), table.grad.numpy()  # type: ignore[union-attr]
    clipped, by_bound = 0, 0
    for row in range(len(weight)):
        count = max(ids.count(row), 1)
        norm = float(np.sqrt(sum(float(x) ** 2 for x in weight[row, :K])))
        limit = count * max(config.cowclip_ratio * norm, config.cowclip_bound)
        length = float(np.sqrt(sum(float(x) ** 2 for x in gradient[row, :K])))
        if length > limit:
            gradient[row, :K] *= limit / length
            clipped += row in ids
            by_bound += row in ids and config.cowclip_ratio * norm < config.cowclip_bound
    return clipped, by_bound


def train_plain(model: DeepFMTrain, config: TrainConfig) -> None:
    updates, clipped, by_bound, looked_up = [], 0, 0, 0
    for name, parameter in model.named_parameters():
        is_table = "embedding_bags" in name and len(parameter) > config.data_parallel_rows
        optimizer = UPDATES.get(config.sparse_optimizer, adam) if is_table else adam
        updates.append(optimizer(parameter, config.sparse_lr if is_table else config.dense_lr))
    for batch in batches():
        model.zero_grad()
        loss = model(batch)[0]
        features = batch.sparse_features.to_dict()
        for name, weight in model.named_parameters():
            if "embedding_bags" in name:
                ids = features[name.split(".")[-2].removeprefix("t_")].values().long()
                loss = loss + config.embedding_l2 / 2 * weight[:, :K].square().sum()
                loss = loss + config.touched_embedding_l2 / 2 * weight[ids, :K].square().sum(1).mean()
            elif name.endswith("dense_arch.rows"):
                loss = loss + config.embedding_l2 / 2 * weight[:, :K].square().sum()
        loss.backward()
        for name, weight in model.named_parameters():
            if "embedding_bags" in name:
                ids = features[name.split(".")[-2].removeprefix("t_")].values().tolist()
                more, bound = clip_as_in_the_paper(weight, ids, config)
                clipped, by_bound, looked_up = clipped + more, by_bound + bound, looked_up + len(set(ids))
        for update in updates:
            update()
    assert 0 < by_bound < clipped < looked_up, "the case shows ratio, bound, and rows within the limit"


def plain(before: dict[str, torch.Tensor], config: TrainConfig) -> dict[str, torch.Tensor]:
    tables = EmbeddingBagCollection(tables=embedding_tables(SIZES, K))
    model = DeepFMTrain(DeepFM(tables, 2, (8,), K, dropout=0.0, activation=nn.Tanh))
    write_state(model, before)
    train_plain(model, config)
    return read_state(model)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_clipped_as_in_the_paper(device: torch.device, name: str) -> None:
    config = CONFIGS[name]
    model = build_model(config, SIZES, 2, device).model
    before = read_state(model)
    assert_same(train_sharded(model, config, batches()), plain(before, config))


def train_on_ranks(folder: Path, sharding: str) -> None:
    """Each of two ranks takes half of each batch; the weights before and after."""
    rank = torch.distributed.get_rank()
    rules = () if sharding == "data_parallel" else (f"t_*={sharding}",)
    config = CONFIGS["replicated" if sharding == "data_parallel" else "fused"]
    model = build_model(config, SIZES, 2, CPU, constraints=rules).model
    before = read_state(model)
    mine = [to_batch(draw(16, SIZES, 2, seed=seed)[rank * 8 : rank * 8 + 8], list(SIZES)) for seed in range(4)]
    after = train_sharded(model, config, mine)
    if rank == 0:
        torch.save((before, after), folder / "weights.pt")


@pytest.mark.parametrize("sharding", [*WISE, "data_parallel"])
def test_a_row_is_counted_over_all_ranks(tmp_path: Path, sharding: str) -> None:
    run_ranks(train_on_ranks, 2, tmp_path, sharding)
    before, after = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_same(after, plain(before, CONFIGS["replicated" if sharding == "data_parallel" else "fused"]))


def test_lists_are_refused() -> None:
    data: Any = SimpleNamespace(schema=SimpleNamespace(multi_hot=("tags",)), named="prepared", rows=lambda split: 9)
    with pytest.raises(UserError, match=r"^--clip-embedding cowclip: column 'tags' of prepared holds lists"):
        check_options(BASE, data)

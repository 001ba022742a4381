"""Penalties and the limit on the gradient's norm, against a plain model whose loss has the penalties written out."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch

from tests.support.samples import draw, read_state, to_batch, write_state
from tests.training.optim.test_optimizers import SIZES, UPDATES, adam, train_sharded
from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.start import check_options

K = 6
BASE = TrainConfig(
    factor_dim=K, over_arch_layer_sizes=(8,), dropout=0.0, init_std=0.3, activation="tanh", dense_lr=0.01,
    sparse_optimizer="adam", sparse_lr=0.03,
)  # fmt: skip


def penalty(model: DeepFMTrain, config: TrainConfig, batch: Batch) -> Tensor:
    """All penalties in words: half the sum of squares of what each is about."""
    total = torch.zeros(())
    features = batch.sparse_features.to_dict()
    for name, weight in model.named_parameters():
        is_table = "embedding_bags" in name
        if is_table or name.endswith("dense_arch.rows"):
            total += config.embedding_l2 / 2 * weight[:, :K].square().sum()
            total += config.linear_l2 / 2 * weight[:, K].square().sum()
        if name.endswith("weight") and "over_arch" in name and "layers.1." not in name:  # 1 is batch normalisation
            total += config.over_arch_l2 / 2 * weight.square().sum()
        if is_table:
            ids = features[name.split(".")[-2].removeprefix("t_")].values().long()
            rows = weight[ids]
            total += config.touched_embedding_l2 / 2 * rows[:, :K].square().sum(1).mean()
            total += config.touched_linear_l2 / 2 * rows[:, K].square().mean()
    return total


def train_plain(model: DeepFMTrain, config: TrainConfig, batches: list[Batch]) -> tuple[dict[str, Tensor], list[float]]:
    """The weights, and the norm of the gradient at each step before it is limited."""
    updates, norms = [], []
    for name, parameter in model.named_parameters():
        is_table = "embedding_bags" in name and len(parameter) > config.data_parallel_rows
        optimizer = UPDATES.get(config.sparse_optimizer, adam) if is_table else adam
        updates.append(optimizer(parameter, config.sparse_lr if is_table else config.dense_lr))
    for batch in batches:
        model.zero_grad()
        (model(batch)[0] + penalty(model, config, batch)).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
        if config.clip_norm and norms[-1] > config.clip_norm:
            for gradient in gradients:
                gradient.mul_(config.clip_norm / norms[-1])
        for update in updates:
            update()
        for name, weight in model.named_parameters():
            if "embedding_bags" in name:
                rate = config.sparse_lr if len(weight) > config.data_parallel_rows else config.dense_lr
                weight.data *= 1 - rate * config.embedding_weight_decay
    return read_state(model), norms


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_parallel_rows": 10},
        {"embedding_l2": 0.3},
        {"linear_l2": 0.5},
        {"over_arch_l2": 0.2, "batch_norm": True},
        {"clip_norm": 0.2},
        {"embedding_l2": 0.3, "linear_l2": 0.1, "over_arch_l2": 0.2, "clip_norm": 0.25, "touched_linear_l2": 0.4},
        {"embedding_l2": 0.3, "sparse_optimizer": "rowwise_adagrad", "data_parallel_rows": 40},
        {"touched_embedding_l2": 3.0, "touched_linear_l2": 2.0, "sparse_optimizer": "rowwise_adagrad"},
        {"touched_embedding_l2": 3.0, "sparse_optimizer": "adagrad", "data_parallel_rows": 10},
        {"touched_linear_l2": 3.0, "sparse_optimizer": "sgd", "over_arch_l2": 0.2},
        {"embedding_weight_decay": 2.0},
        {"embedding_weight_decay": 2.0, "sparse_optimizer": "rowwise_adagrad", "data_parallel_rows": 30},
    ],
    ids=str,
)
def test_a_penalty_is_what_it_adds_to_the_loss(device: torch.device, options: dict[str, object]) -> None:
    config = replace(BASE, **options)  # type: ignore[arg-type]
    sharded = build_model(config, SIZES, 2, device)
    plain = DeepFMTrain(
        DeepFM(
            EmbeddingBagCollection(tables=embedding_tables(SIZES, K)), 2, (8,), K, dropout=0.0, activation=nn.Tanh,
            batch_norm=config.batch_norm,
        )
    )  # fmt: skip
    before = read_state(sharded.model)
    write_state(plain, before)
    batches = [to_batch(draw(16, SIZES, 2, seed=seed), list(SIZES)) for seed in range(5)]
    expected, norms = train_plain(plain, config, batches)
    actual = train_sharded(sharded.model, config, batches)
    for name, weight in expected.items():
        if name.endswith("num_batches_tracked") or (config.batch_norm and name.endswith(("0.bias", "running_mean"))):
            continue  # a bias before batch normalisation has no gradient but rounding, which Adam makes much of
        assert (weight - before[name]).abs().max() > 1e-3, f"{name} did not move"
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
        if "embedding_bags" in name:
            assert not actual[name][:, K + 1 :].any(), "the padding moved"
    if config.clip_norm:
        assert max(norms) > config.clip_norm, "nothing was limited"
    seen = set(torch.cat([batch.sparse_features["big"].values() for batch in batches]).tolist())
    unseen = sorted(set(range(SIZES["big"])) - seen)
    name = next(name for name in actual if "t_big" in name)
    moved = not torch.equal(actual[name][unseen], before[name][unseen])
    assert unseen
    assert moved == bool(config.embedding_l2 or config.embedding_weight_decay), "only these move whole tables"


@pytest.mark.parametrize("option", ["embedding_l2", "linear_l2"])
@pytest.mark.parametrize("sparse_optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_penalty_on_whole_tables_wants_whole_gradients(
    device: torch.device, option: str, sparse_optimizer: str
) -> None:
    config = replace(BASE, sparse_optimizer=sparse_optimizer, data_parallel_rows=30, **{option: 0.1})  # type: ignore[arg-type]
    name = option.replace("_", "-")
    with pytest.raises(UserError) as raised:
        build_model(config, SIZES, 2, device)
    assert str(raised.value) == (
        f"--{name} 0.1: this penalty is on whole tables, but {sparse_optimizer}, which trains t_big, sees only the "
        f"rows of each batch; add --sparse-optimizer adam, or take --touched-{name}"
    )


@pytest.mark.parametrize("option", ["touched_embedding_l2", "touched_linear_l2"])
def test_rows_of_a_bag_have_no_penalty_of_their_own(option: str) -> None:
    data: Any = SimpleNamespace(
        schema=SimpleNamespace(multi_hot=("tags",)), folder="prepared", named="prepared", rows=lambda split: 9
    )
    check_options(BASE, data)
    with pytest.raises(UserError) as raised:
        check_options(replace(BASE, **{option: 0.1}), data)  # type: ignore[arg-type]
    name = option.replace("_", "-")
    assert str(raised.value) == (
        f"--{name}: column 'tags' of prepared holds lists, whose rows are summed before this penalty sees them; take "
        f"--{name.removeprefix('touched-')} with --sparse-optimizer adam"
    )

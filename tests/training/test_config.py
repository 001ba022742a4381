"""The options of a training: their ranges, what is said of a bad one, and the recipes."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import RECIPES, paper, recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"factor_dim": -1}, "--factor-dim -1: must be at least 1"),
        ({"sparse_lr": 0.0}, "--sparse-lr 0.0: must be greater than 0, and finite"),
        ({"sparse_lr": math.nan}, "--sparse-lr nan: must be greater than 0, and finite"),
        ({"sparse_lr": math.inf}, "--sparse-lr inf: must be greater than 0, and finite"),
        ({"activation": "elu"}, "--activation elu: choose one of relu, tanh, sigmoid, gelu, silu"),
        ({"dense_lr": -0.5}, "--dense-lr -0.5: must be greater than 0, and finite"),
        ({"decay_power": 0.0}, "--decay-power 0.0: must be greater than 0, and finite"),
        ({"init_std": 0.0}, "--init-std 0.0: must be greater than 0, and finite"),
        ({"eval_every": -1}, "--eval-every -1: must not be negative"),
        ({"data_parallel_rows": -1}, "--data-parallel-rows -1: must not be negative"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"keep_last": 0}, "--keep-last 0: must be at least 1"),
        ({"checkpoint_every": -1}, "--checkpoint-every -1: must not be negative"),
        ({"patience": -1}, "--patience -1: must not be negative"),
        ({"lr_patience": -2}, "--lr-patience -2: must not be negative"),
        ({"lr_factor": 1.0}, "--lr-factor 1.0: the factor of the rates must lie between 0 and 1"),
        ({"lr_factor": 0.0}, "--lr-factor 0.0: the factor of the rates must lie between 0 and 1"),
        ({"metric": "ne"}, "--metric ne: choose one of auc, logloss, auc-logloss"),
        ({"sparse_optimizer": "lamb"}, "--sparse-optimizer lamb: choose one of rowwise_adagrad, adagrad, sgd, adam"),
        ({"embedding_l2": -0.1}, "--embedding-l2 -0.1: must be 0 (off) or greater, and finite"),
        ({"linear_l2": math.nan}, "--linear-l2 nan: must be 0 (off) or greater, and finite"),
        ({"touched_embedding_l2": -1.0}, "--touched-embedding-l2 -1.0: must be 0 (off) or greater, and finite"),
        ({"touched_linear_l2": math.inf}, "--touched-linear-l2 inf: must be 0 (off) or greater, and finite"),
        (
            {"embedding_weight_decay": 20.0, "sparse_lr": 0.05},
            "--embedding-weight-decay 20.0: times the rate it must be below 1; take less, such as 0.1",
        ),
        (
            {"embedding_weight_decay": -0.1},
            "--embedding-weight-decay -0.1: must be 0 (off) or greater, and finite",
        ),
        ({"over_arch_l2": -1e-9}, "--over-arch-l2 -1e-09: must be 0 (off) or greater, and finite"),
        ({"clip_norm": math.nan}, "--clip-norm nan: must be 0 (off) or greater, and finite"),
        ({"ema": 1.0}, "--ema 1.0: the decay of a moving average lies in [0, 1), such as 0.99; 0 for none"),
        ({"ema": -0.5}, "--ema -0.5: the decay of a moving average lies in [0, 1), such as 0.99; 0 for none"),
        ({"ema": math.nan}, "--ema nan: the decay of a moving average lies in [0, 1), such as 0.99; 0 for none"),
        ({"ema_every": 0}, "--ema-every 0: must be at least 1"),
        (
            {"ema_every": 3},
            "--ema-every 3: needs a moving average; add --ema, such as 0.99, or leave the option out",
        ),
        (
            {"ema": 0.9, "ema_every": 10},
            "--ema-every 10: the average of --ema 0.9 reaches back 10 steps; take fewer between two updates",
        ),
        (
            {"ema": 0.995, "ema_every": 900},
            "--ema-every 900: the average of --ema 0.995 reaches back 200 steps; take fewer between two updates",
        ),
        (
            {"ema": 0.9, "ema_every": 5, "eval_every": 4},
            "--ema-every 5: --eval-every 4 would evaluate before the first update; take at most as many",
        ),
        ({"dropout": 1.0}, "--dropout 1.0: the probability of dropping a unit lies in [0, 1)"),
        ({"dropout": -0.1}, "--dropout -0.1: the probability of dropping a unit lies in [0, 1)"),
        ({"dropout": math.nan}, "--dropout nan: the probability of dropping a unit lies in [0, 1)"),
        (
            {"warmup": 0.6, "decay": 0.5},
            "--warmup 0.6 --decay 0.5: these are shares of the training, together at most 1",
        ),
        (
            {"warmup": -0.1},
            "--warmup -0.1 --decay 0.0: these are shares of the training, together at most 1",
        ),
        (
            {"decay": math.nan},
            "--warmup 0.0 --decay nan: these are shares of the training, together at most 1",
        ),
    ],
    ids=str,
)
def test_a_value_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as raised:
        TrainConfig(**options)  # type: ignore[arg-type]
    assert str(raised.value) == message
    with pytest.raises(UserError):
        dataclasses.replace(paper(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor_dim": "20"}, "--factor-dim '20': must be a whole number"),
        ({"factor_dim": 20.0}, "--factor-dim 20.0: must be a whole number"),
        ({"seed": True}, "--seed True: must be a whole number"),
        ({"embedding_l2": None}, "--embedding-l2 None: must be a number"),
        ({"dropout": False}, "--dropout False: must be a number"),
        ({"ema": "0.9"}, "--ema '0.9': must be a number"),
        ({"clip_norm": 10**400}, f"--clip-norm 1{'0' * 59}: must be a number"),
        ({"batch_norm": "no"}, "--batch-norm 'no': must be True or False"),
        ({"batch_norm": 1}, "--batch-norm 1: must be True or False"),
        ({"precision": None}, "--precision None: must be one of float32, medium, bf16"),
        ({"metric": ["auc"]}, "--metric ['auc']: must be one of auc, logloss, auc-logloss"),
        ({"over_arch_layer_sizes": 64}, "--over-arch-layer-sizes 64: must be a tuple of whole numbers"),
        ({"over_arch_layer_sizes": (64, "a")}, "--over-arch-layer-sizes 'a': must be a whole number"),
        (
            {"over_arch_layer_sizes": np.ones((2, 2))},
            "--over-arch-layer-sizes array([[1., 1.], [1., 1.]]): must be a tuple of whole numbers",
        ),
        ({"terms": "fm"}, "--terms 'fm': must be a tuple of names: linear, fm, deep"),
        ({"terms": (1,)}, "--terms 1: must be one of linear, fm, deep"),
        ({"qcomms": {"fp16"}}, "--qcomms {'fp16'}: must be a tuple of names: fp32, fp16, bf16"),
    ],
    ids=str,
)
def test_a_value_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        TrainConfig(**options)
    assert str(raised.value) == message


def test_what_stands_for_a_type_is_taken_as_it() -> None:
    given: dict[str, Any] = {"factor_dim": np.int64(7), "dropout": 0, "ema": np.float32(0.5), "terms": ["fm"]}
    config = TrainConfig(**given, over_arch_layer_sizes=[8, np.int32(4)])  # type: ignore[arg-type]
    assert (config.factor_dim, config.dropout, config.ema) == (7, 0.0, 0.5)
    assert (config.terms, config.over_arch_layer_sizes) == (("fm",), (8, 4))
    json.dumps(dataclasses.asdict(config))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    lowest = {"epochs": 1, "batch_size": 1, "factor_dim": 1, "eval_every": 0, "data_parallel_rows": 0, "seed": 0}
    average = {"ema": 0.9, "ema_every": 9, "eval_every": 9}
    for options in (
        lowest,
        {"dropout": 0.0},
        {"dropout": 0.999},
        {"warmup": 0.0, "decay": 1.0},
        {"warmup": 1.0},
        average,
    ):
        config = TrainConfig(**options)  # type: ignore[arg-type]
        assert {name: getattr(config, name) for name in options} == options


def test_the_default_is_the_paper() -> None:
    """Section 3.1 of arXiv 1703.04247: K = 10, 400-400-400, dropout 0.5, ReLU; Adam's rate is Adam's own."""
    config = TrainConfig()
    assert recipe("paper") == config
    assert (config.factor_dim, config.over_arch_layer_sizes, config.dropout) == (10, (400, 400, 400), 0.5)
    assert (config.activation, config.dense_lr, config.terms) == ("relu", 1e-3, ("linear", "fm", "deep"))


def test_recipes_by_name() -> None:
    names = [
        "paper",
        "d2l",
        "criteo-x1",
        "criteo-x4",
        "frappe-x1",
        "criteo-terabyte",
        "small-table",
        "synthetic",
        "smoke",
    ]
    assert list(RECIPES) == names
    for name, make in RECIPES.items():
        assert recipe(name) == make()
        assert make.__doc__, f"the recipe {name} does not say where its values come from"
    with pytest.raises(UserError) as raised:
        recipe("papers")
    assert str(raised.value).startswith("--recipe papers: unknown recipe; choose one of paper, d2l, ")
    assert str(raised.value).endswith(" (did you mean 'paper'?), or give FILE.py:FUNCTION")


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().dropout = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainConfig(10)  # type: ignore[misc]

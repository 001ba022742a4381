"""Who stands in the quality table, with which settings on which data set. No benchmark itself.

Ours train by a recipe and changes on top of it. Each peer stands there twice where it can: with the settings that its
authors publish or that its code has as defaults ("its own"), and with those of our DeepFM, as far as it has them
("as ours": width of the latent vectors, MLP, dropout, batch normalisation, whole-table L2, rates, batch, epochs and
patience). No peer has a moving average of the weights or an L2 of its own for the first-order weights.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe

OURS = ("LR", "FM", "DNN", "FM & DNN", "DeepFM")
TERMS = {"LR": ("linear",), "FM": ("linear", "fm"), "DNN": ("deep",)}
SKLEARN = "scikit-learn logistic regression"
FUXICTR, DEEPCTR, TORCHREC = "FuxiCTR DeepFM", "DeepCTR-Torch DeepFM", "TorchRec SimpleDeepFMNN"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    ``worker`` and ``environment`` are those of ``training_jobs.Job``. ``repeats`` is False where nothing is random.
    """

    model: str
    worker: str
    settings: dict[str, Any]
    environment: str = ""
    repeats: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Our settings on a data set: a recipe, changes for all our models, and more for some of them."""

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    of_model: dict[str, dict[str, Any]] = field(default_factory=dict)


# Without an MLP an epoch takes a few seconds and brings little.
_LONG = {"epochs": 60, "patience": 8}
# Chosen on validation splits alone.
PLANS = {
    "frappe": Plan(
        recipe="frappe-x1",
        of_model={
            # Without an MLP a penalty of 0.02 keeps the latent vectors at zero, a saddle point of the pairs.
            "FM": _LONG | {"embedding_l2": 1e-4, "linear_l2": 1e-3, "sparse_lr": 3e-3, "dense_lr": 3e-3},
            "LR": _LONG | {"linear_l2": 1e-5, "sparse_lr": 2e-2, "dense_lr": 2e-2},
        },
    ),
    # The recipe synthetic is made for three quick epochs over four times the rows.
    "synthetic": Plan(
        recipe="criteo-x1",
        changes={"ema": 0.99, "init_std": 0.01, "lr_patience": 0, "epochs": 30},
        of_model={
            "LR": {"sparse_lr": 5e-3, "dense_lr": 5e-3},
            "FM": {"sparse_lr": 5e-3, "dense_lr": 5e-3},
        },
    ),
    "criteo-sample": Plan(
        recipe="paper",
        changes={
            "sparse_optimizer": "adam",
            "sparse_lr": 1e-3,
            "embedding_l2": 0.06,
            "linear_l2": 1e-3,
            "ema": 0.99,
            "batch_size": 256,
            "epochs": 40,
            "patience": 4,
        },
    ),
}
# The BARS leaderboard's DeepFM on Frappe_x1 (reczoo/BARS, DeepFM_frappe_x1_001_4ae3a56e). Elsewhere its settings
# for Criteo_x1 stand in, those of our recipe criteo-x1.
_BARS_FRAPPE = {
    "embedding_dim": 10,
    "hidden_units": [400, 400, 400],
    "dropout": 0.2,
    "batch_norm": True,
    "init_std": 1e-4,
    "embedding_l2": 0.05,
    "learning_rate": 1e-3,
    "batch_size": 4096,
    "epochs": 100,
    "patience": 2,
}
# The defaults of its classes and of fit; how long to train it leaves to the user.
_DEEPCTR = {
    "embedding_dim": 4,
    "hidden_units": [256, 128],
    "dropout": 0.0,
    "batch_norm": False,
    "init_std": 1e-4,
    "l2": 1e-5,
    "learning_rate": 1e-3,
    "batch_size": 256,
    "epochs": 100,
    "patience": 2,
}
QUICK = {"over_arch_layer_sizes": (8,), "factor_dim": 4, "epochs": 1, "batch_size": 256}


def our_config(data: str, model: str, *, precision: str, quick: bool) -> tuple[str, dict[str, Any]]:
    """Return the recipe of one of our models on a data set and what is changed on top of it."""
    plan = PLANS[data]
    changes: dict[str, Any] = {**plan.changes, **plan.of_model.get(model, {}), "precision": precision}
    if model in TERMS:
        changes["terms"] = TERMS[model]
    return plan.recipe, changes | (QUICK if quick else {})


def rows(data: str, *, precision: str, peers: bool, quick: bool = False) -> list[Row]:
    """List the rows of the table of a data set.

    Args:
        data: Its name.
        precision: Of all matrix products, ours and the peers'.
        peers: Whether those that need an environment of their own are in it.
        quick: Tiny models, one epoch: to see that it runs.

    Returns:
        Ours first.
    """
    found = []
    for model in OURS:
        name, changes = our_config(data, model, precision=precision, quick=quick)
        settings = {"model": model, "recipe": name, "changes": changes}
        found.append(Row(model=model, worker="train_deepfm", settings=settings))
    name, changes = our_config(data, "DeepFM", precision=precision, quick=quick)
    ours = replace(recipe(name), **changes)
    strengths = [0.1] if quick else [0.03, 0.1, 0.3, 1.0, 3.0]
    found.append(
        Row(
            model=SKLEARN,
            worker="train_sklearn",
            settings={"C": strengths, "max_iter": 1000},
            repeats=False,
        )
    )
    short = {"epochs": 1, "hidden_units": [8]} if quick else {}
    bars = _BARS_FRAPPE if data == "frappe" else _as_ours(recipe("criteo-x1"))
    bars = bars | {"precision": precision} | short
    torchrec = _simple(ours) | {"precision": precision}
    of_peers = [
        (FUXICTR, "its own", "train_fuxictr", bars, "fuxictr-models"),
        (FUXICTR, "as ours", "train_fuxictr", _as_ours(ours), "fuxictr-models"),
        (
            DEEPCTR,
            "its own",
            "train_deepctr",
            _DEEPCTR | {"precision": precision} | short,
            "deepctr",
        ),
        (DEEPCTR, "as ours", "train_deepctr", _as_ours(ours), "deepctr"),
        (TORCHREC, "as is", "train_simple_deepfm", torchrec | {"loss": "as is"}, ""),
        (TORCHREC, "loss mended", "train_simple_deepfm", torchrec | {"loss": "mended"}, ""),
    ]
    for model, which, worker, settings, environment in of_peers:
        if peers or not environment:
            found.append(Row(model=f"{model}, {which}", worker=worker, settings=settings, environment=environment))
    return found


def _as_ours(config: TrainConfig) -> dict[str, Any]:
    """Our settings in the peers' words.

    A peer ends by patience where ours has a schedule for a fixed number of epochs.
    """
    return {
        "embedding_dim": config.factor_dim,
        "hidden_units": list(config.over_arch_layer_sizes),
        "dropout": config.dropout,
        "batch_norm": config.batch_norm,
        "init_std": config.init_std,
        "embedding_l2": config.embedding_l2,  # FuxiCTR's word
        "l2": config.embedding_l2 * config.batch_size / 2,  # DeepCTR-Torch's, see there
        "learning_rate": config.dense_lr,
        "batch_size": config.batch_size,
        "epochs": config.epochs if config.patience else 3 * config.epochs,
        "patience": config.patience or 2,
        "precision": config.precision,
    }


def _simple(config: TrainConfig) -> dict[str, Any]:
    """The same for SimpleDeepFMNN, whose deep part is one layer: as wide as our first."""
    width = config.over_arch_layer_sizes[0]
    return _as_ours(config) | {"hidden_layer_size": width, "deep_fm_dimension": width}

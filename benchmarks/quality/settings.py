"""The models of the quality table and their settings on each data set.

This project's models train by a recipe and changes to it. Each peer runs twice where possible: with the settings that
its authors publish or its code has as defaults, and with those of DeepFM as far as it has them ("same settings": width
of the latent vectors, MLP, dropout, batch normalisation, whole-table L2, rates, batch, epochs and patience). No peer
has a moving average of the weights or a separate L2 for the first-order weights.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality.write_tables import TORCHREC_DEEPFM
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe

TERMS = {"LR": ("linear",), "FM": ("linear", "fm"), "DNN": ("deep",)}
SKLEARN = "scikit-learn logistic regression"
FUXICTR, DEEPCTR, TORCHREC = "FuxiCTR DeepFM", "DeepCTR-Torch DeepFM", "TorchRec SimpleDeepFMNN"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    ``worker`` and ``environment`` are those of ``training_jobs.Job``. ``repeats`` is False if nothing is random.
    """

    model: str
    worker: str
    settings: dict[str, Any]
    environment: str = ""
    repeats: bool = True


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """This project's settings on a data set: a recipe, changes for all models, and more changes for some of them."""

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    of_model: dict[str, dict[str, Any]] = field(default_factory=dict)


# Without an MLP an epoch takes a few seconds and changes little.
_LONG = {"epochs": 60, "patience": 8}
# Chosen on validation splits alone.
DATA_SETTINGS = {
    "frappe": DataSettings(
        recipe="frappe-x1",
        of_model={
            # Without an MLP a penalty of 0.02 keeps the latent vectors at zero, a saddle point of the pairs.
            "FM": _LONG | {"embedding_l2": 1e-4, "linear_l2": 1e-3, "sparse_lr": 3e-3, "dense_lr": 3e-3},
            "LR": _LONG | {"linear_l2": 1e-5, "sparse_lr": 2e-2, "dense_lr": 2e-2},
        },
    ),
    # The recipe synthetic is made for three quick epochs over four times the rows.
    "synthetic": DataSettings(
        recipe="criteo-x1",
        changes={"ema": 0.99, "init_std": 0.01, "lr_patience": 0, "epochs": 30},
        of_model={
            "LR": {"sparse_lr": 5e-3, "dense_lr": 5e-3},
            "FM": {"sparse_lr": 5e-3, "dense_lr": 5e-3},
        },
    ),
    "criteo-sample": DataSettings(
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
# The BARS leaderboard's DeepFM on Frappe_x1 (reczoo/BARS, DeepFM_frappe_x1_001_4ae3a56e). The other data sets use its
# settings for Criteo_x1, those of the recipe criteo-x1.
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
# The defaults of its classes and of fit; epochs and patience have none.
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


def deepfm_config(data: str, model: str, *, precision: str, quick: bool) -> tuple[str, dict[str, Any]]:
    """Return the recipe of one of this project's models on a data set, and the changes to it."""
    settings = DATA_SETTINGS[data]
    changes: dict[str, Any] = {**settings.changes, **settings.of_model.get(model, {}), "precision": precision}
    if model in TERMS:
        changes["terms"] = TERMS[model]
    return settings.recipe, changes | (QUICK if quick else {})


def rows(data: str, *, precision: str, peers: bool, quick: bool = False) -> list[Row]:
    """List the rows of the table of a data set.

    Args:
        data: Its name.
        precision: Of all matrix products.
        peers: Include the peers that need another environment.
        quick: Tiny models, one epoch, as a check.

    Returns:
        The rows, this project's models first.
    """
    found = []
    for model in TORCHREC_DEEPFM:
        name, changes = deepfm_config(data, model, precision=precision, quick=quick)
        settings = {"model": model, "recipe": name, "changes": changes}
        found.append(Row(model=model, worker="train_deepfm", settings=settings))
    name, changes = deepfm_config(data, "DeepFM", precision=precision, quick=quick)
    deepfm = replace(recipe(name), **changes)
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
    bars = _BARS_FRAPPE if data == "frappe" else _peer_settings(recipe("criteo-x1"))
    bars = bars | {"precision": precision} | short
    torchrec = _simple_deepfm_settings(deepfm) | {"precision": precision}
    default = _DEEPCTR | {"precision": precision} | short
    of_peers = [
        (FUXICTR, "published settings", "train_fuxictr", bars, "fuxictr-models"),
        (FUXICTR, "same settings", "train_fuxictr", _peer_settings(deepfm), "fuxictr-models"),
        (DEEPCTR, "default settings", "train_deepctr", default, "deepctr"),
        (DEEPCTR, "same settings", "train_deepctr", _peer_settings(deepfm), "deepctr"),
        (TORCHREC, "unchanged", "train_simple_deepfm", torchrec | {"loss": "as is"}, ""),
        (TORCHREC, "loss corrected", "train_simple_deepfm", torchrec | {"loss": "fixed"}, ""),
    ]
    for model, variant, worker, settings, environment in of_peers:
        if peers or not environment:
            found.append(Row(model=f"{model}, {variant}", worker=worker, settings=settings, environment=environment))
    return found


def _peer_settings(config: TrainConfig) -> dict[str, Any]:
    """Translate DeepFM's settings to the peers' names.

    A peer stops by patience where the recipe has a fixed number of epochs.
    """
    return {
        "embedding_dim": config.factor_dim,
        "hidden_units": list(config.over_arch_layer_sizes),
        "dropout": config.dropout,
        "batch_norm": config.batch_norm,
        "init_std": config.init_std,
        "embedding_l2": config.embedding_l2,  # FuxiCTR
        "l2": config.embedding_l2 * config.batch_size / 2,  # DeepCTR-Torch, see train_deepctr
        "learning_rate": config.dense_lr,
        "batch_size": config.batch_size,
        "epochs": config.epochs if config.patience else 3 * config.epochs,
        "patience": config.patience or 2,
        "precision": config.precision,
    }


def _simple_deepfm_settings(config: TrainConfig) -> dict[str, Any]:
    """Add SimpleDeepFMNN's names; its deep part is one layer, as wide as DeepFM's first."""
    width = config.over_arch_layer_sizes[0]
    return _peer_settings(config) | {"hidden_layer_size": width, "deep_fm_dimension": width}

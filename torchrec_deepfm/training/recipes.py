"""The named recipes: sets of options and the source of each value. Standard library only.

A recipe is a function that returns a ``TrainConfig``. The command line takes one by name (``train --recipe paper``) and
any field of it as an option on top (``--dropout 0.2``); ``python -m torchrec_deepfm recipes`` lists them. Write
your own in a Python file, such as ``mine.py``, for ``train --recipe mine.py:wider``:

    from dataclasses import replace
    from torchrec_deepfm.training.recipes import criteo_x1

    def wider():
        return replace(criteo_x1(), factor_dim=20, dropout=0.2)
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.data.criteo_defaults import MLPERF_NUM_EMBEDDINGS
from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.training.config import TrainConfig


def paper() -> TrainConfig:
    """The settings of the DeepFM paper for Criteo.

    arXiv 1703.04247, section 3.1: latent vectors of 10, three hidden layers of 400, ReLU, dropout 0.5, Adam. The paper
    names no batch size, rate or number of epochs. Here Adam at 1e-3 trains the dense part and row-wise Adagrad the
    tables, since the kernels for large tables have no Adam on CPU; 2,048 samples per step and rank.
    """
    return TrainConfig()


def d2l() -> TrainConfig:
    """The DeepFM of the textbook Dive into Deep Learning.

    Section "Deep Factorization Machines" of d2l.ai (chapter_recommender-systems/deepfm.md): 10 factors, an MLP of
    30-20-10, dropout 0.1, Adam at 0.01 on everything, batches of 2,048, 30 epochs, no regulariser. Its data are a small
    advertising log of categorical columns. All weights start by Xavier there; here tables start by a normal of 0.01.
    """
    return TrainConfig(
        factor_dim=10,
        over_arch_layer_sizes=(30, 20, 10),
        dropout=0.1,
        sparse_optimizer="adam",
        sparse_lr=0.01,
        dense_lr=0.01,
        batch_size=2048,
        epochs=30,
    )


def _fuxictr(**values: object) -> TrainConfig:
    """The settings that FuxiCTR 1.0 and 1.1 use in every run of BARS.

    fuxictr/pytorch/models/base_model.py: Adam at 1e-3 on everything; rates x 0.1 after each evaluation without
    improvement, an end after ``patience`` of them, the best weights kept; gradients clipped at a norm of 10; embeddings
    drawn with a deviation of 1e-4; ``embedding_regularizer`` is lambda / 2 ||.||^2 of whole tables and of the
    first-order weights, which are embeddings of width 1 there. 100 epochs are more than any run needs.
    """
    common = {
        "sparse_optimizer": "adam",
        "sparse_lr": 1e-3,
        "dense_lr": 1e-3,
        "init_std": 1e-4,
        "clip_norm": 10.0,
        "epochs": 100,
        "patience": 2,
        "lr_patience": 1,
        "lr_factor": 0.1,
    }
    return TrainConfig(**(common | values))  # type: ignore[arg-type]


def criteo_x1() -> TrainConfig:
    """BARS' DeepFM on Criteo_x1: test AUC 0.8138, log loss 0.4380.

    reczoo/BARS, ranking/ctr/DeepFM/DeepFM_criteo_x1, experiment DeepFM_criteo_x1_001_4b788fed (mean of five runs
    0.813812 / 0.438033): dimension 10, 400-400-400 with batch normalisation, dropout 0.1, regulariser 1e-5, batches of
    4,096, evaluated by AUC. The log of its first run ends after 15 epochs. Adam at 1e-3, the plateau rule, clipping and
    initial values are FuxiCTR's (v1.1.0).
    """
    return _fuxictr(
        factor_dim=10,
        over_arch_layer_sizes=(400, 400, 400),
        batch_norm=True,
        dropout=0.1,
        embedding_l2=1e-5,
        linear_l2=1e-5,
        batch_size=4096,
        metric="auc",
    )


def criteo_x4() -> TrainConfig:
    """BARS' DeepFM on Criteo_x4: test AUC 0.8143, log loss 0.4376.

    reczoo/BARS, ranking/ctr/DeepFM/DeepFM_criteo_x4_001, experiment DeepFM_criteo_x4_024_626165ea (0.814332 /
    0.437584): dimension 16, five layers of 1,000, no batch normalisation, dropout 0.2, regulariser 1e-5, batches of
    10,000, evaluated by AUC minus log loss. Its log ends after 10 epochs. The rest is FuxiCTR's (v1.0.2), as in
    ``criteo-x1``.
    """
    return _fuxictr(
        factor_dim=16,
        over_arch_layer_sizes=(1000,) * 5,
        dropout=0.2,
        embedding_l2=1e-5,
        linear_l2=1e-5,
        batch_size=10_000,
        metric="auc-logloss",
    )


def frappe_x1() -> TrainConfig:
    """DeepFM on Frappe_x1, past BARS' own: validation AUC 0.988 where its settings give 0.985.

    BARS' DeepFM (reczoo/BARS, DeepFM_frappe_x1_001_4ae3a56e: test AUC 0.9842, log loss 0.1482) has dimension 10,
    400-400-400 with batch normalisation, dropout 0.2, regulariser 0.05, batches of 4,096, Adam at 1e-3. From there, by
    experiment on the validation split alone (docs/results.md): a moving average of the weights at a constant rate, and
    evaluations with it; dimension 40, for the pairs of user and item; and a regulariser of 0.02, which needs a dozen
    epochs where 0.05 needs 30. Other dimensions, dropouts, rates and batch sizes gave no improvement.
    """
    return TrainConfig(
        factor_dim=40,
        over_arch_layer_sizes=(400, 400, 400),
        batch_norm=True,
        dropout=0.2,
        sparse_optimizer="adam",
        sparse_lr=1e-3,
        dense_lr=1e-3,
        embedding_l2=0.02,
        linear_l2=0.02,
        ema=0.995,
        batch_size=4096,
        epochs=40,
        patience=3,
        metric="auc",
    )


def criteo_terabyte() -> TrainConfig:
    """DeepFM at the size and the schedule of MLPerf's DLRM-DCNv2: 204 million rows of 128 numbers, one epoch.

    mlcommons/training, recommendation_v2/torchrec_dlrm (README): Adagrad at 0.005 with neither warm-up nor decay, one
    epoch, 65,536 samples per step on 8 ranks, rows of 128, over arch 1024-1024-512-256, an evaluation each twentieth of
    the epoch. A packed row of 128 holds a latent vector of 127 and the first-order weight. MLPerf's 26 table sizes come
    with ``prepare --schema criteo-terabyte --hash``.

    Different from MLPerf: Adam at 1e-3 trains everything except the tables, where MLPerf uses Adagrad for all; one
    value per field, not MLPerf's synthetic multi-hot lists; and an FM instead of a DCN. The README's target is an AUC
    of 0.8030; nobody has published DeepFM's. On other than 8 ranks give ``--batch-size`` to keep the size of the step.
    """
    return TrainConfig(
        factor_dim=127,
        over_arch_layer_sizes=(1024, 1024, 512, 256),
        dropout=0.0,
        sparse_optimizer="adagrad",
        sparse_lr=0.005,
        dense_lr=1e-3,
        batch_size=8192,
        epochs=1,
        eval_every=3200,
        checkpoint_every=6400,
    )


def smoke() -> TrainConfig:
    """A run of a few seconds that checks an installation, not quality.

    A small MLP, small batches, one epoch; chosen for speed.
    """
    return TrainConfig(over_arch_layer_sizes=(32, 32), dropout=0.0, batch_size=256)


def synthetic() -> TrainConfig:
    """The recipe of ``make train``: the synthetic set, whose best reachable AUC is known.

    Found by experiment on that set (docs/results.md), learnt within a few minutes. Criteo-like data want a wider MLP;
    start from ``paper`` there.
    """
    return TrainConfig(
        over_arch_layer_sizes=(128, 64),
        dropout=0.0,
        epochs=3,
        batch_size=1024,
        sparse_lr=0.05,
        dense_lr=3e-3,
        warmup=0.05,
        decay=0.95,
        decay_power=1.0,
    )


_ADAM_IDS: Final = 200_000  # rows of all tables up to which small-table takes Adam, which steps on all of them
_PRIOR: Final = 25.0  # L2 times training rows: a Gaussian prior of variance 1 / 25 on the weights of the tables
_PATIENCE: Final = 600  # steps without an improvement that end a training
_FEW: Final = 5_000  # training rows, fewer than in any set of the search


def small_table(
    rows: int = 100_000,
    *,
    ids: int = 0,
    validation: bool = True,
    ranks: int = 1,
    multi_hot: bool = False,
    whole: bool | None = None,
) -> TrainConfig:
    """Tables of fewer than a million rows: many steps, L2 by the number of rows, a moving average, an early stop.

    What ``train``, ``fit`` and ``DeepFMClassifier`` take by default, with rows, ids and ranks read off the data. Up to
    200,000 ``ids``, Adam trains the ``whole`` tables on every rank, with an L2 of 25 over the rows: a Gaussian
    prior of one variance. At least 256 steps per epoch as far as global batches of 64 rows allow. With a
    ``validation`` split, up to 20 epochs, until two in a row are not better; with fewer steps per epoch up to 40, until
    600 steps (at most 10 epochs) are not better, since factors of products leave zero late. Chosen by a search on the
    validation splits of Frappe, MovieLens 100K, the Criteo sample and generated products (docs/results.md).

    With more ids, or where ``recipe_for`` finds that Adam does not fit the options, row-wise Adagrad: 64 steps and an
    L2 on looked-up rows, which does not fit columns of lists (``multi_hot``); below 5,000 rows an MLP of 64-32 without
    average and penalty, by hand.
    """
    whole = ids <= _ADAM_IDS if whole is None else whole
    batch = 64
    while batch < 2048 and 2 * batch * (256 if whole else 64) <= rows:
        batch *= 2
    batch = max(min(batch, rows) // ranks, 1)
    epochs, patience = (20, 2) if validation else (3, 0)
    config = TrainConfig(epochs=epochs, patience=patience, batch_size=batch, dropout=0.2)
    if whole:
        if validation:
            patience = min(max(math.ceil(_PATIENCE * batch * ranks / max(rows, 1)), patience), 10)
            config = replace(config, epochs=max(4 * patience, epochs), patience=patience)
        penalty = _PRIOR / max(rows, 1)
        return replace(
            config, sparse_optimizer="adam", sparse_lr=1e-3, ema=0.99, embedding_l2=penalty, linear_l2=penalty
        )
    if rows < _FEW:
        return replace(config, over_arch_layer_sizes=(64, 32), sparse_lr=0.005)
    return replace(config, sparse_lr=0.02, ema=0.99, touched_embedding_l2=0.0 if multi_hot else 0.05)


SMALL_TABLE: Final = 1_000_000  # training rows, and rows of all tables, below which small-table is the default

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "paper": paper,
    "d2l": d2l,
    "criteo-x1": criteo_x1,
    "criteo-x4": criteo_x4,
    "frappe-x1": frappe_x1,
    "criteo-terabyte": criteo_terabyte,
    "small-table": small_table,
    "synthetic": synthetic,
    "smoke": smoke,
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The published data that a recipe is made for, and the number of ranks.

    ``prepare`` is the command that writes ``folder``, after ``python -m torchrec_deepfm``. ``numeric`` counts the
    columns that stay numbers, ``fields`` all.
    """

    prepare: str
    folder: str
    train_rows: int
    table_rows: int
    numeric: int
    fields: int
    ranks: int = 1


def _files(schema: str, folder: str) -> str:
    return f"prepare --schema {schema} --input train.csv --validation valid.csv --test test.csv --output data/{folder}"


# Rows of the tables: of x1 and x4 as BARS' logs imply them. DeepFM_criteo_x1 has 23,429,477 parameters, of which its
# MLP takes 480,001; each word and each number has 11 of the rest. LR_criteo_x4_001 has 910,709: a word each, a bias.
DATA: dict[str, DataSet] = {
    "criteo-x1": DataSet(
        prepare=_files("criteo-x1", "criteo_x1"),
        folder="data/criteo_x1",
        train_rows=33_003_326,
        table_rows=2_086_303,
        numeric=13,
        fields=39,
    ),
    "criteo-x4": DataSet(
        prepare=_files("criteo-x4", "criteo_x4"),
        folder="data/criteo_x4",
        train_rows=36_672_493,
        table_rows=910_708,
        numeric=0,
        fields=39,
    ),
    "frappe-x1": DataSet(
        prepare=_files("frappe-x1", "frappe_x1"),
        folder="data/frappe_x1",
        train_rows=202_027,
        table_rows=5_392,  # 5,382 ids and an unseen one for each column
        numeric=0,
        fields=10,
    ),
    "criteo-terabyte": DataSet(
        prepare="prepare --schema criteo-terabyte --hash --input DAYS --output data/terabyte",
        folder="data/terabyte",
        train_rows=4_195_197_692,
        table_rows=sum(MLPERF_NUM_EMBEDDINGS),
        numeric=13,
        fields=39,
        ranks=8,
    ),
}


def recipe_for(
    name: str | None,
    options: Mapping[str, Any],
    *,
    rows: int,
    ids: int,
    validation: bool,
    ranks: int = 1,
    multi_hot: bool = False,
    fused: bool = False,
) -> TrainConfig:
    """Look up a recipe for the data that it is to train on, and take the options on top.

    Without a name ``small-table`` below ``SMALL_TABLE`` training rows and ids of all tables, else ``paper``.
    ``small-table`` has row-wise Adagrad where the options name ``sparse_lr`` or ``data_parallel_rows``, but no
    optimizer; and where only a ``fused`` optimizer can be.
    """
    if name is None and max(rows, ids) < SMALL_TABLE:
        name = "small-table"
    if name != "small-table":
        return replace(recipe(name or "paper"), **options)
    # A rate without an optimizer is meant for row-wise Adagrad, the default of the options: Adam's are far smaller.
    whole = False if fused or "sparse_lr" in options or options.get("data_parallel_rows") else None
    if "sparse_optimizer" in options:
        whole = options["sparse_optimizer"] == "adam"
    config = small_table(rows, ids=ids, validation=validation, ranks=ranks, multi_hot=multi_hot, whole=whole)
    return replace(config, **options)


def recipe(name: str) -> TrainConfig:
    """Look up a named recipe, or load one from a file.

    Args:
        name: one of ``RECIPES``; or ``path/to/file.py:function``, whose file is executed as Python.

    Returns:
        Its configuration.

    Raises:
        UserError: the recipe is unknown, or its function does not return a ``TrainConfig``.

    Example:
        >>> recipe("paper").over_arch_layer_sizes
        (400, 400, 400)
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _load_recipe_file(name, Path(path), function)
    if name not in RECIPES:
        raise UserError(
            "unknown recipe",
            where=f"--recipe {name}",
            remedy=f"choose {one_of(RECIPES, name)}, or give FILE.py:FUNCTION",
        )
    return RECIPES[name]()


def recipe_line(name: str) -> str:
    """Return the summary of a named recipe, in one line."""
    return (inspect.getdoc(RECIPES[name]) or "").partition("\n")[0].replace("``", "")


def _load_recipe_file(name: str, path: Path, function: str) -> TrainConfig:
    if not path.is_file():
        raise UserError(f"no file {path}", where=f"--recipe {name}", remedy="name a Python file and a function in it")
    spec = importlib.util.spec_from_file_location("own_recipe", path)
    assert spec is not None
    assert spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        made = make() if callable(make) else None
    except UserError as error:
        raise error.within(f"--recipe {name}") from error
    except (Exception, SystemExit) as error:  # anything that the user's code raises
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the file could not be run ({what})", where=f"--recipe {name}", remedy="correct it") from error
    if make is None:
        raise UserError(
            f"{path} has no {function!r}", where=f"--recipe {name}", remedy="name a function that returns a TrainConfig"
        )
    if type(made) is not TrainConfig:  # a subclass may have fields that are not options
        shown = " ".join(repr(made).split())
        raise UserError(
            f"{function} returns {shown:.60}", where=f"--recipe {name}", remedy="it must return a TrainConfig"
        )
    return made

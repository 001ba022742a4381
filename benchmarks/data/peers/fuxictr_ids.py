"""Checks that the ids of ``prepare`` are FuxiCTR's, on the layouts of its benchmarks.

    python -m benchmarks.data.peers.fuxictr_ids
    python -m benchmarks.data.peers.fuxictr_ids --rows 1000000

For Criteo_x4 and Criteo_x1 it writes train.csv, valid.csv and test.csv of random rows (with missing cells, negative and
large numbers, rare and new categories), and runs FuxiCTR's processor with the feature columns of BARS' configurations,
and ``prepare --schema``. The numbering differs, so ids must be equal up to a renaming: per column a one-to-one map
between the two over all rows of all three files, in which FuxiCTR's out-of-vocabulary id is 0; and vocabularies of the
same size. Numbers that stay numbers must be equal.

The exit code is 1 if they differ. FuxiCTR is installed into another environment (peer_environments.py).
"""

import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks._lib import commands
from benchmarks._lib.peer_environments import peer_python

NUMERIC = [f"I{i}" for i in range(1, 14)]
CATEGORICAL = [f"C{i}" for i in range(1, 27)]
SPLITS = {"train": "train", "validation": "valid", "test": "test"}
# feature_cols and min_categr_count of BARS: DCNv2_criteo_x4_001 (the file behind DeepFM_criteo_x4_001 calls fill_na
# na_value) and DeepFM_criteo_x1.
CONFIGS = {
    "criteo-x4": {
        "label": "Label",
        "min_categr_count": 10,
        "feature_cols": [
            {
                "name": NUMERIC,
                "active": True,
                "dtype": "float",
                "type": "categorical",
                "preprocess": "convert_to_bucket",
                "fill_na": 0,
            },
            {"name": CATEGORICAL, "active": True, "dtype": "str", "type": "categorical", "fill_na": ""},
        ],
    },
    "criteo-x1": {
        "label": "label",
        "min_categr_count": 1,
        "feature_cols": [
            {"name": NUMERIC, "active": True, "dtype": "float", "type": "numeric"},
            {"name": CATEGORICAL, "active": True, "dtype": "float", "type": "categorical"},
        ],
    },
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    rows: int = 60_000
    """Training rows; validation and test have an eighth each."""
    seed: int = 0
    """Seed of the rows."""


def rows_of_x4(draw: random.Random, rows: int) -> Iterator[list[str]]:
    for _ in range(rows):
        numbers = [_count(draw, j) for j in range(len(NUMERIC))]
        categories = ["" if draw.random() < 0.1 else f"{_skewed(draw, j):08x}" for j in range(len(CATEGORICAL))]
        yield [str(int(draw.random() < 0.25)), *numbers, *categories]


def rows_of_x1(draw: random.Random, rows: int) -> Iterator[list[str]]:
    for _ in range(rows):
        numbers = [f"{draw.random() ** 3:.6g}" for _ in NUMERIC]
        categories = [str(_skewed(draw, j)) for j in range(len(CATEGORICAL))]
        yield [str(int(draw.random() < 0.25)), *numbers, *categories]


def _count(draw: random.Random, j: int) -> str:
    if draw.random() < 0.25:
        return ""
    if draw.random() < 0.3:
        return str(draw.randrange(-3, 12))
    return str(int(draw.lognormvariate(2 + j / 3, 2)) - 2)


def _skewed(draw: random.Random, j: int) -> int:
    return int(draw.paretovariate(0.4 + 0.05 * j)) % 2**32


def compare(schema: str, folder: Path, options: Options) -> list[str]:
    """Return the differences, one per line."""
    config = CONFIGS[schema]
    folder.mkdir()
    made = {"criteo-x4": rows_of_x4, "criteo-x1": rows_of_x1}[schema]
    draw = random.Random(options.seed)
    for name, rows in (("train", options.rows), ("valid", options.rows // 8), ("test", options.rows // 8)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([config["label"], *NUMERIC, *CATEGORICAL])
            writer.writerows(made(draw, rows))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    peer = commands.module_command("benchmarks.data.peers.peer_fuxictr_ids", folder, python=peer_python("fuxictr"))
    subprocess.run(peer, check=True, env=commands.environment())
    files = ("--input", folder / "train.csv", "--validation", folder / "valid.csv", "--test", folder / "test.csv")
    commands.torchrec_deepfm("prepare", "--schema", schema, "--output", folder / "prepared", *files)
    return list(differences(schema, folder))


def differences(schema: str, folder: Path) -> Iterator[str]:
    from torchrec_deepfm.data.dataset.prepared import PreparedData

    data = PreparedData.open(folder / "prepared")
    theirs = {name: np.load(folder / f"{name}.npz") for name in SPLITS.values()}
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    prepared = {split: [data.arrays(day) for day in data.days(split)] for split in SPLITS}  # one file, so one day each
    words = 0
    for j, name in enumerate(data.schema.categorical):
        ids = np.concatenate([prepared[split][0].sparse[:, j] for split in SPLITS])
        peer_ids = np.concatenate([theirs[split][name] for split in SPLITS.values()])
        oov = sizes[name] - 1
        # FuxiCTR's sizes include padding and out-of-vocabulary, num_embeddings the latter.
        if data.num_embeddings[name] - 1 != sizes[name] - 2:
            yield f"{name}: {data.num_embeddings[name] - 1} words, FuxiCTR has {sizes[name] - 2}"
        pairs = np.unique(np.stack([ids, peer_ids]), axis=1)
        if len(np.unique(pairs[0])) != pairs.shape[1] or len(np.unique(pairs[1])) != pairs.shape[1]:
            yield f"{name}: the ids are not one-to-one"
        if any((pair[0] == 0) != (pair[1] == oov) for pair in pairs.T):
            yield f"{name}: 0 is not out-of-vocabulary"
        words += sizes[name] - 2
    for j, name in enumerate(data.schema.numeric):
        for split, their_split in SPLITS.items():
            if not np.array_equal(prepared[split][0].dense[:, j], theirs[their_split][name].astype(np.float32)):
                yield f"{name}: the numbers of {split} differ"
    for split, their_split in SPLITS.items():
        if not np.array_equal(prepared[split][0].labels[:, 0], theirs[their_split]["label"]):
            yield f"the labels of {split} differ"
    rows = sum(data.rows(split) for split in SPLITS)
    print(f"{schema}: {rows:,} rows, {len(data.schema.categorical)} categorical columns with {words:,} words compared")


def main(options: Options) -> None:
    different = []
    with tempfile.TemporaryDirectory() as folder:
        for schema in CONFIGS:
            different += [f"{schema}: {line}" for line in compare(schema, Path(folder) / schema, options)]
    print("\n".join(different) or "no difference")
    sys.exit(bool(different))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

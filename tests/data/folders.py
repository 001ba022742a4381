"""Prepared folders made by hand for the tests, with values that tell which row and column they are."""

import json
from pathlib import Path

import numpy as np

from torchrec_deepfm.data.prepared import PreparedData
from torchrec_deepfm.data.schema import Schema

SCHEMA = Schema(label="y", numeric=("n1", "n2"), categorical=("c1", "c2", "c3"))


def number(row: int) -> list[float]:
    return [row / 4, -row / 8]


def ids(row: int) -> list[int]:
    return [row, row % 7, (row * row) % 11]


def label(row: int) -> int:
    return int(row % 3 == 0)


def make(folder: Path, rows: tuple[int, ...], schema: Schema = SCHEMA) -> PreparedData:
    """A folder with the given rows per training day; rows are numbered over all days. One row in the other splits."""
    folder.mkdir()
    stems = {**{f"day_{i}": count for i, count in enumerate(rows)}, "validation": 1, "test": 1}
    splits = {"train": [], "validation": [], "test": []}
    first = 0
    for stem, count in stems.items():
        if not stem.startswith("day_"):
            first = 0
        span = range(first, first + count)
        dense = np.array([number(row)[: len(schema.numeric)] for row in span], np.float32).reshape(count, -1)
        np.save(folder / f"{stem}_dense.npy", dense)
        np.save(folder / f"{stem}_sparse.npy", np.array([ids(row) for row in span], np.int32))
        np.save(folder / f"{stem}_labels.npy", np.array([[label(row)] for row in span], np.int32))
        day = {"stem": stem, "rows": count, "positives": sum(label(row) for row in span)}
        splits["train" if stem.startswith("day_") else stem].append(day)
        first += count
    manifest = {
        "format_version": 1,
        "schema": schema.to_json(),
        "num_embeddings": {"c1": max(sum(rows), 1), "c2": 7, "c3": 11},
        "splits": splits,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir()},
        "made": {},
        "optimum": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return PreparedData.open(folder)

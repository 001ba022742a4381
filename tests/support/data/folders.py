"""Prepared folders made by hand for the tests, with values that name their row and column.

No code of ``prepare`` is in here: the files are written with numpy alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.files import seal

SCHEMA = Schema(label="y", numeric=("n1", "n2"), categorical=("c1", "c2", "c3"))
# c2 and c4 are lists, c4 with weights.
LISTS = Schema(
    label="y",
    numeric=("n1", "n2"),
    categorical=("c1", "c2", "c3", "c4"),
    columns={"c2": Column(list=True), "c4": Column(list=True, weights="w4")},
    layout="table",
)


def number(row: int) -> list[float]:
    return [row / 4, -row / 8]


def ids(row: int) -> list[int]:
    return [row, row % 7, (row * row) % 11]


def label(row: int) -> int:
    return int(row % 3 == 0)


def bag(column: str, row: int) -> list[int]:
    """The ids of a list column: 0 to 4 of them."""
    return [(row + k * k) % 13 for k in range((row * 7 + len(column) + ord(column[-1])) % 5)]


def weights(column: str, row: int) -> list[float]:
    return [(row % 8 + k) / 8 - 0.5 for k in range(len(bag(column, row)))]


def write(folder: Path, manifest: Mapping[str, Any], version: int = 2) -> None:
    """The manifest of what lies in the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    whole = {"format_version": version, **manifest, "files": files, "made": {}, "optimum": {}}
    (folder / "manifest.json").write_bytes(seal(whole) if version == 2 else json.dumps(whole).encode())


def write_stem(folder: Path, stem: str, rows: Sequence[int], schema: Schema = SCHEMA) -> None:
    """The arrays of a stem."""
    columns = dict(zip(("c1", "c2", "c3"), np.array([ids(row) for row in rows]).T, strict=True))
    count = len(rows)
    dense = np.array([number(row)[: len(schema.numeric)] for row in rows], np.float32).reshape(count, -1)
    np.save(folder / f"{stem}_dense.npy", dense)
    np.save(folder / f"{stem}_labels.npy", np.array([[label(row)] for row in rows], np.int32))
    sparse = [columns[name] for name in schema.one_hot]
    np.save(folder / f"{stem}_sparse.npy", np.array(sparse, np.int32).reshape(-1, count).T.copy())
    for name in schema.multi_hot:
        j = schema.categorical.index(name)
        bags = [bag(name, row) for row in rows]
        np.save(folder / f"{stem}_offsets_{j}.npy", np.cumsum([0, *map(len, bags)]).astype(np.int64))
        np.save(folder / f"{stem}_ids_{j}.npy", np.array([i for b in bags for i in b], np.int32))
        if name in schema.weighted:
            flat = [w for row in rows for w in weights(name, row)]
            np.save(folder / f"{stem}_weights_{j}.npy", np.array(flat, np.float32))


def make(folder: Path, rows: tuple[int, ...], schema: Schema = SCHEMA, version: int = 2) -> PreparedData:
    """A folder with the given rows per training day; rows are numbered over all days. One row in the other splits."""
    folder.mkdir()
    stems = {**{f"day_{i}": count for i, count in enumerate(rows)}, "validation": 1, "test": 1}
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    first = 0
    for stem, count in stems.items():
        if not stem.startswith("day_"):
            first = 0
        span = range(first, first + count)
        write_stem(folder, stem, span, schema)
        day = {"stem": stem, "rows": count, "positives": sum(label(row) for row in span)}
        splits["train" if stem.startswith("day_") else stem].append(day)
        first += count
    sizes = {"c1": max(sum(rows), 1), "c2": 13 if schema.multi_hot else 7, "c3": 11, "c4": 13}
    embeddings = {name: sizes[name] for name in schema.categorical}
    write(folder, {"schema": schema.to_json(), "num_embeddings": embeddings, "splits": splits}, version)
    return PreparedData.open(folder)


def halved(folder: Path, rows: int, schema: Schema = SCHEMA) -> PreparedData:
    """A folder whose only other day is cut: its first half, with the odd row, validates and the second tests."""
    folder.mkdir()
    write_stem(folder, "day_0", range(5), schema)
    write_stem(folder, "day_1", range(rows), schema)
    half = (rows + 1) // 2
    splits = {
        "train": [{"stem": "day_0", "start": 0, "rows": 5, "positives": 2}],
        "validation": [{"stem": "day_1", "start": 0, "rows": half, "positives": 1}],
        "test": [{"stem": "day_1", "start": half, "rows": rows - half, "positives": 1}],
    }
    sizes = {"c1": max(rows, 5), "c2": 13, "c3": 11, "c4": 13}
    embeddings = {name: sizes[name] for name in schema.categorical}
    write(folder, {"schema": schema.to_json(), "num_embeddings": embeddings, "splits": splits})
    return PreparedData.open(folder)

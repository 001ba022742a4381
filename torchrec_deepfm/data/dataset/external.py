"""Folders that TorchRec's and MLPerf's scripts wrote: day files without a manifest.

``day_N_dense.npy``, ``day_N_sparse.npy`` and ``day_N_labels.npy`` are what ``BinaryCriteoUtils.tsv_to_npys``,
``sparse_to_contiguous`` and ``shuffle`` write; ``day_N_sparse_multi_hot.npz`` is DLRMv2's materialized multi-hot set,
one array [N, H] per column, named by the column's number. The last day is halved as in TorchRec's pipes.

Shape letters: N rows of a day, I numeric columns, F categorical columns, H ids of a bag.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.arrays import DENSE, LABELS, MAX_NUM_EMBEDDINGS, SPARSE, Bags, Day, DayArrays
from torchrec_deepfm.data.dataset.npy_mmap import MappedRows, map_npy, map_npz
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import write_bytes

MULTI_HOT: Final = "_sparse_multi_hot.npz"
SCAN_BYTES: Final = 64 << 20  # read at a time to find the largest id

_DAY_FILE = re.compile(r"day_(0|[1-9][0-9]*)(_dense\.npy|_sparse\.npy|_labels\.npy|_sparse_multi_hot\.npz)")
_FIX = "fix or replace it"


@dataclass(frozen=True, kw_only=True)
class ExternalData:
    """Day files that another tool wrote.

    ``schema``: columns under TorchRec's names: ``label``, ``int_0`` ..., ``cat_0`` ... ``multi_hot``: the ids are in
    ``.npz`` archives. ``modulo``: ids are taken modulo ``num_embeddings``.
    """

    folder: Path
    schema: Schema
    rows: Mapping[int, int]
    multi_hot: bool
    num_embeddings: Mapping[str, int]
    modulo: bool

    def splits(self) -> tuple[tuple[Day, ...], tuple[Day, ...], tuple[Day, ...]]:
        """Split the days into train, validation and test.

        Returns all days except the last; the first half of the last, with the odd row; its second half, maybe empty.
        """
        *others, last = self.rows
        half = -(-self.rows[last] // 2)
        train = tuple(Day(stem=f"day_{day}", rows=self.rows[day]) for day in others)
        validation = Day(stem=f"day_{last}", rows=half)
        test = Day(stem=f"day_{last}", start=half, rows=self.rows[last] - half)
        return train, (validation,), (test,) if test.rows else ()

    def arrays(self, stem: str) -> DayArrays:
        """Map the arrays of a day, ``day_N``, in the stored types."""
        return _arrays(self.folder, stem, multi_hot=self.multi_hot)


def open_external(folder: Path, num_embeddings: int | Sequence[int] | None) -> ExternalData:
    """Open a folder of day files; ``num_embeddings`` as in ``PreparedData.open``."""
    days, multi_hot = _find(folder)
    arrays = {day: _arrays(folder, f"day_{day}", multi_hot=multi_hot) for day in days}
    schema = _schema(arrays[days[0]])
    for day in days:
        _check_same_columns(arrays[day], arrays[days[0]])
    if num_embeddings is None:
        counts = _scan(folder, list(arrays.values()))
    else:
        counts = _given(num_embeddings, len(schema.categorical), folder)
    return ExternalData(
        folder=folder,
        schema=schema,
        rows={day: len(arrays[day].labels) for day in days},
        multi_hot=multi_hot,
        num_embeddings=dict(zip(schema.categorical, counts, strict=True)),
        modulo=num_embeddings is not None,
    )


def _find(folder: Path) -> tuple[list[int], bool]:
    """The numbers of the days, and whether their ids are in archives."""
    found: dict[int, set[str]] = {}
    for path in folder.iterdir():
        match = _DAY_FILE.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), set()).add(match[2])
    if not found:
        raise UserError("not a prepared folder, manifest.json is missing", where=folder, remedy="make one with prepare")
    days = sorted(found)
    for day, following in itertools.pairwise(days):
        if following != day + 1:
            raise UserError(
                f"day_{day + 1} is missing between day_{day} and day_{following}", where=folder, remedy="add its files"
            )
    multi_hot = any(MULTI_HOT in endings for endings in found.values())
    for day in days:
        for ending in (DENSE, MULTI_HOT if multi_hot else SPARSE, LABELS):
            if ending not in found[day]:
                beside = " beside the others (the multi-hot script leaves it in its input folder)" if multi_hot else ""
                raise UserError(f"day_{day}{ending} is missing", where=folder, remedy=f"add it or a link to it{beside}")
    if len(days) == 1:
        raise UserError(
            f"only day_{days[0]} exists, and the last day is for validation and test",
            where=folder,
            remedy="add a day to train on",
        )
    return days, multi_hot


def _arrays(folder: Path, stem: str, *, multi_hot: bool) -> DayArrays:
    dense = map_npy(folder / f"{stem}{DENSE}", _FIX)
    labels = map_npy(folder / f"{stem}{LABELS}", _FIX)
    bags: dict[str, Bags] = {}
    if multi_hot:
        path = folder / f"{stem}{MULTI_HOT}"
        members = map_npz(path, _FIX)
        wanted = [str(j) for j in range(len(members))]
        if not members or set(members) != set(wanted):
            raise UserError(
                f"the arrays are named {', '.join(members) or 'nothing'}, not 0, 1, ...", where=path, remedy=_FIX
            )
        bags = {f"cat_{name}": Bags(ids=members[name]) for name in wanted}
        sparse = _no_columns(dense)
    else:
        sparse = map_npy(folder / f"{stem}{SPARSE}", _FIX)
    two = [dense, *((bag.ids for bag in bags.values()) if multi_hot else (sparse,))]
    for part in two:
        if len(part.shape) != 2 or (part is not dense and part.shape[1] == 0):
            raise UserError(f"expected rows of columns, found shape {part.shape}", where=part.where, remedy=_FIX)
    if len(labels.shape) == 2 and labels.shape[1] != 1:
        raise UserError(f"expected one label per row, found shape {labels.shape}", where=labels.where, remedy=_FIX)
    for part in two[1:]:
        if part.dtype.kind != "i" or part.dtype.itemsize not in (4, 8):
            raise UserError(f"expected int32 or int64 ids, found {part.dtype}", where=part.where, remedy=_FIX)
    if dense.dtype.kind != "f":
        raise UserError(f"expected float numbers, found {dense.dtype}", where=dense.where, remedy=_FIX)
    if len(labels) == 0:
        raise UserError("the day has no rows", where=labels.where, remedy="remove its files")
    for part in two:
        if len(part) != len(labels):
            raise UserError(f"{len(part)} rows, but {labels.where} has {len(labels)}", where=part.where, remedy=_FIX)
    return DayArrays(dense=dense, sparse=sparse, labels=labels, bags=bags)


def _no_columns(dense: MappedRows) -> MappedRows:
    """An array without columns: the multi-hot archive holds them all."""
    return MappedRows(dense.path, dense.where, dense.memory, 0, np.dtype(np.int32), (len(dense), 0))


def _schema(day: DayArrays) -> Schema:
    numeric = tuple(f"int_{i}" for i in range(day.dense.shape[1]))
    lists = tuple(day.bags)
    categorical = lists or tuple(f"cat_{j}" for j in range(day.sparse.shape[1]))
    columns = {name: Column(list=True) for name in lists}
    return Schema(label="label", numeric=numeric, categorical=categorical, columns=columns, layout="table")


def _check_same_columns(day: DayArrays, first: DayArrays) -> None:
    pairs = [(day.dense, first.dense), (day.sparse, first.sparse)]
    if len(day.bags) != len(first.bags):
        a, b = (next(iter(arrays.bags.values())).ids.path for arrays in (day, first))
        raise UserError(f"{len(day.bags)} columns, but {b} has {len(first.bags)}", where=a, remedy=_FIX)
    pairs += [(bags.ids, first.bags[name].ids) for name, bags in day.bags.items()]
    for part, first_part in pairs:
        if part.shape[1] != first_part.shape[1]:
            raise UserError(
                f"{part.shape[1]} columns, but {first_part.where} has {first_part.shape[1]}",
                where=part.where,
                remedy=_FIX,
            )


def _given(num_embeddings: int | Sequence[int], columns: int, folder: Path) -> list[int]:
    counts = [num_embeddings] * columns if isinstance(num_embeddings, int) else list(num_embeddings)
    if len(counts) != columns:
        raise UserError(
            f"{len(counts)} numbers for the {columns} categorical columns of {folder}",
            where="--num-embeddings",
            remedy="give one number per column, or one for all",
        )
    for count in counts:
        if not 1 <= count <= MAX_NUM_EMBEDDINGS:
            raise UserError(
                f"{count} is out of range", where="--num-embeddings", remedy=f"give 1 to {MAX_NUM_EMBEDDINGS}"
            )
    return counts


def _scan(folder: Path, days: Sequence[DayArrays]) -> list[int]:
    """The largest id of each column plus 1, by reading all files once; cached under the folder's fingerprint."""
    cache = _cache_file(folder, days)
    with contextlib.suppress(OSError, ValueError, TypeError):
        counts = json.loads(cache.read_text(encoding="utf-8"))
        if len(counts) == sum(_widths(days[0])) and all(1 <= count <= MAX_NUM_EMBEDDINGS for count in counts):
            return [int(count) for count in counts]
    counts = [0] * sum(_widths(days[0]))
    for day in days:
        column = 0
        for part in _id_arrays(day):
            bags = bool(day.bags)
            for highest in _highest(part, together=bags):
                if highest >= MAX_NUM_EMBEDDINGS:
                    value = _example(part, column, together=bags)
                    raise UserError(
                        f"column cat_{column} holds {value}, a raw value and not a table row",
                        where=part.where,
                        remedy="give --num-embeddings, which takes ids modulo this number, as TorchRec's hashes do",
                    )
                counts[column] = max(counts[column], highest + 1)
                column += 1
    with contextlib.suppress(OSError):  # no home, or a full disk: the next call scans again
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(cache, json.dumps(counts).encode())
    return counts


def _id_arrays(day: DayArrays) -> list[MappedRows]:
    return [bags.ids for bags in day.bags.values()] or [day.sparse]


def _widths(day: DayArrays) -> list[int]:
    return [1] * len(day.bags) or [day.sparse.shape[1]]


def _highest(part: MappedRows, *, together: bool) -> list[int]:
    """The largest value of each column, or of all; negative ones count as very large."""
    width = part.shape[1]
    unsigned = np.dtype(f"u{part.dtype.itemsize}")
    highest = np.zeros(width, unsigned)
    step = max(1, SCAN_BYTES // (width * part.dtype.itemsize))
    for start in range(0, len(part), step):
        chunk = part.stretch(start, min(start + step, len(part))).view(unsigned)
        np.maximum(highest, _column_max(chunk), out=highest)
        part.release()
    return [int(highest.max())] if together else [int(value) for value in highest]


def _column_max(chunk: NDArray[Any]) -> NDArray[Any]:
    """max(axis=0), three times as fast: numpy is slow where a row is short."""
    rows, width = chunk.shape
    even = rows // 64 * 64
    if even == 0:
        return np.asarray(chunk.max(axis=0))
    folded = chunk[:even].reshape(-1, 64 * width).max(axis=0).reshape(64, width).max(axis=0)
    return np.asarray(folded if even == rows else np.maximum(folded, chunk[even:].max(axis=0)))


def _example(part: MappedRows, column: int, *, together: bool) -> int:
    """A value that is not a valid id."""
    step = max(1, SCAN_BYTES // (part.shape[1] * part.dtype.itemsize))
    for start in range(0, len(part), step):
        chunk = part[start : start + step]
        values = chunk if together else chunk[:, column]
        bad = values[(values < 0) | (values >= MAX_NUM_EMBEDDINGS)]
        if bad.size:
            return int(bad.flat[0])
    raise AssertionError("no value is too large, though the largest is")


def _cache_file(folder: Path, days: Sequence[DayArrays]) -> Path:
    """The cached result of a scan, in the user's cache: the external folder is never written to."""
    stats = [(path.name, path.stat()) for path in sorted({file.path for day in days for file in day.files()})]
    key = [str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME")
    cache = Path(home) if home else Path.home() / ".cache"
    return cache / "torchrec_deepfm" / "num_embeddings" / f"{digest}.json"

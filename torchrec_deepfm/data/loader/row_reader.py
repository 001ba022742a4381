"""Copies rows out of the files of a split.

Shape letters: n rows that are copied, I numeric columns, F1 categorical columns with one id per row, H ids per row of a
column with the same number in every row, m ids of n bags.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.arrays import Bags
from torchrec_deepfm.data.dataset.checksums import BlockCheck
from torchrec_deepfm.data.dataset.npy_mmap import MappedRows
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.dataset.remote_rows import RemoteFile, chunks_of
from torchrec_deepfm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CopiedBags:
    """Copied bags of a multi-hot column: ids [m] bag after bag, ids of each bag [n], weights [m] if it has any."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    weights: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class CopiedRows:
    """Copied rows: ``dense`` [n, I], ``sparse`` [n, F1], ``labels`` [n], and ``weights`` [n] if they are not equal."""

    dense: NDArray[Any]
    sparse: NDArray[Any]
    labels: NDArray[Any]
    bags: dict[str, CopiedBags]
    weights: NDArray[np.float32] | None = None


# A day's number and rows in its files: int64 [rows], or the first and one past the last.
_Part = tuple[int, NDArray[np.int64] | tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which rows of which day are copied, and their order.

    ``parts``: of each day.
    ``order``: int64 [n], the position of each row among the copies; ``None`` if already in order.
    """

    parts: list[_Part]
    order: NDArray[np.int64] | None


class SplitRows:
    """The rows of a split, numbered over all its days."""

    def __init__(self, data: PreparedData, split: str) -> None:
        self.days = data.days(split)
        self.arrays = [data.arrays(day) for day in self.days]
        self._first = np.array([day.start for day in self.days], np.int64)
        self._begins = np.cumsum([0, *(day.rows for day in self.days)])
        self._files = [file for arrays in self.arrays for file in arrays.files()]
        checksums = data.checksums(split)
        self._remote, self._block_rows = data.remote, data.blocks or 1
        self._check = None
        if checksums is not None and data.blocks is not None:
            self._check = BlockCheck(self.days, self.arrays, checksums, data.blocks)

    def locate(self, row: int) -> tuple[int, int]:
        """Find a row of the split: the number of its day, and the row's number in the day's files."""
        day = int(np.searchsorted(self._begins, row, side="right")) - 1
        return day, int(row - self._begins[day] + self._first[day])

    def take(self, rows: NDArray[np.int64]) -> CopiedRows:
        """Copy rows in any order; int64 [n], numbered over all days."""
        if len(self.days) == 1:
            return self._copy(_Plan(parts=[(0, rows + self._first[0])], order=None))
        # One copy per day, then one reordering: much faster than scattering each day's rows.
        days = (np.searchsorted(self._begins, rows, side="right") - 1).astype(np.uint16)
        by_day = np.argsort(days, kind="stable")
        inside = (rows - self._begins[days] + self._first[days])[by_day]
        ends = np.cumsum(np.bincount(days, minlength=len(self.days))).tolist()
        parts = [(day, inside[a:b]) for day, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b]
        order = np.empty(len(rows), np.int64)
        order[by_day] = np.arange(len(rows))
        return self._copy(_Plan(parts=list(parts), order=order))

    def stretch(self, start: int, stop: int) -> CopiedRows:
        """Copy neighbouring rows, after comparing their blocks; faster than ``take``."""
        return self._copy(_Plan(parts=self._parts([(start, stop)]), order=None), compare=[(start, stop)])

    def fetch(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Start reading ``stretches`` of rows, numbered over all days, from the disk, without waiting."""
        if self._remote is not None:
            self._remote.fetch_ahead(self._wanted(self._parts(stretches)))
            return
        for start, stop in stretches:
            for day, a, b in self._cut(start, stop):
                arrays = self.arrays[day]
                for file in arrays.by_row():
                    file.will_need(a, b)
                for bags in arrays.bags.values():
                    c, d = a, b
                    if bags.offsets is not None:
                        bags.offsets.will_need(a, b + 1)
                        c, d = (min(max(int(border), 0), len(bags.ids)) for border in bags.offsets[[a, b]])
                    for part in (bags.ids, bags.weights):
                        if part is not None:
                            part.will_need(c, d)

    def check(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Compare the checksums of the blocks of ``stretches`` of rows, numbered over all days, each block once."""
        stretches = list(stretches)
        if self._check is None or not stretches:
            return
        for file in self._files:
            file.check_whole()
        with self._here(lambda: self._parts(self._blocks_of(stretches))):
            self._check.check(stretches)

    def release(self) -> None:
        """Release the pages that copying has mapped; see ``MappedRows.release``."""
        for file in self._files:
            file.release()

    def _cut(self, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """(day, first row in its files, one past the last) of the rows ``[start, stop)`` of the split."""
        day = int(np.searchsorted(self._begins, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._begins[day + 1]))
            shift = int(self._first[day] - self._begins[day])
            yield day, start + shift, end + shift
            start = end
            day += 1

    def _blocks_of(self, stretches: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Whole blocks around some rows, which are compared as such."""
        size, last = self._block_rows, int(self._begins[-1])
        return ((start // size * size, min(-(-stop // size) * size, last)) for start, stop in stretches)

    def _parts(self, stretches: Iterable[tuple[int, int]]) -> list[_Part]:
        return [(day, (a, b)) for start, stop in stretches for day, a, b in self._cut(start, stop)]

    @contextmanager
    def _here(self, parts: Callable[[], Sequence[_Part]]) -> Iterator[None]:
        """Keep rows on the local disk while they are read."""
        if self._remote is None:
            yield
            return
        found = parts()
        wanted = self._wanted(found)
        with self._remote.held(wanted):
            # The borders of the bags are there now, and say where their ids are.
            ids = self._wanted_ids(found)
            if not ids:
                yield
                return
        with self._remote.held([*wanted, *ids]):
            yield

    def _wanted(self, parts: Sequence[_Part]) -> list[tuple[RemoteFile, NDArray[np.int64]]]:
        """The chunks of some rows in the files that have a line for each."""
        found = []
        for day, rows in parts:
            arrays = self.arrays[day]
            chunks = chunks_of(rows)
            found += [(file.remote, chunks) for file in arrays.by_row() if file.remote is not None]
            offsets = [bags.offsets.remote for bags in arrays.bags.values() if bags.offsets is not None]
            if offsets:
                ends = chunks_of((rows[0], rows[1] + 1) if isinstance(rows, tuple) else np.union1d(rows, rows + 1))
                found += [(file, ends) for file in offsets if file is not None]
        return _merged(found)

    def _wanted_ids(self, parts: Sequence[_Part]) -> list[tuple[RemoteFile, NDArray[np.int64]]]:
        found = []
        for day, rows in parts:
            for bags in self.arrays[day].bags.values():
                begins, counts = _borders(bags, rows)
                remote = [file.remote for file in (bags.ids, bags.weights) if file is not None]
                found += [(file, chunks_of(_spread(begins, counts))) for file in remote if file is not None]
        return _merged(found)

    def _copy(self, plan: _Plan, compare: Sequence[tuple[int, int]] = ()) -> CopiedRows:
        arrays = [self.arrays[day] for day, _ in plan.parts]
        for each in arrays:
            for file in each.files():
                file.check_whole()
        self.check(compare)
        with self._here(lambda: plan.parts):
            weights = [each.weights for each in arrays if each.weights is not None]
            return CopiedRows(
                dense=_rows([each.dense for each in arrays], plan),
                sparse=_rows([each.sparse for each in arrays], plan),
                labels=_rows([each.labels for each in arrays], plan).reshape(-1),
                bags={name: _bags([each.bags[name] for each in arrays], plan) for name in arrays[0].bags},
                weights=_rows(weights, plan).reshape(-1) if weights else None,
            )


def _merged(
    found: Iterable[tuple[RemoteFile, NDArray[np.int64]]],
) -> list[tuple[RemoteFile, NDArray[np.int64]]]:
    """Each file once."""
    by_file: dict[RemoteFile, list[NDArray[np.int64]]] = {}
    for file, chunks in found:
        by_file.setdefault(file, []).append(chunks)
    return [
        (file, chunks[0] if len(chunks) == 1 else np.unique(np.concatenate(chunks))) for file, chunks in by_file.items()
    ]


def _rows(files: Sequence[MappedRows], plan: _Plan) -> NDArray[Any]:
    pieces = [
        file.stretch(*rows) if isinstance(rows, tuple) else file.take(rows)
        for file, (_, rows) in zip(files, plan.parts, strict=True)
    ]
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return joined if plan.order is None else joined.take(plan.order, axis=0)


def _bags(bags: Sequence[Bags], plan: _Plan) -> CopiedBags:
    if bags[0].offsets is None:
        ids = _rows([each.ids for each in bags], plan)
        return CopiedBags(ids=ids.reshape(-1), lengths=np.full(len(ids), ids.shape[1], np.int64), weights=None)
    pieces: list[NDArray[Any]] = []
    weights: list[NDArray[np.float32]] = []
    lengths: list[NDArray[np.int64]] = []
    for each, (_, rows) in zip(bags, plan.parts, strict=True):
        begins, counts = _borders(each, rows)
        lengths.append(counts)
        if isinstance(rows, tuple):
            first = int(begins[0]) if len(begins) else 0
            stop = first + int(counts.sum())
            pieces.append(each.ids.stretch(first, stop))
            if each.weights is not None:
                weights.append(each.weights.stretch(first, stop))
            continue
        positions = _spread(begins, counts)
        pieces.append(each.ids.take(positions))
        if each.weights is not None:
            weights.append(each.weights.take(positions))
    all_lengths, all_ids = np.concatenate(lengths), np.concatenate(pieces)
    all_weights = np.concatenate(weights) if weights else None
    if plan.order is not None:
        ends = np.cumsum(all_lengths)
        positions = _spread((ends - all_lengths)[plan.order], all_lengths[plan.order])
        all_lengths, all_ids = all_lengths[plan.order], all_ids.take(positions)
        all_weights = None if all_weights is None else all_weights.take(positions)
    return CopiedBags(ids=all_ids, lengths=all_lengths, weights=all_weights)


def _borders(bags: Bags, rows: NDArray[np.int64] | tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First id and number of ids of each bag; checked, since they set the range that is read."""
    assert bags.offsets is not None
    if isinstance(rows, tuple):
        borders = bags.offsets.stretch(rows[0], rows[1] + 1)
        begins, ends = borders[:-1], borders[1:]
    else:
        begins, ends = bags.offsets.take(rows), bags.offsets.take(rows + 1)
    bad = (begins < 0) | (ends < begins) | (ends > len(bags.ids))
    if bad.any():
        i = int(np.argmax(bad))
        row = rows[0] + i if isinstance(rows, tuple) else int(rows[i])
        raise UserError(
            f"row {row}: its ids run from {begins[i]} to {ends[i]} of {len(bags.ids)}",
            where=bags.offsets.where,
            remedy="the folder is damaged, prepare the data again",
        )
    return begins, ends - begins


def _spread(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions ``begins[i]``, ``begins[i] + 1``, ... of all bags, one bag after another."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)

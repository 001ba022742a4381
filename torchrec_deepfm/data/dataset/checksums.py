"""A checksum for every block of rows: ``prepare`` writes them, and the loader compares each block that it reads.

A block is one of those that the loader shuffles, ``BLOCK_ROWS`` rows of a split; where days meet inside of a block,
each day's part has a checksum of its own. They are XXH3 of 64 bits, which finds damage; it is no protection against
somebody who forges a file. ``checksums.npy`` holds them: uint64 [P, A] for the P parts of all splits in their order and
the A arrays of a stem in the order of ``stem_files``.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, BinaryIO, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.arrays import Day, DayArrays
from torchrec_deepfm.errors import UserError

CHECKSUMS: Final = "checksums.npy"
HASH: Final = "xxh3_64"


def borders(days: Sequence[Day], block_rows: int) -> NDArray[np.int64]:
    """Return the borders of the parts of a split.

    Args:
        days: The days of the split.
        block_rows: Rows of a block.

    Returns:
        int64 [P + 1] row numbers over all days: part p has the rows from ``[p]`` to ``[p + 1]``, of one day and of one
        block.

    Example:
        >>> borders([Day(stem="day_0", rows=6), Day(stem="day_1", rows=5)], 4).tolist()
        [0, 4, 6, 8, 11]
    """
    ends = np.cumsum([0, *(day.rows for day in days)])
    return np.union1d(np.arange(0, ends[-1], block_rows), ends)


def stem_borders(days: Sequence[Day], block_rows: int) -> list[NDArray[np.int64]]:
    """Return the borders of a split's parts day by day, as rows of each day's files.

    Args:
        days: The days of the split.
        block_rows: Rows of a block.

    Returns:
        For each day int64, from its first row to one past its last.

    Example:
        >>> [rows.tolist() for rows in stem_borders([Day(stem="day_0", rows=6), Day(stem="day_1", rows=5)], 4)]
        [[0, 4, 6], [0, 2, 5]]
    """
    all_borders, begins = borders(days, block_rows), np.cumsum([0, *(day.rows for day in days)])
    places = np.searchsorted(all_borders, begins)
    return [
        all_borders[first : last + 1] - begin + day.start
        for day, begin, (first, last) in zip(days, begins, pairwise(places), strict=False)
    ]


def file_checksums(
    file: BinaryIO, parts: Sequence[int], overlap: int, update: Callable[[bytes], object]
) -> NDArray[np.uint64]:
    """Read an array's file to its end, for the checksums of its parts.

    Args:
        file: The open file, at the first byte of the array.
        parts: Borders of the parts, in bytes from there on.
        overlap: Bytes that a part shares with the next one: an offset ends the bag of one row and begins that of the
            next.
        update: Called with everything that is read, in order.

    Returns:
        uint64 [parts].
    """
    found = np.empty(len(parts) - 1, np.uint64)
    shared = file.read(overlap)
    update(shared)
    for i, (begin, end) in enumerate(pairwise(parts)):
        content = file.read(end - begin)
        update(content)
        found[i] = xxhash.xxh3_64_intdigest(shared + content if overlap else content)
        shared = content[-overlap:] if overlap else b""
    assert not file.read(1), file.name
    return found


class BlockCheck:
    """Compares the blocks of a split with their checksums, each of them once.

    Args:
        days: The days of the split.
        arrays: Their arrays.
        checksums: uint64 [P, A].
        block_rows: Rows of a block.
    """

    def __init__(
        self, days: Sequence[Day], arrays: Sequence[DayArrays], checksums: NDArray[np.uint64], block_rows: int
    ) -> None:
        self._arrays, self._checksums, self._block_rows = arrays, checksums, block_rows
        self._files = [each.files() for each in arrays]
        self._borders = borders(days, block_rows)
        self._begins = np.cumsum([0, *(day.rows for day in days)])
        self._shift = np.array([day.start for day in days], np.int64) - self._begins[:-1]
        self._done = np.zeros(-(-int(self._begins[-1]) // block_rows), bool)
        self._left = len(self._done)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[None]] = deque()

    def check(self, rows: NDArray[np.int64] | range) -> None:
        """Compare the blocks of some rows that were not compared before.

        Args:
            rows: Row numbers over all days.

        Raises:
            UserError: A block holds other bytes than ``prepare`` wrote.
        """
        if not self._left:
            return
        blocks = self._blocks(rows)
        while self._ahead and not self._done[blocks].all():
            self._ahead.popleft().result()
        self._compare(blocks)

    def check_ahead(self, stretches: Iterable[range]) -> None:
        """Compare the blocks of rows that will be read soon, in a thread; ``check`` waits for it.

        Args:
            stretches: Row numbers over all days.
        """
        blocks = [self._blocks(rows) for rows in stretches if self._left]
        if blocks:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checksums")
            self._ahead.append(self._thread.submit(self._compare, np.concatenate(blocks)))

    def _blocks(self, rows: NDArray[np.int64] | range) -> NDArray[np.int64]:
        if isinstance(rows, range):
            return np.arange(rows.start // self._block_rows, -(-rows.stop // self._block_rows))
        return rows // self._block_rows

    def _compare(self, blocks: NDArray[np.int64]) -> None:
        todo = np.unique(blocks[~self._done[blocks]])
        if not len(todo):
            return
        first = np.searchsorted(self._borders, todo * self._block_rows)
        last = np.searchsorted(self._borders, np.minimum((todo + 1) * self._block_rows, self._borders[-1]))
        for block, parts in zip(todo.tolist(), map(range, first.tolist(), last.tolist()), strict=True):
            for part in parts:
                self._compare_part(part)
            self._done[block] = True
        self._left = len(self._done) - int(np.count_nonzero(self._done))

    def _compare_part(self, part: int) -> None:
        start, stop = self._borders[part : part + 2].tolist()
        day = int(np.searchsorted(self._begins, start, side="right")) - 1
        a, b = (int(row + self._shift[day]) for row in (start, stop))
        arrays = self._arrays[day]
        for file in self._files[day]:
            file.check_whole()
        pieces: list[NDArray[Any]] = [each.array[a:b] for each in (arrays.dense, arrays.sparse, arrays.labels)]
        for bags in arrays.bags.values():
            assert bags.offsets is not None
            c, d = (max(int(border), 0) for border in bags.offsets.array[[a, b]])
            pieces.append(bags.offsets.array[a : b + 1])
            pieces += [file.array[c:d] for file in (bags.ids, bags.weights) if file is not None]
        for file, piece, expected in zip(self._files[day], pieces, self._checksums[part].tolist(), strict=True):
            if xxhash.xxh3_64_intdigest(piece.data) != expected:
                raise UserError(
                    f"{file.where}: rows {a} to {b - 1} are not what prepare wrote (their checksum differs); "
                    "restore the file from a copy, or prepare the data again"
                )

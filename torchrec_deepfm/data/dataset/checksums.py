"""A checksum for every block of rows: ``prepare`` writes them, and the loader compares each block that it reads.

A block is the unit that the loader shuffles, ``BLOCK_ROWS`` rows of a split; where days meet inside a block, each
day's part has its own checksum. The checksums are 64-bit XXH3, which detects damage but not a deliberate forgery.
``checksums.npy`` holds them: uint64 [P, A] for the P parts of all splits in their order and the A arrays of a stem in
the order of ``stem_files``.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import BinaryIO, Final, NoReturn

import numpy as np
import xxhash
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.arrays import Day, DayArrays
from torchrec_deepfm.errors import UserError

CHECKSUMS: Final = "checksums.npy"
HASH: Final = "xxh3_64"


def borders(days: Sequence[Day], block_rows: int) -> NDArray[np.int64]:
    """Return the borders of the parts of a split.

    Returns int64 [P + 1] row numbers over all days: part p has the rows from ``[p]`` to ``[p + 1]``, of one day and of
    one block.

    Example:
        >>> borders([Day(stem="day_0", rows=6), Day(stem="day_1", rows=5)], 4).tolist()
        [0, 4, 6, 8, 11]
    """
    ends = np.cumsum([0, *(day.rows for day in days)])
    return np.union1d(np.arange(0, ends[-1], block_rows), ends)


def stem_borders(days: Sequence[Day], block_rows: int) -> list[NDArray[np.int64]]:
    """Return the borders of a split's parts day by day, as rows of each day's files.

    Returns for each day int64, from its first row to one past its last.

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

    ``parts``: borders of the parts, in bytes from that position. ``overlap``: bytes that a part shares with the next
    one: an offset ends the bag of one row and begins that of the next. ``update``: called with everything that is read,
    in order. Returns uint64 [parts].
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
    """Compares the blocks of a split with their ``checksums``, uint64 [P, A], each once."""

    def __init__(
        self, days: Sequence[Day], arrays: Sequence[DayArrays], checksums: NDArray[np.uint64], block_rows: int
    ) -> None:
        self._arrays, self._checksums, self._block_rows = arrays, checksums, block_rows
        self._begins = [0, *itertools.accumulate(day.rows for day in days)]
        self._shifts = [day.start - begin for day, begin in zip(days, self._begins, strict=False)]
        # Where days meet inside a block: a part ends there, the block does not. Per day, such places up to its begin.
        inside = (begin % block_rows > 0 and begin > before for before, begin in pairwise(self._begins))
        self._cuts = [0, *itertools.accumulate(inside)]
        # Rows of these: what does not depend on the part is looked up once.
        self._plain = [[file.raw for file in each.by_row()] for each in arrays]
        self._compared = bytearray(len(checksums))
        self._left = len(checksums)

    def check(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Compare those parts of blocks of the given rows that were not compared before.

        The files must have their sizes. It runs in the thread that copies the rows next: comparing brings them into the
        cache. A separate thread costs more, since both threads compete for the interpreter lock.

        ``stretches``: first row and one past the last, numbered over all days.
        """
        if not self._left:
            return
        size, begins, compared = self._block_rows, self._begins, self._compared
        for row, stop in stretches:
            while row < stop:
                day, block = bisect_right(begins, row) - 1, row // size
                part, end = block + self._cuts[day], min((block + 1) * size, begins[day + 1])
                if not compared[part]:
                    shift = self._shifts[day]
                    begin = max(block * size, begins[day])
                    self._compare(day, begin + shift, end + shift, self._checksums[part].tolist())
                    compared[part] = 1
                    self._left -= 1
                row = end

    def _compare(self, day: int, begin: int, end: int, sums: Sequence[int]) -> None:
        digest = xxhash.xxh3_64_intdigest
        for i, (content, offset, width) in enumerate(self._plain[day]):
            if digest(content[offset + begin * width : offset + end * width]) != sums[i]:
                self._refuse(day, begin, end, i)
        i = len(self._plain[day])
        for bags in self._arrays[day].bags.values():
            assert bags.offsets is not None
            first, last = (max(int(border), 0) for border in bags.offsets.array[[begin, end]])
            pieces = [bags.offsets.bytes_of(begin, end + 1)]
            pieces += [file.bytes_of(first, last) for file in (bags.ids, bags.weights) if file is not None]
            for piece in pieces:
                if digest(piece) != sums[i]:
                    self._refuse(day, begin, end, i)
                i += 1

    def _refuse(self, day: int, begin: int, end: int, file: int) -> NoReturn:
        raise UserError(
            f"rows {begin} to {end - 1} are not what prepare wrote (their checksum differs)",
            where=self._arrays[day].files()[file].where,
            remedy="restore the file from a copy, or prepare the data again",
        )

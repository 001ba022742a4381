"""The row order of an epoch: a seeded block shuffle without a list of all rows.

The split is cut into equal stretches, each of many blocks of neighbouring rows. A window takes one random block from
each stretch; then the rows inside the window are permuted. Disk reads stay local, the memory is that of one window, and
any part of the order can be computed separately. Since each window has blocks from the whole split, a trend in the data
does not show between windows. The order depends only on the seed, the epoch and the number of rows, not on the batch
size or the number of ranks.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS: Final = 1024
WINDOW_BLOCKS: Final = 512

# The two independent random streams of an epoch.
_BLOCKS, _ROWS = 0, 1


class EpochOrder:
    """A permutation of ``range(rows)``, or the identity, computed on access.

    ``shuffle``: permute; else the identity.

    Example:
        >>> sorted(EpochOrder(5, shuffle=True, seed=0, epoch=0)[0:5].tolist())
        [0, 1, 2, 3, 4]
        >>> EpochOrder(5, shuffle=False, seed=0, epoch=0)[1:4].tolist()
        [1, 2, 3]
    """

    def __init__(self, rows: int, *, shuffle: bool, seed: int, epoch: int) -> None:
        self._rows = rows
        self._shuffle = shuffle
        self._entropy = (seed, epoch)
        if shuffle:
            blocks = -(-rows // BLOCK_ROWS)
            windows = -(-blocks // WINDOW_BLOCKS)
            # Row s is the s-th run of the split; column w is its block in window w.
            in_run = np.tile(np.arange(windows), (-(-blocks // windows), 1))
            self._assignment = self._generator(_BLOCKS).permuted(in_run, axis=1, out=in_run)
            ends = np.cumsum([self._size(window) for window in range(windows)])
            self._windows = [0, *ends.tolist()]
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, positions: slice) -> NDArray[np.int64]:
        """Return the row numbers at positions ``[start, stop)`` of the order, int64 [stop - start]."""
        start, stop, _ = positions.indices(self._rows)
        if not self._shuffle:
            return np.arange(start, stop)
        pieces = []
        window = self.window_at(start)
        while start < stop:
            begin, end = self._windows[window : window + 2]
            pieces.append(self._window(window)[start - begin : min(stop, end) - begin])
            start = end
            window += 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def window_at(self, position: int) -> int:
        """Return the window of a position of the order.

        Returns the number of the window, from 0. Positions have windows without shuffle, too.
        """
        if not self._shuffle:
            return position // (BLOCK_ROWS * WINDOW_BLOCKS)
        return int(np.searchsorted(self._windows, position, side="right")) - 1

    def stretches(self, window: int) -> list[tuple[int, int]]:
        """Return the rows of a window as ranges of neighbours, to be fetched ahead.

        Returns ``(first row, one past the last)`` of each block, in the order of the split; empty past the last window,
        and without shuffle (the system itself then reads ahead).
        """
        if not self._shuffle or window >= len(self._windows) - 1:
            return []
        firsts = (self._in_window(window) * BLOCK_ROWS).tolist()
        return [(first, min(first + BLOCK_ROWS, self._rows)) for first in firsts]

    def _size(self, window: int) -> int:
        """Rows of a window."""
        blocks = self._in_window(window)
        missing = (int(blocks[-1]) + 1) * BLOCK_ROWS - self._rows  # in the split's last block, if this window has it
        return len(blocks) * BLOCK_ROWS - max(missing, 0)

    def _in_window(self, window: int) -> NDArray[np.int64]:
        """The blocks of a window, in the order of the split."""
        stretches, windows = self._assignment.shape
        blocks = np.arange(stretches) * windows + self._assignment[:, window]
        return np.asarray(blocks[blocks * BLOCK_ROWS < self._rows])  # the split's last stretch may be short

    def _window(self, window: int) -> NDArray[np.int64]:
        cached = self._cached  # read once: the loader's thread and its caller may both be here
        if cached is None or cached[0] != window:
            blocks = self._in_window(window)
            rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
            rows = rows[rows < self._rows]
            cached = self._cached = window, self._generator(_ROWS, window).permutation(rows)
        return cached[1]

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((*self._entropy, *stream))

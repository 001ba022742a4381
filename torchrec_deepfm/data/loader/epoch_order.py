"""The row order of an epoch: a seeded block shuffle that needs no list of all rows.

The split is cut into equal stretches of many blocks of neighbouring rows. A window takes one block from each
stretch, by lot; then the rows inside the window change places. Disk reads stay near each other, the memory is that of
one window, and any stretch of the order can be computed by itself. As each window has blocks from everywhere, a trend
in the data does not show between windows. The order depends on the seed, the epoch and the number of rows, and on
nothing else: neither on the batch size nor on the number of ranks.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS: Final = 1024
WINDOW_BLOCKS: Final = 512

# Names of the two independent random streams of an epoch.
_BLOCKS, _ROWS = 0, 1


class EpochOrder:
    """A permutation of ``range(rows)``, or the identity, that is computed where it is read.

    Args:
        rows: N, at least 1.
        shuffle: Whether to permute at all.
        seed: Not negative.
        epoch: Not negative.

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
            # Row s is the s-th stretch of the split; column w says which of its blocks goes to window w.
            lots = np.tile(np.arange(windows), (-(-blocks // windows), 1))
            self._lots = self._generator(_BLOCKS).permuted(lots, axis=1, out=lots)
            ends = np.cumsum([self._size(window) for window in range(windows)])
            self._windows = [0, *ends.tolist()]
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, positions: slice) -> NDArray[np.int64]:
        """Return the row numbers that stand at ``[start, stop)`` of the order.

        Args:
            positions: A slice with step 1 inside ``range(rows)``.

        Returns:
            int64 row numbers [stop - start].
        """
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
        """Tell in which window a position of the order lies.

        Args:
            position: 0 to N - 1.

        Returns:
            The number of the window, from 0. Without shuffle, too, positions are counted in windows.
        """
        if not self._shuffle:
            return position // (BLOCK_ROWS * WINDOW_BLOCKS)
        return int(np.searchsorted(self._windows, position, side="right")) - 1

    def stretches(self, window: int) -> list[tuple[int, int]]:
        """Return the rows of a window as stretches of neighbours, so that they can be fetched ahead.

        Args:
            window: Its number; one past the last is allowed.

        Returns:
            ``(first row, one past the last)`` of each block, in the order of the split; nothing
            where there is no such window, or no shuffle (then the system itself reads ahead).
        """
        if not self._shuffle or window >= len(self._windows) - 1:
            return []
        firsts = (self._in_window(window) * BLOCK_ROWS).tolist()
        return [(first, min(first + BLOCK_ROWS, self._rows)) for first in firsts]

    def _size(self, window: int) -> int:
        """Rows of a window."""
        blocks = self._in_window(window)
        missing = (int(blocks[-1]) + 1) * BLOCK_ROWS - self._rows  # of the split's last block, if it is here
        return len(blocks) * BLOCK_ROWS - max(missing, 0)

    def _in_window(self, window: int) -> NDArray[np.int64]:
        """The blocks of a window, in the order of the split."""
        stretches, windows = self._lots.shape
        blocks = np.arange(stretches) * windows + self._lots[:, window]
        return np.asarray(blocks[blocks * BLOCK_ROWS < self._rows])  # the split's last stretch may be short

    def _window(self, window: int) -> NDArray[np.int64]:
        cached = self._cached  # taken once: the loader's thread and its caller may both read here
        if cached is None or cached[0] != window:
            blocks = self._in_window(window)
            rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
            rows = rows[rows < self._rows]
            cached = self._cached = window, self._generator(_ROWS, window).permutation(rows)
        return cached[1]

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((*self._entropy, *stream))

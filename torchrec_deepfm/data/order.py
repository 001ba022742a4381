"""The row order of an epoch: a seeded block shuffle that needs no list of all rows.

Blocks of neighbouring rows change places over the whole split; then the rows inside a window of many blocks change
places. Disk reads stay near each other, the memory is that of one window, and any stretch of the order can be computed
by itself. The order depends on the seed, the epoch and the number of rows, and on nothing else: neither on the batch
size nor on the number of ranks.
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
            self._blocks = self._generator(_BLOCKS).permutation(-(-rows // BLOCK_ROWS))
            sizes = np.minimum(rows - self._blocks * BLOCK_ROWS, BLOCK_ROWS)  # the split's last block may be short
            self._windows = [0, *np.cumsum(sizes)[WINDOW_BLOCKS - 1 : -1 : WINDOW_BLOCKS].tolist(), rows]
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
        window = int(np.searchsorted(self._windows, start, side="right")) - 1
        while start < stop:
            begin, end = self._windows[window : window + 2]
            pieces.append(self._window(window)[start - begin : min(stop, end) - begin])
            start = end
            window += 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _window(self, window: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != window:
            blocks = self._blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
            rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
            rows = rows[rows < self._rows]
            self._cached = window, self._generator(_ROWS, window).permutation(rows)
        return self._cached[1]

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((*self._entropy, *stream))

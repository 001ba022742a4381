"""How well the loader's shuffle mixes, against a global shuffle and other loaders' orders.

    python -m benchmarks.data.shuffle_mixing

Only row numbers are drawn; no data are read. A column that grows from the first row to the last (a trend over time) and
one that oscillates once per day represent what changes along a click log. For each order of the rows:

* blocks: number of stretches of 1024 neighbouring rows that a batch draws from (median);
* spread: standard deviation of the column's mean over batches, divided by that of independent draws. A global shuffle
  has 1; the maximum, one value of the column per batch, is sqrt(batch size);
* lag 1: correlation of neighbouring batches' means. A global shuffle has 0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import tyro
from numpy.typing import NDArray

from torchrec_deepfm.data.loader.epoch_order import BLOCK_ROWS, WINDOW_BLOCKS, EpochOrder

Batches = Callable[[int], Iterator[NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    rows: int = 40_000_000
    """Rows of the split."""
    days: int = 24
    """Days that they span."""
    batch_sizes: tuple[int, ...] = (4096, 65536)
    """Rows of a batch over all ranks."""
    seed: int = 0
    """Seed of every shuffle."""


def in_pieces(order: Callable[[int, int], NDArray[np.int64]], rows: int) -> Batches:
    def batches(size: int) -> Iterator[NDArray[np.int64]]:
        for start in range(0, rows - size + 1, size):
            yield order(start, start + size)

    return batches


def loader_order(rows: int, seed: int) -> Batches:
    order = EpochOrder(rows, shuffle=True, seed=seed, epoch=0)
    return in_pieces(lambda start, stop: order[start:stop], rows)


def global_shuffle(rows: int, seed: int) -> Batches:
    order = np.random.default_rng(seed).permutation(rows)
    return in_pieces(lambda start, stop: order[start:stop], rows)


def file_order(rows: int, seed: int) -> Batches:
    """Keep the order; TorchRec's ``shuffle_batches`` does the same, because it only mixes rows inside a batch."""
    return in_pieces(np.arange, rows)


def random_blocks(rows: int, seed: int) -> Batches:
    """Draw a window's blocks from the whole split, instead of from one block of each stretch."""
    draw = np.random.default_rng(seed)
    blocks = draw.permutation(rows // BLOCK_ROWS)
    windows = []
    for start in range(0, len(blocks), WINDOW_BLOCKS):
        chosen = blocks[start : start + WINDOW_BLOCKS]
        windows.append(draw.permutation((chosen[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)))
    order = np.concatenate(windows)
    return in_pieces(lambda start, stop: order[start:stop], len(order))


def shuffle_buffer(rows: int, seed: int) -> Batches:
    """Simulate a stream loader's buffer of a window's size: take a random row, put in the next one."""
    draw = np.random.default_rng(seed)
    size = BLOCK_ROWS * WINDOW_BLOCKS
    # A row leaves after a geometric time: sorting by that time has the same distribution as running the buffer.
    moment = np.maximum(np.arange(rows) - size, 0) + draw.exponential(size, rows)
    order = np.argsort(moment)
    return in_pieces(lambda start, stop: order[start:stop], rows)


ORDERS = {
    "global shuffle": global_shuffle,
    "Loader": loader_order,
    "windows of blocks from anywhere": random_blocks,
    "shuffle buffer, 524,288 rows": shuffle_buffer,
    "file order (TorchRec's pipes, also shuffle_batches)": file_order,
}


def main(options: Options) -> None:
    per_day = options.rows / options.days
    print(f"numpy {np.__version__}; {options.rows:,} rows, {options.days} days, seed {options.seed}")
    columns = f"{'trend: spread':>13} {'lag 1':>6}  {'day: spread':>11} {'lag 1':>6}"
    print(f"{'order':<52} {'batch':>6} {'blocks':>7}  {columns}")
    for name, make in ORDERS.items():
        batches = make(options.rows, options.seed)
        for size in options.batch_sizes:
            blocks, trend, swing = [], [], []
            for rows in batches(size):
                blocks.append(len(np.unique(rows // BLOCK_ROWS)))
                trend.append(float(rows.mean()) / options.rows)
                swing.append(float(np.sin(rows * (2 * math.pi / per_day)).mean()))
            figures = []
            for means, deviation in ((np.array(trend), math.sqrt(1 / 12)), (np.array(swing), math.sqrt(1 / 2))):
                spread = float(means.std()) / (deviation / math.sqrt(size))
                lag = float(np.corrcoef(*zip(*pairwise(means), strict=True))[0, 1])
                figures.append((spread, lag))
            (a, b), (c, d) = figures
            print(f"{name:<52} {size:>6} {np.median(blocks):>7,.0f}  {a:>13.2f} {b:>6.2f}  {c:>11.2f} {d:>6.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

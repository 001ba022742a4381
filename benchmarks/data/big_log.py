"""Writes large raw click logs in Criteo's format, fast: columns of up to 40 million values, many fields missing.

    python -m benchmarks.data.big_log --output day_0 --rows 20000000
    python -m benchmarks.data.big_log --output day_0.zst --rows 2000000

The columns are as large as those of Criteo Terabyte (40 million at most, MLPerf's cap). A column's share of draws is
uniform over its range, the rest is log-uniform over the ranks (Zipf's law), so that there are both frequent values and
millions of values that occur once or twice. The labels are random, or with ``--clicks planted`` drawn from
``click_probability`` of a few columns, so that a model can learn them.

Rows are made in blocks, each from its own seed, so the bytes depend on ``--rows`` and ``--seed`` only. A block is a
matrix of bytes with a fixed position for every field, zero where the field is shorter; removing the zeros leaves the
text.

Shape letters: n rows of a block, W bytes of a row with zeros.
"""

import gzip
import itertools
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt
import tyro

BLOCK_ROWS = 1 << 16
# An odd factor maps distinct values to distinct values modulo 2^32, and spreads them.
ODD_FACTOR = np.uint32(2_654_435_761)

# Values of each categorical column: Criteo Terabyte's as MLPerf counts them, cut at 40 million.
RANGES = (
    *(40_000_000, 36_746, 17_245, 7_413, 20_243, 3, 7_114, 1_441, 62, 29_275_261, 1_572_176, 345_138, 10),
    *(2_209, 11_267, 128, 4, 974, 14, 40_000_000, 11_316_796, 40_000_000, 452_104, 12_606, 104, 35),
)
# Share of uniform draws where a column has millions of values, in their order; 0 for the others.
UNIFORM = (0.5, 0.3, 0.5, 0.9, 0.3, 0.1)
MILLIONS = 1_000_000
# Largest value of each numeric column, and the lowest one (Criteo's second column goes below zero).
LARGEST = (5_775, 257_675, 65_535, 969, 23_159_456, 431_037, 56_311, 6_047, 29_019, 46, 231, 4_008, 7_393)
LOWEST = (0, -3, *(0,) * 11)
# 256ths of the rows in which a field is missing: I1 to I13, then C1 to C26.
MISSING = (
    *(115, 0, 55, 56, 7, 57, 11, 1, 11, 115, 11, 196, 56),
    *(0, 0, 9, 9, 0, 31, 0, 0, 0, 0, 0, 9, 0),
    *(0, 0, 9, 0, 196, 113, 9, 9, 0, 0, 9, 113, 113),
)

# Categorical columns, from 0, that planted clicks depend on: few values each, so that every value can be learnt.
PLANTED = (5, 8, 12, 15, 16, 17, 18, 24, 25)

Bytes = npt.NDArray[np.uint8]
Clicks = Literal["random", "planted"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to write."""

    output: Path
    """File to write, compressed if it ends in .gz or .zst."""
    rows: int
    """Rows."""
    seed: int = 0
    """Random seed."""
    clicks: Clicks = "random"
    """Labels: random, or planted in a few columns."""
    processes: int = len(os.sched_getaffinity(0))
    """Processes that make blocks."""


def write_log(output: Path, rows: int, seed: int = 0, processes: int = 1, clicks: Clicks = "random") -> int:
    """Write a log, completely or not at all.

    Args:
        output: File to write, compressed if it ends in ``.gz`` or ``.zst``.
        rows: Number of rows.
        seed: Random seed.
        processes: Number of processes that make blocks.
        clicks: Labels: random, or planted in a few columns. The features are the same.

    Returns:
        Bytes of text before compression.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    total = 0
    with _opener(output)(partial) as file:
        for block in _blocks(rows, seed, processes, clicks):
            file.write(block)
            total += len(block)
    partial.replace(output)
    return total


def block_text(seed: int, index: int, rows: int, clicks: Clicks = "random") -> bytes:
    """Make one block.

    Args:
        seed: Seed of the log.
        index: Number of the block.
        rows: n.
        clicks: Labels: random, or planted in a few columns.

    Returns:
        n lines of text.
    """
    draw = np.random.Generator(np.random.SFC64([seed, index]))
    point = draw.random(rows, np.float32)
    fields = [
        *(_absent(draw, _number(draw, rows, column), MISSING[column]) for column in range(len(LARGEST))),
        *(
            _absent(draw, _category(draw, rows, column), MISSING[len(LARGEST) + column])
            for column in range(len(RANGES))
        ),
    ]
    first = len(LARGEST)
    rate = 0.25 if clicks == "random" else click_probability([fields[first + column] for column in PLANTED])
    fields.insert(0, (ord("0") + (point < rate)).astype(np.uint8)[:, None])
    width = sum(field.shape[1] + 1 for field in fields)
    text = np.full((rows, width), ord("\t"), np.uint8)
    place = 0
    for field in fields:
        text[:, place : place + field.shape[1]] = field
        place += field.shape[1] + 1
    text[:, -1] = ord("\n")
    return text.tobytes().translate(None, b"\0")


def click_probability(fields: list[Bytes]) -> npt.NDArray[np.float64]:
    """Return the probabilities [n] of planted clicks: each value of a column, and of pairs of neighbours, has a weight.

    Args:
        fields: The texts of the columns ``PLANTED``, each [n, 8], zeros where missing.
    """
    words = [np.ascontiguousarray(field).view(np.uint64)[:, 0] for field in fields]
    pairs = [one ^ (other << np.uint64(1)) for one, other in itertools.pairwise(words)]
    logit = np.full(len(words[0]), -1.4)
    for word in (*words, *pairs):
        mixed = (word ^ (word >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        logit += (mixed >> np.uint64(11)) * 2.0**-53 * 1.4 - 0.7
    return 1 / (1 + np.exp(-logit))


def skewed_ranks(draw: np.random.Generator, rows: int, values: int, uniform: float) -> npt.NDArray[np.uint32]:
    """Draw ranks in [1, values]: a share of ``uniform`` uniformly, the others log-uniformly."""
    point = draw.random(rows)
    rank = np.exp((point - uniform) * (np.log(values) / (1 - uniform)))
    if uniform:
        rank = np.where(point < uniform, 1 + point * (values / uniform), rank)
    # The largest ranks may be rounded up to values + 1.
    return np.minimum(rank.astype(np.uint32), np.uint32(values))


def _blocks(rows: int, seed: int, processes: int, clicks: Clicks) -> Iterator[bytes]:
    parts = [(seed, i, min(BLOCK_ROWS, rows - start), clicks) for i, start in enumerate(range(0, rows, BLOCK_ROWS))]
    if processes <= 1:
        yield from (block_text(*part) for part in parts)
        return
    # Not forked: the importing process may have threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        # Only a few blocks ahead: the writer may be slower.
        waiting: deque[Future[bytes]] = deque()
        for part in parts:
            waiting.append(pool.submit(block_text, *part))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _number(draw: np.random.Generator, rows: int, column: int) -> Bytes:
    """Decimal digits: a sign if the column has negative values, then one or two groups of four, no leading zeros."""
    lowest, largest = LOWEST[column], LARGEST[column]
    span = np.log(np.float32(largest - lowest + 1))
    value = np.exp(draw.random(rows, np.float32) * span).astype(np.int32) + np.int32(lowest - 1)
    groups = []
    if lowest < 0:
        groups.append(np.where(value < 0, np.uint8(ord("-")), np.uint8(0))[:, None])
        value = np.abs(value)
    # After another group the last one keeps its leading zeros; a single 0 is written.
    kind = np.where(value == 0, np.int32(20_000), np.int32(0))
    if largest >= 10_000:
        high = value // np.int32(10_000)
        value -= high * np.int32(10_000)
        groups.append(_DECIMAL[high].view(np.uint8).reshape(rows, 4))
        kind += (high > 0) * np.int32(10_000)
    groups.append(_DECIMAL[value + kind].view(np.uint8).reshape(rows, 4))
    return np.concatenate(groups, axis=1) if len(groups) > 1 else groups[0]


def _category(draw: np.random.Generator, rows: int, column: int) -> Bytes:
    """Eight hexadecimal digits [n, 8]."""
    values = RANGES[column]
    uniform = UNIFORM[sum(size > MILLIONS for size in RANGES[:column])] if values > MILLIONS else 0.0
    value = skewed_ranks(draw, rows, values, uniform) * ODD_FACTOR + np.uint32(column)
    text = np.empty((rows, 2), np.uint32)
    text[:, 0] = _HEXADECIMAL[value >> np.uint32(16)]
    text[:, 1] = _HEXADECIMAL[value & np.uint32(0xFFFF)]
    return text.view(np.uint8)


def _absent(draw: np.random.Generator, field: Bytes, share: int) -> Bytes:
    if share:
        field[draw.integers(0, 256, len(field), np.uint8) < share] = 0
    return field


def _decimal_table() -> npt.NDArray[np.uint32]:
    """Four digits each: 0 to 9999 without leading zeros (0 is empty), then with them, then a single 0."""
    short = [b"" if number == 0 else b"%d" % number for number in range(10_000)]
    full = [b"%04d" % number for number in range(10_000)]
    digits = b"".join(text.rjust(4, b"\0") for text in (*short, *full, b"0"))
    return np.frombuffer(digits, np.uint32)


# The four digits of 0 to 0xFFFF, as one uint32 each.
_HEXADECIMAL = np.frombuffer(b"".join(b"%04x" % number for number in range(1 << 16)), np.uint32)
_DECIMAL = _decimal_table()


def _opener(output: Path) -> Callable[[Path], BinaryIO]:
    if output.suffix == ".gz":
        return lambda path: cast(BinaryIO, gzip.GzipFile(path, "wb", compresslevel=1, mtime=0))
    if output.suffix == ".zst":
        import pyarrow as pa

        return lambda path: cast(BinaryIO, pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd"))
    return lambda path: path.open("wb")


def main(options: Options) -> None:
    started = time.perf_counter()
    total = write_log(options.output, options.rows, options.seed, options.processes, options.clicks)
    seconds = time.perf_counter() - started
    print(
        f"{options.output}: {options.rows:,} rows, {total / 1e9:.2f} GB of text in {seconds:.1f} s, "
        f"{options.rows / seconds:,.0f} rows/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

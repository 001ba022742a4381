"""What is learned from the numbers of the training rows, for the transforms that depend on it.

The result depends on the rows alone, to the last bit: sums run over blocks of a fixed number of rows, one source after
another, and the rows for quantiles are drawn by their number.

Shape letters: n rows, L columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS: Final = 65_536
# Most training rows that quantiles are taken from: a rank is then off by 0.0016 (one standard deviation) at most.
SAMPLE_ROWS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class ColumnStatistics:
    """The training values of a numeric column.

    Args:
        rows: Training rows.
        missing: Those without a value.
        mean: Of the values.
        std: Their standard deviation (of a population); 0 where all are equal.
        minimum: The smallest value.
        maximum: The largest value.
        quantiles: q + 1 of them, from the smallest value to the largest at equal shares of the rows; empty where the
            transform needs none.
    """

    rows: int
    missing: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: tuple[float, ...] = ()


class Survey:
    """Collects the numbers of one source after another, as they arrive.

    Args:
        columns: L.
        key: Distinguishes this source from the others; the drawn rows follow from it.

    Example:
        >>> survey = Survey(1, key=0)
        >>> survey.add(np.array([[1.0], [np.nan], [3.0]]))
        >>> survey.finish()
        >>> merged([survey.content()], [2])[0]
        ColumnStatistics(rows=3, missing=1, mean=2.0, std=1.0, minimum=1.0, maximum=3.0, quantiles=(1.0, 2.0, 3.0))
    """

    def __init__(self, columns: int, *, key: int) -> None:
        self._bits = np.random.Generator(np.random.PCG64(np.random.SeedSequence((key, 1))))
        self._held: list[NDArray[np.float64]] = []
        self._rows = 0
        self._moments = _no_moments(columns)
        self._keys = np.empty(0)
        self._drawn = np.empty((0, columns))

    def add(self, values: NDArray[np.float64]) -> None:
        """Take float64 [n, L]; NaN is missing."""
        self._held.append(values)
        self._rows += len(values)
        if self._rows >= BLOCK_ROWS:
            held = np.concatenate(self._held)
            while len(held) >= BLOCK_ROWS:
                self._block(held[:BLOCK_ROWS])
                held = held[BLOCK_ROWS:]
            self._held, self._rows = [held], len(held)

    def finish(self) -> None:
        """Take in what is left of the last block."""
        if self._rows:
            self._block(np.concatenate(self._held))
        self._held, self._rows = [], 0

    def _block(self, values: NDArray[np.float64]) -> None:
        self._moments = _joined(self._moments, _moments_of(values))
        keys = np.concatenate([self._keys, self._bits.random(len(values))])
        drawn = np.concatenate([self._drawn, values])
        kept = np.sort(np.argsort(keys, kind="stable")[:SAMPLE_ROWS])
        self._keys, self._drawn = keys[kept], drawn[kept]

    def content(self) -> dict[str, NDArray[Any]]:
        """Return what ``merged`` takes, as arrays that ``numpy.savez`` writes."""
        return {**self._moments, "keys": self._keys, "drawn": self._drawn}


def merged(sources: Sequence[dict[str, NDArray[Any]]], quantiles: Sequence[int]) -> list[ColumnStatistics]:
    """Join ``Survey.content`` of several sources, in their order, into the statistics of L columns.

    ``quantiles``: how many equal shares of the rows they divide, by column; 0 for none. A column without any value has
    zeros.
    """
    moments = _no_moments(len(quantiles))
    for source in sources:
        moments = _joined(moments, source)
    keys = np.concatenate([source["keys"] for source in sources])
    drawn = np.concatenate([source["drawn"] for source in sources])[np.argsort(keys, kind="stable")[:SAMPLE_ROWS]]
    found = []
    for j, shares in enumerate(quantiles):
        count = int(moments["count"][j])
        values = drawn[:, j][~np.isnan(drawn[:, j])]
        low, high = (float(moments[key][j]) if count else 0.0 for key in ("low", "high"))
        points: list[float] = []
        if shares:
            # The ends are those of all rows, drawn or not.
            inner = np.quantile(values, np.linspace(0, 1, shares + 1)) if len(values) else np.zeros(shares + 1)
            points = np.maximum.accumulate([low, *inner[1:-1], high]).tolist()
        found.append(
            ColumnStatistics(
                rows=int(moments["rows"][j]),
                missing=int(moments["rows"][j]) - count,
                mean=float(moments["mean"][j]) if high > low else low,
                std=float(np.sqrt(moments["squares"][j] / max(count, 1))) if high > low else 0.0,
                minimum=low,
                maximum=high,
                quantiles=tuple(points),
            )
        )
    return found


def _no_moments(columns: int) -> dict[str, NDArray[Any]]:
    return {
        "rows": np.zeros(columns, np.int64),
        "count": np.zeros(columns, np.int64),
        "mean": np.zeros(columns),
        "squares": np.zeros(columns),
        "low": np.full(columns, np.inf),
        "high": np.full(columns, -np.inf),
    }


def _moments_of(values: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    given = ~np.isnan(values)
    count = given.sum(axis=0)
    filled = np.where(given, values, 0.0)
    # Divided first: the sum of values near the largest float64 would be infinite.
    mean = (filled / np.maximum(count, 1)).sum(axis=0)
    with np.errstate(over="ignore"):
        squares = np.where(given, (values - mean) ** 2, 0.0).sum(axis=0)
    return {
        "rows": np.full(values.shape[1], len(values)),
        "count": count,
        "mean": mean,
        "squares": np.minimum(squares, np.finfo(np.float64).max),
        "low": np.where(given, values, np.inf).min(axis=0, initial=np.inf),
        "high": np.where(given, values, -np.inf).max(axis=0, initial=-np.inf),
    }


def _joined(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Moments of both (Chan, Golub and LeVeque: Updating formulae and a pairwise algorithm, 1979)."""
    count = one["count"] + other["count"]
    share = other["count"] / np.maximum(count, 1)
    apart = other["mean"] - one["mean"]
    with np.errstate(over="ignore"):
        squares = one["squares"] + other["squares"] + apart**2 * one["count"] * share
    return {
        "rows": one["rows"] + other["rows"],
        "count": count,
        "mean": one["mean"] + apart * share,
        "squares": np.minimum(squares, np.finfo(np.float64).max),
        "low": np.minimum(one["low"], other["low"]),
        "high": np.maximum(one["high"], other["high"]),
    }

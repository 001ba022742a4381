"""Confidence intervals by the bootstrap: percentiles of a metric over resamples of the rows or of the users.

Shape letters: N rows, R resamples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
# The independent random streams of a seed.
ROWS, USERS = 0, 1


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How to resample; the same seed and rows give the same intervals."""

    resamples: int
    confidence: float = 0.95
    seed: int = 0

    def times(self, count: int, stream: int) -> Iterator[Times]:
        """Yield how often each of ``count`` rows or users is drawn in each resample: [count] integers."""
        rng = np.random.default_rng((self.seed, stream))
        for _ in range(self.resamples):
            yield np.bincount(rng.integers(0, count, count), minlength=count)

    def interval(self, values: Sequence[float | None]) -> tuple[float, float] | None:
        """The percentile interval of the values of the resamples; None if fewer than two have one."""
        known = np.array([value for value in values if value is not None], np.float64)
        if len(known) < 2:
            return None
        low, high = np.quantile(known, [(1.0 - self.confidence) / 2.0, (1.0 + self.confidence) / 2.0])
        return float(low), float(high)


class RowMetrics:
    """AUC, log loss, NE and calibration of N rows that count several times; sorts them once.

    ``weights`` are those of the rows; None if equal.
    """

    NAMES = ("auc", "logloss", "ne", "calibration")

    def __init__(
        self, logits: NDArray[np.float32], labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None
    ) -> None:
        self._weights = None if weights is None else weights.astype(np.float64)
        z, y = logits.astype(np.float64), labels.astype(np.float64)
        self._losses = np.logaddexp(0.0, z) - y * z
        self._predicted = 0.5 + 0.5 * np.tanh(0.5 * z)
        self._clicks = labels.astype(np.int64)
        self._order = np.argsort(logits, kind="stable")
        ordered = logits[self._order]
        self._ties = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._sorted_clicks = self._clicks[self._order]

    def __call__(self, times: NDArray[Any]) -> dict[str, float | None]:
        """Compute the metrics where row i counts ``times[i]`` times."""
        times = times if self._weights is None else times * self._weights
        rows, clicks = times.sum().item(), (times @ self._clicks).item()
        if not rows:
            return dict.fromkeys(self.NAMES)
        logloss = float(times @ self._losses) / rows
        rate = clicks / rows
        calibration = float(times @ self._predicted) / clicks if clicks else None
        if not 0 < clicks < rows:
            return {"auc": None, "logloss": logloss, "ne": None, "calibration": calibration}
        ordered = times[self._order]
        positives = np.add.reduceat(ordered * self._sorted_clicks, self._ties)
        negatives = np.add.reduceat(ordered, self._ties) - positives
        below = np.cumsum(negatives) - negatives
        wins = (positives * (2 * below + negatives)).sum().item()
        entropy = -(rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate))
        return {
            "auc": wins / (2 * clicks * (rows - clicks)),
            "logloss": logloss,
            "ne": logloss / float(entropy),
            "calibration": calibration,
        }


def intervals(
    how: Bootstrap, count: int, stream: int, measure: Callable[[Times], Mapping[str, float | None]]
) -> dict[str, tuple[float, float] | None]:
    """Compute the interval of every metric that ``measure`` returns for a resample of ``count`` rows or users."""
    found: dict[str, list[float | None]] = {}
    for times in how.times(count, stream):
        for name, value in measure(times).items():
            found.setdefault(name, []).append(value)
    return {name: how.interval(values) for name, values in found.items()}

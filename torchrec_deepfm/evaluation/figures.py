"""All figures of some rows: metrics, metrics by user, intervals, slices, and differences between two runs.

Shape letters: N rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.evaluation.bootstrap import ROWS, USERS, Bootstrap, RowMetrics, Times, intervals
from torchrec_deepfm.evaluation.ranking import user_metrics
from torchrec_deepfm.training.scoring.metrics import compute_metrics

Values = Mapping[str, float | None]
Measure = Callable[[Times], Values]


@dataclass(frozen=True, kw_only=True)
class Keys:
    """A column by which rows are grouped.

    Attributes:
        codes: int64 [N]; -1 where the value is missing.
        names: the value of each code: ``names[code]``, or the code itself without names.
    """

    codes: NDArray[np.int64]
    names: Sequence[str | None] | None = None

    def name(self, code: int) -> str | int | None:
        """The value of a code; None where it is missing."""
        if code < 0:
            return None
        return code if self.names is None else self.names[code]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Labelled rows with the predictions of one run, or of two.

    Attributes:
        labels: [N] of 0 and 1.
        logits: [N] for each run.
        users: the user of each row, if they are known.
        weights: [N] of the rows, for the metrics that are not by user; None if equal.
    """

    labels: NDArray[np.float32]
    logits: tuple[NDArray[np.float32], ...]
    users: Keys | None = None
    weights: NDArray[np.float32] | None = None

    def take(self, rows: NDArray[np.bool_]) -> "Sample":
        """Return some of the rows."""
        users = None if self.users is None else Keys(codes=self.users.codes[rows])
        return Sample(
            labels=self.labels[rows],
            logits=tuple(each[rows] for each in self.logits),
            users=users,
            weights=None if self.weights is None else self.weights[rows],
        )


def figures(sample: Sample, ks: Sequence[int], how: Bootstrap | None) -> dict[str, Any]:
    """Compute all figures of a sample of at least one row.

    The metrics of the first run as ``Metrics.to_json``. With users, ``users`` and ``rows_without_user`` count them and
    ``by_user`` has their metrics for each of ``ks``. With resamples, ``intervals`` has the lower and upper border by
    metric. With a second run, ``compare`` has its ``metrics``, the ``difference`` first minus second, and its
    ``intervals``.
    """
    runs = [_Measured(sample, logits, ks) for logits in sample.logits]
    found: dict[str, Any] = {**runs[0].metrics, **runs[0].counts}
    if sample.users is not None:
        found["by_user"] = runs[0].by_user
    ranges: dict[str, Any] = {}
    if how is not None:
        measures = [RowMetrics(z, sample.labels, sample.weights) for z in sample.logits]
        rows = intervals(how, len(sample.labels), ROWS, _paired(measures))
        users = intervals(how, runs[0].users, USERS, _paired([run.resampled for run in runs])) if runs[0].users else {}
        ranges = rows | users
        found["intervals"] = {name: border for name, border in ranges.items() if not name.startswith(_DIFFERENCE)}
    if len(runs) == 2:
        one, other = ({**run.metrics, **run.by_user} for run in runs)
        found["compare"] = {
            "metrics": other,
            "difference": {name: _minus(one[name], other[name]) for name in one if name != "rows"},
        }
        if how is not None:
            found["compare"]["intervals"] = {
                name.removeprefix(_DIFFERENCE): border
                for name, border in ranges.items()
                if name.startswith(_DIFFERENCE)
            }
    return found


def slices(sample: Sample, keys: Keys, ks: Sequence[int], how: Bootstrap | None, most: int) -> list[dict[str, Any]]:
    """Compute the figures of the rows of each value of a column; the rest as in ``figures``.

    They come by falling number of rows, each with its ``value`` (None: missing); after the first ``most`` values those
    of all others, with their number as ``others``.
    """
    codes, counts = np.unique(keys.codes, return_counts=True)
    order = np.lexsort((codes, -counts))
    found = [
        {"value": keys.name(int(code)), **figures(sample.take(keys.codes == code), ks, how)}
        for code in codes[order[:most]]
    ]
    if len(codes) > most:
        left = np.isin(keys.codes, codes[order[most:]])
        found.append({"others": len(codes) - most, **figures(sample.take(left), ks, how)})
    return found


class _Measured:
    """The metrics of one run's predictions; ``resampled`` are those by user where each counts several times."""

    def __init__(self, sample: Sample, logits: NDArray[np.float32], ks: Sequence[int]) -> None:
        self.metrics: dict[str, Any] = compute_metrics(logits, sample.labels, 0, sample.weights).to_json()
        self.counts: dict[str, int] = {}
        self.users = 0
        self._by_user = {}
        if sample.users is not None:
            known = sample.users.codes >= 0
            self._by_user = dict(user_metrics(sample.users.codes[known], logits[known], sample.labels[known], ks))
            self.users = len(self._by_user["gauc"].values)
            self.counts = {"users": self.users, "rows_without_user": int((~known).sum())}
        self.by_user = {name: metric.mean() for name, metric in self._by_user.items()}

    def resampled(self, times: Times) -> Values:
        return {name: metric.mean(times) for name, metric in self._by_user.items()}


_DIFFERENCE = "difference "


def _paired(measures: Sequence[Measure]) -> Measure:
    """Measure one run, or two on the same draws: the first, and the differences to the second."""

    def measure(times: Times) -> Values:
        one = measures[0](times)
        if len(measures) == 1:
            return one
        other = measures[1](times)
        return {**one, **{f"{_DIFFERENCE}{name}": _minus(one[name], other[name]) for name in one}}

    return measure


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other

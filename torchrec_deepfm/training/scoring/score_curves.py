"""How the scores of a split order its samples: ROC, precision and recall, and a histogram by class.

Shape letters: N samples, T thresholds, B bins.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Between two kept thresholds either rate of the ROC changes by less than 1 / GRID, and the number of samples by less
# than a factor of 2 ** (1 / PER_DOUBLING), unless all of them have the same score.
GRID: Final = 256
PER_DOUBLING: Final = 8
_BINS: Final = 48
_TAIL: Final = 0.001  # share of the samples in either tail, which the first and the last bin take in


@dataclass(frozen=True, kw_only=True)
class ScoreCurves:
    """Curves of N predictions; all counts are exact.

    Attributes:
        positives: samples of label 1.
        negatives: samples of label 0.
        average_precision: as ``sklearn.metrics.average_precision_score``, over all thresholds; None with one class.
        thresholds: T logits, falling: a sample is taken for positive if its logit is at least as large. At most
            2 * GRID + PER_DOUBLING * log2(N) + 3 of all thresholds, spread evenly over the curves.
        true_positives: T counts.
        false_positives: T counts.
        edges: B + 1 logits, the borders of equally wide bins.
        histogram_positives: B counts; the first and the last bin take in what lies outside.
        histogram_negatives: B counts.
    """

    positives: int
    negatives: int
    average_precision: float | None
    thresholds: list[float]
    true_positives: list[int]
    false_positives: list[int]
    edges: list[float]
    histogram_positives: list[int]
    histogram_negatives: list[int]


def score_curves(logits: NDArray[np.floating], labels: NDArray[np.floating]) -> ScoreCurves:
    """Compute the curves of finite logits [N], N > 0; memory for a few arrays of N numbers.

    Example:
        >>> found = score_curves(np.array([2.0, 1.0, 1.0, -1.0]), np.array([1, 1, 0, 0]))
        >>> found.thresholds, found.true_positives, found.false_positives
        ([2.0, 1.0, -1.0], [1, 2, 2], [0, 1, 2])
    """
    order = np.argsort(logits)[::-1]
    scores, hits = logits[order], np.cumsum(labels[order] > 0.5)
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last sample of each score
    true = hits[ends]
    false = ends + 1 - true
    positives, negatives = int(true[-1]), int(false[-1])
    average_precision = None
    if positives and negatives:
        average_precision = float(np.sum(np.diff(true, prepend=0) * (true / (true + false))) / positives)
    cells = np.stack(
        [
            GRID * true // max(positives, 1),
            GRID * false // max(negatives, 1),
            np.floor(PER_DOUBLING * np.log2(ends + 1)).astype(np.int64),
        ]
    )
    kept = np.append(True, (cells[:, 1:] != cells[:, :-1]).any(axis=0))
    kept[-1] = True
    low, high = scores[-1 - int(_TAIL * (len(scores) - 1))], scores[int(_TAIL * (len(scores) - 1))]
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1, dtype=np.float64)
    places = np.clip(np.searchsorted(edges, logits, side="right") - 1, 0, _BINS - 1)
    both = np.bincount(places, minlength=_BINS)
    hit = np.bincount(places[labels > 0.5], minlength=_BINS)
    return ScoreCurves(
        positives=positives,
        negatives=negatives,
        average_precision=average_precision,
        thresholds=scores[ends][kept].astype(np.float64).tolist(),
        true_positives=true[kept].tolist(),
        false_positives=false[kept].tolist(),
        edges=edges.tolist(),
        histogram_positives=hit.tolist(),
        histogram_negatives=(both - hit).tolist(),
    )

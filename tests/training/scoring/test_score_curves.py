"""ROC, precision and recall, and histograms against scikit-learn and plain counting."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_curve

from torchrec_deepfm.training.scoring.score_curves import GRID, PER_DOUBLING, score_curves


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 1)), min_size=1, max_size=60))
def test_counts_are_those_of_the_thresholds(pairs: list[tuple[int, int]]) -> None:
    logits, labels = np.float32([z for z, _ in pairs]), np.float32([y for _, y in pairs])
    found = score_curves(logits, labels)
    assert (found.positives, found.negatives) == (int(labels.sum()), len(pairs) - int(labels.sum()))
    for threshold, true, false in zip(found.thresholds, found.true_positives, found.false_positives, strict=True):
        assert true == sum(z >= threshold and y == 1 for z, y in pairs)
        assert false == sum(z >= threshold and y == 0 for z, y in pairs)
    assert found.thresholds == sorted({float(z) for z in logits}, reverse=True)  # few rows: all are kept
    assert sum(found.histogram_positives) == found.positives
    assert sum(found.histogram_negatives) == found.negatives
    if found.positives and found.negatives:
        assert found.average_precision == pytest.approx(average_precision_score(labels, logits), abs=1e-12)
    else:
        assert found.average_precision is None


@pytest.mark.parametrize("ties", [False, True])
def test_many_thresholds_are_thinned_within_the_bound(ties: bool) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(200_000) < 0.03).astype(np.float32)
    logits = rng.normal(labels * 1.5 - 3.0).astype(np.float32)
    if ties:
        logits = np.round(logits)
    found = score_curves(logits, labels)
    assert found.average_precision == pytest.approx(average_precision_score(labels, logits), abs=1e-9)
    assert len(found.thresholds) <= 2 * GRID + PER_DOUBLING * math.log2(len(labels)) + 3
    false_rate, true_rate, _ = roc_curve(labels, logits, drop_intermediate=False)
    kept_false = np.array([0, *found.false_positives]) / found.negatives
    kept_true = np.array([0, *found.true_positives]) / found.positives
    # Every exact point has a kept one before it that is less than one cell away in both directions.
    before = np.searchsorted(kept_false + kept_true, false_rate + true_rate + 1e-12, side="right") - 1
    assert (false_rate - kept_false[before]).max() < 1 / GRID
    assert (true_rate - kept_true[before]).max() < 1 / GRID
    exact = set(zip(false_rate.tolist(), true_rate.tolist(), strict=True))
    assert set(zip(kept_false.tolist(), kept_true.tolist(), strict=True)) <= exact


def test_the_histogram_takes_in_the_tails() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 5000).astype(np.float32)
    logits = rng.normal(size=5000).astype(np.float32)
    logits[:2] = [-1000.0, 1000.0]
    found = score_curves(logits, labels)
    assert -5 < found.edges[0] < found.edges[-1] < 5
    inner = [
        sum(low <= z < high and y == 1 for z, y in zip(logits.tolist(), labels.tolist(), strict=True))
        for low, high in zip(found.edges[1:-2], found.edges[2:-1], strict=True)
    ]
    assert found.histogram_positives[1:-1] == inner
    below = sum(z < found.edges[1] and y == 1 for z, y in zip(logits.tolist(), labels.tolist(), strict=True))
    assert found.histogram_positives[0] == below

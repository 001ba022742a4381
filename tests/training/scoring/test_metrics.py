"""The metrics against their definitions in plain Python."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from torchrec_deepfm.training.scoring.metrics import Metrics, compute_metrics, lift, reliability


def compute(logits: list[float], labels: list[int]) -> Metrics:
    return compute_metrics(np.array(logits, np.float32), np.array(labels, np.float32))


def auc_by_pairs(logits: list[float], labels: list[int]) -> float:
    """Share of the pairs (click, no click) in which the click has the larger logit; a tie counts half."""
    clicks = [z for z, y in zip(logits, labels, strict=True) if y == 1]
    others = [z for z, y in zip(logits, labels, strict=True) if y == 0]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in clicks for b in others)
    return wins / (len(clicks) * len(others))


def probability(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def logloss(logits: list[float], labels: list[int]) -> float:
    losses = [
        -math.log(probability(z)) if y else -math.log(1.0 - probability(z)) for z, y in zip(logits, labels, strict=True)
    ]
    return math.fsum(losses) / len(losses)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=1, max_size=40))
def test_auc_is_that_of_all_pairs_with_ties_half(pairs: list[tuple[int, int]]) -> None:
    logits, labels = [float(z) for z, _ in pairs], [y for _, y in pairs]
    auc = compute(logits, labels).auc
    if len(set(labels)) == 1:
        assert auc is None
    else:
        assert auc == pytest.approx(auc_by_pairs(logits, labels), abs=1e-12)


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 300, 1 << 20])
def test_every_metric_is_its_definition(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_deepfm.training.scoring.metrics._PART", rows_at_a_time)
    rng = random.Random(0)
    logits = [round(rng.gauss(-1.0, 2.0) * 8) / 8 for _ in range(300)]  # exact in float32, with ties
    labels = [int(rng.random() < 0.3) for _ in logits]
    metrics = compute(logits, labels)
    rate = sum(labels) / len(labels)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert metrics.rows == 300
    assert metrics.auc == pytest.approx(auc_by_pairs(logits, labels), abs=1e-12)
    assert metrics.logloss == pytest.approx(logloss(logits, labels), rel=1e-12)
    assert metrics.ne == pytest.approx(logloss(logits, labels) / entropy, rel=1e-12)
    assert metrics.calibration == pytest.approx(math.fsum(map(probability, logits)) / len(logits) / rate, rel=1e-12)


def test_who_predicts_the_base_rate_knows_nothing_and_is_calibrated() -> None:
    metrics = compute([-math.log(3.0)] * 8, [1, 0, 0, 0] * 2)  # the logit of 1/4
    assert metrics.auc == 0.5
    assert metrics.ne == pytest.approx(1.0, rel=1e-6)
    assert metrics.calibration == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("size", [100.0, 30_000.0])
def test_extreme_logits(size: float) -> None:
    # -log(sigmoid(z)) is -z far below zero and 0 far above; sigmoid(z) is then 0 or 1.
    wrong_twice = compute([size, -size, size, -size], [0, 1, 1, 0])
    assert wrong_twice.logloss == pytest.approx(2 * size / 4, rel=1e-12)
    assert wrong_twice.auc == 0.5  # of the four pairs one is won, one lost and two are tied
    assert wrong_twice.ne == pytest.approx(size / 2 / math.log(2.0), rel=1e-12)
    assert wrong_twice.calibration == pytest.approx(1.0, abs=1e-12)
    right = compute([size, -size], [1, 0])
    assert right.logloss == pytest.approx(0.0, abs=1e-40)
    assert right.auc == 1.0


@pytest.mark.parametrize("label", [0, 1])
def test_a_set_of_one_class(label: int) -> None:
    metrics = compute([1.0, -2.0], [label, label])
    assert (metrics.auc, metrics.ne, metrics.rows) == (None, None, 2)
    assert metrics.logloss == pytest.approx(logloss([1.0, -2.0], [label, label]), rel=1e-12)
    expected = (probability(1.0) + probability(-2.0)) / 2 if label else None
    assert metrics.calibration == (pytest.approx(expected, rel=1e-12) if label else None)


def test_json() -> None:
    metrics = Metrics(rows=3, logloss=0.5, auc=None, ne=None, calibration=1.5)
    assert metrics.to_json() == {"rows": 3, "logloss": 0.5, "auc": None, "ne": None, "calibration": 1.5}


@pytest.mark.parametrize(("auc", "expected"), [(0.5, 0.0), (0.75, 1.0), (0.625, 0.5), (0.45, -0.2), (0.8, 1.2)])
def test_lift(auc: float, expected: float) -> None:
    assert lift(auc, 0.75) == expected


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 1)), min_size=1, max_size=60),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_the_reliability_curve_is_that_of_sklearn(pairs: list[tuple[int, int]], bins: int, rng: random.Random) -> None:
    rng.shuffle(pairs)
    predicted, labels = np.array([p / 50 for p, _ in pairs]), np.array([float(y) for _, y in pairs])
    curve = reliability(predicted, labels, bins)
    observed, means = calibration_curve(labels, predicted, n_bins=bins, strategy="quantile", pos_label=1)
    assert [one.observed for one in curve] == pytest.approx(observed.tolist(), abs=1e-12)
    assert [one.predicted for one in curve] == pytest.approx(means.tolist(), abs=1e-12)
    # What scikit-learn does not return: the bins are a partition of the samples, in the order of their predictions.
    inside = [[(p, y) for p, y in zip(predicted, labels, strict=True) if one.low <= p <= one.high] for one in curve]
    assert [one.rows for one in curve] == [len(members) for members in inside]
    assert sum(one.rows for one in curve) == len(pairs)
    assert [(one.low, one.high) for one in curve] == [(min(members)[0], max(members)[0]) for members in inside]
    for one, members in zip(curve, inside, strict=True):
        assert one.observed == pytest.approx(sum(y for _, y in members) / len(members), abs=1e-12)
        assert one.predicted == pytest.approx(math.fsum(p for p, _ in members) / len(members), abs=1e-12)


def test_the_order_of_the_samples_is_not_part_of_the_curve() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(-3, 1, 5000).astype(np.float32), (rng.random(5000) < 0.05).astype(np.float32)
    one = compute_metrics(logits, labels, bins=20)
    order = rng.permutation(5000)
    other = compute_metrics(logits[order], labels[order], bins=20)
    assert [(b.low, b.high, b.rows, b.observed) for b in one.reliability] == [
        (b.low, b.high, b.rows, b.observed) for b in other.reliability
    ]
    assert {b.rows for b in one.reliability} == {250}
    assert "reliability" not in one.to_json()
    assert compute_metrics(logits, labels).reliability == ()


def test_a_curve_of_odd_sets() -> None:
    assert [b.rows for b in compute_metrics(np.zeros(7, np.float32), np.ones(7, np.float32), 20).reliability] == [7]
    assert reliability(np.array([0.5, math.nan]), np.array([0.0, 1.0]), 5) == ()
    [alone] = compute_metrics(np.float32([100.0]), np.float32([0.0]), 20).reliability
    assert (alone.low, alone.high, alone.rows, alone.observed) == (1.0, 1.0, 1, 0.0)

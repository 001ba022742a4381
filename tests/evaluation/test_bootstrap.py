"""Intervals against scipy's bootstrap on the same draws, and resampled rows against scikit-learn."""

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import log_loss, roc_auc_score

from torchrec_deepfm.evaluation.bootstrap import ROWS, USERS, Bootstrap, RowMetrics, intervals


def sample(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    logits = (rng.normal(-1.0, 1.5, rows) * 16).round() / 16  # ties
    labels = rng.random(rows) < 1 / (1 + np.exp(-logits))
    return logits.astype(np.float32), labels.astype(np.float32)


def test_rows_that_count_twice_are_rows_given_twice() -> None:
    logits, labels = sample(400)
    times = np.random.default_rng(0).integers(0, 4, 400)
    found = RowMetrics(logits, labels)(times)
    z, y = (np.repeat(each.astype(np.float64), times) for each in (logits, labels))
    predicted, rate = 1 / (1 + np.exp(-z)), y.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert found == pytest.approx(
        {
            "auc": roc_auc_score(y, z),
            "logloss": log_loss(y, predicted),
            "ne": log_loss(y, predicted) / entropy,
            "calibration": predicted.mean() / rate,
        },
        rel=1e-12,
    )


@pytest.mark.parametrize("clicks", [0.0, 1.0])
def test_one_class(clicks: float) -> None:
    found = RowMetrics(np.float32([0.0, 1.0]), np.float32([clicks, clicks]))(np.array([1, 1]))
    assert found["auc"] is None
    assert found["ne"] is None
    assert (found["calibration"] is None) == (clicks == 0.0)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_are_scipys(confidence: float) -> None:
    logits, labels = sample(301)
    how = Bootstrap(resamples=60, confidence=confidence, seed=5)
    found = intervals(how, 301, ROWS, RowMetrics(logits, labels))
    for name, statistic in {
        "auc": roc_auc_score,
        "logloss": lambda y, z: log_loss(y, 1 / (1 + np.exp(-z.astype(np.float64)))),
    }.items():
        scipys = scipy.stats.bootstrap(
            (labels, logits),
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=60,
            confidence_level=confidence,
            method="percentile",
            random_state=np.random.default_rng((5, ROWS)),
        ).confidence_interval
        assert found[name] == pytest.approx((scipys.low, scipys.high), rel=1e-9)


def test_a_seed_gives_the_same_draws_and_streams_differ() -> None:
    def draws(seed: int, stream: int) -> list[list[int]]:
        return [times.tolist() for times in Bootstrap(resamples=3, seed=seed).times(50, stream)]

    assert draws(1, ROWS) == draws(1, ROWS)
    assert len({str(draws(seed, stream)) for seed in (1, 2) for stream in (ROWS, USERS)}) == 4
    assert all(sum(times) == 50 for times in draws(1, ROWS))


def test_resamples_without_a_value_are_left_out() -> None:
    assert Bootstrap(resamples=3).interval([None, None, 0.5]) is None
    assert Bootstrap(resamples=3, confidence=0.5).interval([None, 0.0, 1.0]) == (0.25, 0.75)

"""Patience and plateaus, against a plain reading of their definition."""

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_deepfm.training.monitoring.early_stopping import Tracker, TrackerState
from torchrec_deepfm.training.run.formats import convert
from torchrec_deepfm.training.scoring.metrics import Metrics

VALUES = st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(0, 5).map(lambda n: n / 5)), max_size=25)


def runs_without_better(values: list[float | None], *, highest: bool) -> list[int]:
    """After each evaluation: how many in a row, up to it, are not better than the best before them."""
    counts = []
    for end in range(1, len(values) + 1):
        usable = [(value if highest else -value, -i) for i, value in enumerate(values[:end]) if value is not None]
        usable = [(value, i) for value, i in usable if not math.isnan(value)]
        last_best = -max(usable)[1] if usable else -1
        counts.append(end - 1 - last_best)
    return counts


@given(VALUES, st.integers(1, 4), st.booleans())
def test_it_stops_when_patience_runs_out(values: list[float | None], patience: int, highest: bool) -> None:
    tracker = Tracker(metric="auc" if highest else "logloss", patience=patience)
    stops = [tracker.update(step, value).stop for step, value in enumerate(values)]
    assert stops == [count >= patience for count in runs_without_better(values, highest=highest)]


@given(VALUES)
def test_the_best_is_the_first_of_the_highest(values: list[float | None]) -> None:
    tracker = Tracker(metric="auc")
    for step, value in enumerate(values):
        tracker.update(step, value)
    usable = [value for value in values if value is not None and not math.isnan(value)]
    assert tracker.best_value == (max(usable) if usable else None)
    assert tracker.best_step == (values.index(max(usable)) if usable else None)
    assert not tracker.stopped


def test_rates_drop_again_and_again() -> None:
    tracker = Tracker(metric="logloss", lr_patience=2, lr_factor=0.5)
    drops = [tracker.update(step, value).drop for step, value in enumerate([0.5, 0.6, 0.6, 0.6, 0.6, 0.4, 0.5, 0.5])]
    assert drops == [False, False, True, False, True, False, False, True]
    assert tracker.factor == 0.125


def test_it_does_what_fuxictr_does() -> None:
    """FuxiCTR's BaseModel by its defaults: an evaluation that is not better cuts the rate to a tenth, two in a row end.

    It monitors {"AUC": 1, "logloss": -1} in its experiments. (It also wants a gain of 1e-6, and cuts to 1e-6 at most.)
    """
    aucs = [0.970, 0.975, 0.974, 0.976, 0.9765, 0.976, 0.975, 0.98]
    loglosses = [0.20, 0.18, 0.17, 0.175, 0.176, 0.16, 0.19, 0.10]
    rate, best, bad, expected = 1.0, -math.inf, 0, []
    for auc, logloss in zip(aucs, loglosses, strict=True):
        value = auc - logloss
        if value > best:
            best, bad = value, 0
        else:
            rate, bad = rate * 0.1, bad + 1
        expected.append(rate)
        if bad == 2:
            break
    tracker = Tracker(metric="auc-logloss", patience=2, lr_patience=1)
    found = []
    for step, (auc, logloss) in enumerate(zip(aucs, loglosses, strict=True)):
        metrics = Metrics(rows=1, logloss=logloss, auc=auc, ne=None, calibration=None)
        tracker.update(step, metrics.monitored("auc-logloss"))
        found.append(tracker.factor)
        if tracker.stopped:
            break
    assert found == pytest.approx(expected)
    assert (len(found), tracker.best_step) == (5, 2)


@given(VALUES, st.integers(0, 25))
def test_a_state_resumes_where_it_was(values: list[float | None], cut: int) -> None:
    options = {"metric": "auc", "patience": 3, "lr_patience": 2, "lr_factor": 0.5}
    whole, first, second = (Tracker(**options) for _ in range(3))  # type: ignore[arg-type]
    expected = [whole.update(step, value) for step, value in enumerate(values)]
    found = [first.update(step, value) for step, value in enumerate(values[:cut])]
    second.state = convert(json.loads(json.dumps(msgspec.to_builtins(first.state))), TrackerState)
    found += [second.update(cut + step, value) for step, value in enumerate(values[cut:])]
    assert found == expected
    assert second.state == whole.state

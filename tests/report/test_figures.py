"""What the figures of a run draw: the points of its records, bins and counts."""

import math

import pytest
from matplotlib.figure import Figure

from tests.training.run.written_run import BINS, CURVES, RECORDS, evaluation, train
from torchrec_deepfm.report.score_figures import (
    histogram_figure,
    precision_recall_figure,
    reliability_figure,
    roc_figure,
    wilson,
)
from torchrec_deepfm.report.training_curves import learning_curves, points, speed_curves, thinned

pytestmark = pytest.mark.pictures


def lines_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """What is drawn: points by label."""
    [axes] = figure.axes
    return {str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()}  # type: ignore[union-attr]


def test_the_curves_are_the_records() -> None:
    figures = {name: lines_of(one) for name, one in learning_curves(RECORDS, 40, 0.69).items()}
    loss, auc, rates = figures["log loss"], figures["AUC"], figures["learning rate"]
    assert loss["train"] == [(20, 0.7), (40, 0.5), (60, 0.45)]
    assert loss["validation"] == [(20, 0.5), (40, 0.5), (60, 0.5)]
    assert {y for _, y in loss["constant prediction"]} == {0.69}
    assert auc["validation"] == [(20, 0.75), (40, 0.8), (60, 0.8)]
    assert rates["sparse"] == [(20, 0.1 / 20), (40, 0.1 / 40), (60, 0.1 / 60)]
    assert [x for x, _ in auc["best"]] == [40, 40]
    again = learning_curves([*RECORDS, evaluation(40, auc=0.9)])  # the best state, evaluated at the end
    assert lines_of(again["AUC"])["validation"] == [(20, 0.75), (40, 0.9), (60, 0.8)]
    assert learning_curves([]) == {}
    assert len(thinned(points([train(step, 1.0) for step in range(1, 5002)], "loss"))) <= 1000


def test_the_speed_between_records() -> None:
    """100 samples in 2 s, then 300 in 1 s; a resumed training may record a step twice."""
    rates = [(20, 50.0, 2.0), (20, 50.0, 2.0), (80, 400 / 3, 3.0)]
    records = [{**train(step, 0.5), "samples_per_second": rate, "seconds": seconds} for step, rate, seconds in rates]
    figures = speed_curves(records, 5)
    [(step, rate)] = next(iter(lines_of(figures["samples per second"]).values()))
    [(_, milliseconds)] = next(iter(lines_of(figures["step time, ms"]).values()))
    assert (step, rate, milliseconds) == (80, pytest.approx(300.0), pytest.approx(1000 / 60))
    old = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    assert lines_of(speed_curves(old, 5)["samples per second"])["_child0"] == [(80, pytest.approx(300.0))]
    assert speed_curves(records[:1], 5) == {}


def test_the_reliability_curve_is_the_bins() -> None:
    figure = reliability_figure("test", BINS)
    assert [axes.get_title() for axes in figure.axes] == ["test"]
    drawn = [[(float(x), float(y)) for x, y in line.get_xydata()] for line in figure.axes[0].get_lines()]  # type: ignore[union-attr]
    assert [(0.1, 0.12), (0.4, 0.36)] in drawn


def test_the_score_figures_are_the_counts() -> None:
    roc = roc_figure({"test": CURVES})
    assert roc is not None
    assert lines_of(roc)["test"] == [(0, 0), (0.1, 0.5), (0.5, 0.75), (1, 1)]
    curve = precision_recall_figure({"test": CURVES})
    assert curve is not None
    drawn = lines_of(curve)
    assert drawn["test, average 0.6789"] == [(0.5, 10 / 13), (0.75, 0.5), (1, 0.4)]
    one_class = {**CURVES, "positives": 0, "true_positives": [0, 0, 0], "average_precision": None}
    assert roc_figure({"test": one_class}) is precision_recall_figure({"test": one_class}) is None
    axes = histogram_figure("test", CURVES).axes[0]
    shares = {tuple(patch.get_data().values) for patch in axes.patches}  # type: ignore[attr-defined]
    assert shares == {(0.8, 0.2), (0.25, 0.75)}
    ticks = dict(zip([tick.get_text() for tick in axes.get_xticklabels()], axes.get_xticks(), strict=True))
    assert ticks["0.5"] == 0.0
    assert ticks["0.9"] == pytest.approx(math.log(9))
    histogram_figure("test", {**CURVES, "edges": [-30.0, -29.5, -29.0]})  # no tick of the usual ones fits


def test_wilson_is_the_root_of_its_equation() -> None:
    """The bounds are the shares p for which the observed one is 1.96 standard deviations of p away."""
    for share, rows in ((0.1, 50), (0.5, 7), (0.03, 4000)):
        for bound in wilson(share, rows):
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / rows) == pytest.approx(1.959964, abs=1e-5)
    assert (wilson(0.0, 25)[0], wilson(1.0, 10)[1]) == (0.0, 1.0)

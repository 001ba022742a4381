"""The figures of a training over its steps: loss, AUC, learning rates, speed. By matplotlib; loads no torch."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Any

from torchrec_deepfm.report.page import BLUE, FAINT, GREEN, GREY, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Most points drawn of a curve; neighbours are averaged if there are more.
MOST_POINTS = 1000
SIZE = (4.5, 3.1)  # inches; two stand side by side, and a narrow screen shows the text in its own size
COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN, "sparse": BLUE, "dense": ORANGE}
SPLITS = ("validation", "test")
_SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)
_MARKERS = {"validation": "o", "test": "D"}

Records = Sequence[Mapping[str, Any]]
Curve = Sequence[tuple[int, float]]


def new_figure() -> "tuple[Figure, Axes]":
    """Return a figure of the page's small size, and its axes."""
    from matplotlib.figure import Figure  # slow to import: only if something is drawn

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def learning_curves(
    records: Records, best_step: int | None = None, entropy: float | None = None
) -> "dict[str, Figure]":
    """Draw loss, AUC and learning rates by step.

    ``records``: of ``metrics.jsonl``: ``step``, ``split``, ``loss``, and ``auc`` of evaluations or ``lr`` of training.
    ``entropy``: the loss of the best constant prediction. Returns a figure for each of ``log loss``, ``AUC`` and
    ``learning rate`` that was recorded, the last only if rates change.
    """
    train = [record for record in records if record["split"] == "train"]
    losses = {
        "train": thinned(points(train, "loss")),
        **{split: points(last_per_step(records, split), "loss") for split in SPLITS},
    }
    aucs = {split: points(last_per_step(records, split), "auc") for split in SPLITS}
    rates = {
        name: thinned(points([{"step": r["step"], **r["lr"]} for r in train if r.get("lr")], name))
        for name in _rates(train)
    }
    figures = {}
    for name, curves in {"log loss": losses, "AUC": aucs, "learning rate": rates}.items():
        if not any(curves.values()):
            continue
        if name == "learning rate" and not any(len({rate for _, rate in curve}) > 1 for curve in curves.values()):
            continue
        figures[name], axes = new_figure()
        for split, curve in curves.items():
            if curve:
                _line(axes, split, curve)
        _epochs(axes, train)
        if name == "log loss":
            if entropy is not None:
                axes.axhline(entropy, color=GREY, linestyle="--", linewidth=1, label="constant prediction")
            others = [losses["validation"], losses["test"], [] if entropy is None else [(0, entropy)]]
            _cut_off_the_start(axes, [loss for _, loss in losses["train"]], others)
        if name == "learning rate":
            _orders_of_magnitude(axes, [rate for curve in curves.values() for _, rate in curve])
        elif best_step is not None:
            axes.axvline(best_step, color=GREY, linestyle=":", label="best")
        axes.set(xlabel="step", ylabel=name)
        axes.legend(loc="best", frameon=False, fontsize=9)
    return figures


def speed_curves(records: Records, samples_per_step: int) -> "dict[str, Figure]":
    """Draw samples per second and the time of a step by step; see ``speed``. Returns both figures, or none."""
    found = speed(records, samples_per_step)
    if not found:
        return {}
    rates = thinned([(step, rate) for step, rate, _ in found])
    times = thinned([(step, 1e3 * seconds) for step, _, seconds in found])
    figures = {}
    for name, curve in {"samples per second": rates, "step time, ms": times}.items():
        figures[name], axes = new_figure()
        axes.plot([step for step, _ in curve], [value for _, value in curve], color=BLUE, linewidth=1.4, zorder=3)
        middle = median(value for _, value in curve)
        shown = f"{middle:,.0f}" if middle >= 1000 else f"{middle:.3g}"
        axes.axhline(middle, color=GREY, linestyle="--", linewidth=1, label=f"median {shown}")
        axes.set(xlabel="step", ylabel=name)
        axes.set_ylim(bottom=0)
        if name == "samples per second":
            axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    return figures


def compared_curves(runs: Mapping[str, Curve], name: str) -> "Figure | None":
    """Draw one quantity of several runs, of which some may have none, by step; None if all have none."""
    if not any(runs.values()):
        return None
    figure, axes = new_figure()
    for colour, (run, curve) in zip(series(len(runs)), runs.items(), strict=True):
        if curve:
            marker = "o" if len(curve) <= 60 else None
            xs, ys = [step for step, _ in curve], [value for _, value in curve]
            axes.plot(xs, ys, label=run, color=colour, marker=marker, markersize=4, linewidth=1.4)
    axes.set(xlabel="step", ylabel=name)
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def series(count: int) -> list[str]:
    """Return a colour for each of some runs."""
    return [_SERIES[i % len(_SERIES)] for i in range(count)]


def speed(records: Records, samples_per_step: int) -> list[tuple[int, float, float]]:
    """Work out how fast a training was between its records.

    ``records``: of ``metrics.jsonl``, whose ``samples_per_second`` is that of the training up to the record.
    ``samples_per_step``: for records of versions without ``seconds``. Returns (step, samples per second, seconds per
    step) of the steps since the record before.

    Example:
        >>> first = {"step": 20, "split": "train", "samples_per_second": 100.0, "seconds": 2.0}
        >>> second = {"step": 40, "split": "train", "samples_per_second": 150.0, "seconds": 4.0}
        >>> speed([first, second], 10)
        [(40, 200.0, 0.1)]
    """
    done = []
    for record in records:
        rate = record.get("samples_per_second")
        if record["split"] == "train" and isinstance(rate, int | float) and math.isfinite(rate) and rate > 0:
            seconds = record.get("seconds", record["step"] * samples_per_step / rate)
            done.append((record["step"], rate * seconds, seconds))
    return [
        (step, (samples - before) / (seconds - began), (seconds - began) / (step - first))
        for (first, before, began), (step, samples, seconds) in pairwise(done)
        if step > first and seconds > began and samples > before
    ]


def points(records: Records, name: str) -> list[tuple[int, float]]:
    """Extract a curve from records.

    ``records``: with ``step``. Returns (step, value) of each finite value.

    Example:
        >>> points([{"step": 1, "auc": 0.7}, {"step": 2, "auc": None}, {"step": 3, "auc": float("nan")}], "auc")
        [(1, 0.7)]
    """
    found = [(record["step"], record.get(name)) for record in records]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def thinned(curve: Curve, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Average neighbours of a curve with more points than can be distinguished.

    Returns the last step and the mean of each group of neighbours.

    Example:
        >>> thinned([(1, 0.5), (2, 0.25), (3, 1.0)], most=2)
        [(2, 0.375), (3, 1.0)]
    """
    each = max(math.ceil(len(curve) / most), 1)
    parts = [curve[i : i + each] for i in range(0, len(curve), each)]
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts]


def last_per_step(records: Records, split: str) -> list[Mapping[str, Any]]:
    """Return the last evaluation of each step; the best state is evaluated again at the end, under its step."""
    found = {record["step"]: record for record in records if record["split"] == split}
    return [found[step] for step in sorted(found)]


def plain(axes: "Axes") -> None:
    """Draw axes without a frame, with faint lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _rates(train: Records) -> list[str]:
    names = dict.fromkeys(name for record in train for name in record.get("lr") or {})
    return list(names)


def _line(axes: "Axes", name: str, curve: Curve) -> None:
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    marker = _MARKERS.get(name) if len(curve) <= 60 else None
    if len(curve) == 1:
        marker = marker or "o"
    colour = COLOURS.get(name, GREEN)
    axes.plot(steps, values, label=name, color=colour, marker=marker, markersize=4.5, linewidth=1.4, zorder=3)


def _epochs(axes: "Axes", train: Records) -> None:
    """Draw a faint line at the end of each epoch, unless there are too many."""
    ends: dict[int, int] = {}
    for record in train:
        if isinstance(record.get("epoch"), int):
            ends[record["epoch"]] = record["step"]
    if 1 < len(ends) <= 30:
        for step in list(ends.values())[:-1]:
            axes.axvline(step, color=FAINT, linewidth=0.8, zorder=0)


def _cut_off_the_start(axes: "Axes", losses: Sequence[float], others: Sequence[Curve]) -> None:
    """Limit the axis: the loss of the first steps may be so high that the rest looks flat."""
    if len(losses) < 20:
        return
    shown = max([quantiles(losses, n=50)[-1], *(loss for curve in others for _, loss in curve)])
    low = min([*losses, *(loss for curve in others for _, loss in curve)])
    if max(losses) > shown + 0.5 * (shown - low) > low:
        axes.set_ylim(low - 0.05 * (shown - low), shown + 0.1 * (shown - low))


def _orders_of_magnitude(axes: "Axes", rates: Sequence[float]) -> None:
    """Use a logarithmic axis if the rates differ by more than a factor of ten."""
    positive = [rate for rate in rates if rate > 0]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(positive) / 1.5, max(positive) * 1e-5))

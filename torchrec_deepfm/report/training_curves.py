"""The figures of a run's report: learning curves and reliability, by matplotlib. Loads no torch."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Most points drawn of the training loss; neighbours are averaged if there are more.
MOST_POINTS = 1000
# The palette of Okabe and Ito: distinct with any colour vision, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B7280"
_COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
_MARKERS = {"validation": "o", "test": "D"}

Records = Sequence[Mapping[str, Any]]


def learning_curves(records: Records, best_step: int | None) -> "Figure | None":
    """Draw loss, AUC and learning rates by step.

    ``records``: of ``metrics.jsonl``: ``step``, ``split``, ``loss``, and ``auc`` of evaluations or ``lr`` of training.
    Returns a panel per recorded quantity; None if no loss is finite.
    """
    train = [record for record in records if record["split"] == "train"]
    losses = {
        "train": thinned(points(train, "loss")),
        **{split: points(_last_per_step(records, split), "loss") for split in ("validation", "test")},
    }
    aucs = {split: points(_last_per_step(records, split), "auc") for split in ("validation", "test")}
    rates = {
        name: thinned(points([{"step": r["step"], **r["lr"]} for r in train if r.get("lr")], name))
        for name in _rates(train)
    }
    if not any(losses.values()):
        return None
    panels = [("log loss", losses), *([("AUC", aucs)] if any(aucs.values()) else [])]
    if any(len({rate for _, rate in curve}) > 1 for curve in rates.values()):
        panels.append(("learning rate", rates))
    from matplotlib.figure import Figure  # slow to import: only if something is drawn

    figure = Figure(figsize=(9, 0.6 + 2.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, curves) in zip(axes, panels, strict=True):
        for split, curve in curves.items():
            if curve:
                _line(axis, split, curve)
        axis.set_ylabel(name)
        _epochs(axis, train)
        if best_step is not None and name != "learning rate":
            axis.axvline(best_step, color=GREY, linestyle=":", label="best")
        if name == "log loss":
            _cut_off_the_start(axis, [loss for _, loss in losses["train"]], [losses["validation"], losses["test"]])
        if name == "learning rate":
            _orders_of_magnitude(axis, [rate for curve in curves.values() for _, rate in curve])
        axis.legend(loc="best", frameon=False, fontsize=9)
        _plain(axis)
    axes[-1].set_xlabel("step")
    return figure


def reliability_curves(splits: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure | None":
    """Draw the share of clicks against the predicted probability, a panel per split.

    ``splits``: bins by split, as ``calibration.json`` has them; ``rows``, ``predicted`` and ``observed`` are used.
    Returns the figure, with the samples per bin below; None without bins.
    """
    splits = {split: bins for split, bins in splits.items() if bins}
    if not splits:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(splits) + 0.4, 5.4), layout="constrained")
    axes = figure.subplots(2, len(splits), squeeze=False, height_ratios=[3, 1])
    for column, (split, bins) in enumerate(splits.items()):
        curve, counts = axes[0, column], axes[1, column]
        spans = [wilson(one["observed"], one["rows"]) for one in bins]
        xs, ys = [one["predicted"] for one in bins], [one["observed"] for one in bins]
        top = min(1.0, 1.05 * max(*xs, *ys, *(high for _, high in spans)) or 1.0)
        curve.plot([0, top], [0, top], color=GREY, linestyle="--", linewidth=1, label="calibrated")
        errors = [
            [y - low for y, (low, _) in zip(ys, spans, strict=True)],
            [high - y for y, (_, high) in zip(ys, spans, strict=True)],
        ]
        curve.errorbar(
            xs, ys, yerr=errors, fmt="o-", color=_COLOURS[split], markersize=4, linewidth=1.2, capsize=2, label=split
        )
        curve.set(xlim=(0, top), ylim=(0, top), ylabel="share of clicks", title=split)
        curve.legend(loc="upper left", frameon=False, fontsize=9)
        counts.vlines(xs, 0, [one["rows"] for one in bins], color=_COLOURS[split], linewidth=1.5)
        counts.set(xlim=(0, top), ylabel="samples", xlabel="predicted probability")
        counts.set_ylim(bottom=0)
        for axis in (curve, counts):
            _plain(axis)
    return figure


def points(records: Records, name: str) -> list[tuple[int, float]]:
    """Extract a curve from records.

    ``records``: with ``step``. Returns (step, value) of each finite value.

    Example:
        >>> points([{"step": 1, "auc": 0.7}, {"step": 2, "auc": None}, {"step": 3, "auc": float("nan")}], "auc")
        [(1, 0.7)]
    """
    found = [(record["step"], record.get(name)) for record in records]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def thinned(curve: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Average neighbours of a curve with more points than can be distinguished.

    Returns the last step and the mean of each group of neighbours.

    Example:
        >>> thinned([(1, 0.5), (2, 0.25), (3, 1.0)], most=2)
        [(2, 0.375), (3, 1.0)]
    """
    each = max(math.ceil(len(curve) / most), 1)
    parts = [curve[i : i + each] for i in range(0, len(curve), each)]
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts]


def wilson(share: float, rows: float) -> tuple[float, float]:
    """Return Wilson's 95% interval for a share of ``rows`` samples (Wilson, 1927).

    Example:
        >>> [round(bound, 4) for bound in wilson(0.0, 100)]
        [0.0, 0.037]
    """
    z = 1.959963984540054
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return min(max(0.0, middle - half), share), max(
        min(1.0, middle + half), share
    )  # rounding must not exclude the share


def _last_per_step(records: Records, split: str) -> list[Mapping[str, Any]]:
    """The last evaluation of each step; the best state is evaluated again at the end, under its step."""
    found = {record["step"]: record for record in records if record["split"] == split}
    return [found[step] for step in sorted(found)]


def _rates(train: Records) -> list[str]:
    names = dict.fromkeys(name for record in train for name in record.get("lr") or {})
    return list(names)


def _line(axis: "Axes", name: str, curve: Sequence[tuple[int, float]]) -> None:
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    marker = _MARKERS.get(name) if len(curve) <= 60 else None
    if len(curve) == 1:
        marker = marker or "o"
    colour = _COLOURS.get(name, {"sparse": BLUE, "dense": ORANGE}.get(name, GREEN))
    axis.plot(steps, values, label=name, color=colour, marker=marker, markersize=4.5, linewidth=1.4, zorder=3)


def _epochs(axis: "Axes", train: Records) -> None:
    """Draw a faint line at the end of each epoch, unless there are too many."""
    ends: dict[int, int] = {}
    for record in train:
        if isinstance(record.get("epoch"), int):
            ends[record["epoch"]] = record["step"]
    if 1 < len(ends) <= 30:
        for step in list(ends.values())[:-1]:
            axis.axvline(step, color="#D9DEE6", linewidth=0.8, zorder=0)


def _cut_off_the_start(axis: "Axes", losses: Sequence[float], others: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Limit the axis: the loss of the first steps may be so high that the rest looks flat."""
    if len(losses) < 20:
        return
    shown = max([quantiles(losses, n=50)[-1], *(loss for curve in others for _, loss in curve)])
    low = min([*losses, *(loss for curve in others for _, loss in curve)])
    if max(losses) > shown + 0.5 * (shown - low) > low:
        axis.set_ylim(low - 0.05 * (shown - low), shown + 0.1 * (shown - low))


def _orders_of_magnitude(axis: "Axes", rates: Sequence[float]) -> None:
    """Use a logarithmic axis if the rates differ by more than a factor of ten."""
    positive = [rate for rate in rates if rate > 0]
    if positive and max(positive) > 10 * min(positive):
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(min(positive) / 1.5, max(positive) * 1e-5))


def _plain(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E5E8EE", linewidth=0.7)
    axis.set_axisbelow(True)

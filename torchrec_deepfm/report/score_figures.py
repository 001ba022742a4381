"""The figures of a model's scores: ROC, precision and recall, histogram, reliability, fields. Loads no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchrec_deepfm.report.page import BLUE, FAINT, GREY, ORANGE
from torchrec_deepfm.report.training_curves import COLOURS, new_figure, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FIELDS = 20  # drawn; the table has all
_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-4, 1 - 1e-5, 1 - 1e-6)

Curves = Mapping[str, Any]
"""The content of ``curves.json`` for a split: the attributes of ``ScoreCurves``."""


def roc_figure(curves: Mapping[str, Curves]) -> "Figure | None":
    """Draw the ROC of some splits or runs with both classes; None without any."""
    both = {name: one for name, one in curves.items() if one["positives"] and one["negatives"]}
    if not both:
        return None
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    for name, colour in _colours(both).items():
        one = both[name]
        xs = [0.0, *(count / one["negatives"] for count in one["false_positives"])]
        ys = [0.0, *(count / one["positives"] for count in one["true_positives"])]
        axes.plot(xs, ys, color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    return figure


def precision_recall_figure(curves: Mapping[str, Curves]) -> "Figure | None":
    """Draw precision against recall of some splits or runs with both classes; None without any."""
    both = {name: one for name, one in curves.items() if one["positives"] and one["negatives"]}
    if not both:
        return None
    figure, axes = new_figure()
    for name, colour in _colours(both).items():
        one = both[name]
        taken = [hit + miss for hit, miss in zip(one["true_positives"], one["false_positives"], strict=True)]
        recall = [hit / one["positives"] for hit in one["true_positives"]]
        precision = [hit / count for hit, count in zip(one["true_positives"], taken, strict=True)]
        rate = one["positives"] / (one["positives"] + one["negatives"])
        label = f"{name}, average {one['average_precision']:.4f}"
        # The precision of the few highest scores is noise that hides the rest.
        first = next((i for i, hit in enumerate(one["true_positives"]) if hit >= 10), 0)
        axes.plot(recall[first:], precision[first:], color=colour, linewidth=1.6, label=label)
        axes.axhline(rate, color=colour, linestyle="--", linewidth=0.8)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def histogram_figure(split: str, curves: Curves) -> "Figure":
    """Draw the share of each class by score; the axis is linear in the logit and shows probabilities."""
    figure, axes = new_figure()
    edges = curves["edges"]
    for name, colour, counts in (
        ("label 0", BLUE, curves["histogram_negatives"]),
        ("label 1", ORANGE, curves["histogram_positives"]),
    ):
        if total := sum(counts):
            shares = [count / total for count in counts]
            axes.stairs(shares, edges, color=colour, linewidth=1.4, label=f"{name}: {total:,}")
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
    probabilities = [p for p in _TICKS if edges[0] <= math.log(p / (1 - p)) <= edges[-1]]
    if len(probabilities) < 2:  # scores that hardly differ
        logits = [edges[0] + (edges[-1] - edges[0]) * share for share in (0.1, 0.5, 0.9)]
        probabilities = [1 / (1 + math.exp(-z)) for z in logits]
    places = [math.log(p / (1 - p)) for p in probabilities if 0 < p < 1]
    axes.set_xticks(places, [f"{p:.4g}" for p in probabilities if 0 < p < 1])
    axes.set(xlabel="predicted probability", ylabel="share of the class", title=split)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def reliability_figure(split: str, bins: Sequence[Mapping[str, float]]) -> "Figure":
    """Draw the share of clicks against the predicted probability.

    ``bins``: as ``calibration.json`` has them; ``rows``, ``predicted`` and ``observed`` are used.
    """
    figure, axes = new_figure()
    spans = [wilson(one["observed"], one["rows"]) for one in bins]
    xs, ys = [one["predicted"] for one in bins], [one["observed"] for one in bins]
    top = min(1.0, 1.05 * max(*xs, *ys, *(high for _, high in spans)) or 1.0)
    axes.plot([0, top], [0, top], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    errors = [
        [y - low for y, (low, _) in zip(ys, spans, strict=True)],
        [high - y for y, (_, high) in zip(ys, spans, strict=True)],
    ]
    colour = COLOURS.get(split, BLUE)
    axes.errorbar(xs, ys, yerr=errors, fmt="o-", color=colour, markersize=4, linewidth=1.2, capsize=2, label=split)
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted probability", ylabel="share of clicks", title=split)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def importance_figure(names: Sequence[str], values: Sequence[float], what: str) -> "Figure":
    """Draw a bar per field, the first at the top; at most ``MOST_FIELDS``."""
    names, values = names[:MOST_FIELDS], values[:MOST_FIELDS]
    figure, axes = new_figure()
    figure.set_figheight(0.9 + 0.22 * len(names))
    shown = [name if len(name) <= 24 else f"{name[:23]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    axes.barh(range(len(names)), values, color=BLUE, height=0.7)
    axes.set_yticks(range(len(names)), shown, fontsize=9)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_xlabel(what)
    return figure


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


def _colours(named: Mapping[str, Any]) -> dict[str, str]:
    return {name: COLOURS.get(name, colour) for name, colour in zip(named, series(len(named)), strict=True)}

"""Statistics, tables and the picture of the quality benchmarks. No benchmark itself.

A sample of n seeds has a mean and a standard deviation with n - 1 below; the standard error of the mean is that
deviation over the root of n. What is random between seeds is the training, not the rows that it is judged by: the error
bars say nothing of another test split.
"""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OURS = ("LR", "FM", "DNN", "FM & DNN", "DeepFM")
# Where the axis of AUC has a line, by what is missing to 1.
GAPS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.18, 0.16, 0.15, 0.1, 0.05, 0.03, 0.02, 0.015, 0.0125, 0.01)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One model on one data set, over its seeds."""

    data: str
    model: str
    split: str
    seeds: tuple[int, ...]
    auc: tuple[float, ...]
    logloss: tuple[float, ...]
    seconds: tuple[float, ...]
    epochs: tuple[float, ...]
    lift: tuple[float, ...] = ()


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return deviation(values) / math.sqrt(len(values))


def not_below(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Say whether our mean is at least theirs, but for the standard error of the difference."""
    margin = math.hypot(standard_error(ours), standard_error(theirs))
    return mean(ours) >= mean(theirs) - margin


def with_deviation(values: Sequence[float], digits: int = 4) -> str:
    """Format mean and deviation, the latter only where there are several values.

    Example:
        >>> with_deviation([0.5, 0.7], 2), with_deviation([0.5], 2)
        ('0.60 ± 0.14', '0.50')
    """
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {deviation(values):.{digits}f}" if len(values) > 1 else text


def markdown(figures: Sequence[Figure]) -> str:
    """Return the table of one data set."""
    lifts = any(figure.lift for figure in figures)
    head = ["model", f"{figures[0].split} AUC", "logloss", *(["lift"] if lifts else []), "epochs", "s", "seeds"]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            f"**{one.model}**" if one.model == "DeepFM" else one.model,
            with_deviation(one.auc),
            with_deviation(one.logloss),
            *([f"{mean(one.lift):.1%}"] if lifts else []),
            f"{mean(one.epochs):.0f}" if one.epochs else "",
            f"{mean(one.seconds):.0f}",
            str(len(one.seeds)),
        ]
        for one in figures
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(figures: Sequence[Figure]) -> list[str]:
    """Compare as the table wants it: DeepFM >= FM >= LR, and our DeepFM >= every peer, within the standard error."""
    by_model = {figure.model: figure.auc for figure in figures}
    pairs = [("DeepFM", "FM"), ("FM", "LR")]
    pairs += [("DeepFM", figure.model) for figure in figures if figure.model not in ("LR", "FM", "DeepFM")]
    lines = []
    for upper, lower in pairs:
        if upper in by_model and lower in by_model:
            first, second = by_model[upper], by_model[lower]
            gap, error = mean(first) - mean(second), math.hypot(standard_error(first), standard_error(second))
            word = "yes" if not_below(first, second) else "NO"
            known = f"standard error {error:.4f}" if len(first) + len(second) > 2 else "one seed each"
            lines.append(f"{upper} >= {lower}: {word} ({gap:+.4f}, {known})")
    return lines


def write(figures: Sequence[Figure], output: Path, about: dict[str, object]) -> str:
    """Write quality.json, quality.csv, quality.md and quality.png; return the text of the tables."""
    sets = list(dict.fromkeys(figure.data for figure in figures))
    (output / "quality.json").write_text(
        json.dumps({"about": about, "figures": [asdict(figure) for figure in figures]}, indent=2) + "\n",
        encoding="utf-8",
    )
    with (output / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "model", "split", "seed", "auc", "logloss", "seconds", "epochs"])
        for one in figures:
            epochs = one.epochs or ("",) * len(one.seeds)
            for row in zip(one.seeds, one.auc, one.logloss, one.seconds, epochs, strict=True):
                writer.writerow([one.data, one.model, one.split, *row])
    parts = []
    for name in sets:
        mine = [figure for figure in figures if figure.data == name]
        parts += [f"## {name}", markdown(mine), "\n".join(f"- {line}" for line in verdicts(mine))]
    text = "\n\n".join(parts) + "\n"
    (output / "quality.md").write_text(text, encoding="utf-8")
    draw(figures, output / "quality.png")
    return text


def apart(ticks: Iterable[float], limits: tuple[float, float]) -> list[float]:
    """Leave out of a logarithmic axis' ticks those whose labels would lie on each other."""
    least = 0.075 * abs(math.log(limits[0] / limits[1]))
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        if min(limits) <= tick <= max(limits) and (not kept or math.log(kept[-1] / tick) >= least):
            kept.append(tick)
    return kept


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Draw a panel per data set: AUC with standard deviations, the distance to 1 on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sets = list(dict.fromkeys(figure.data for figure in figures))
    heights = [sum(figure.data == name for figure in figures) for name in sets]
    canvas, axes = plt.subplots(
        len(sets), 1, figsize=(8.5, 0.9 * len(sets) + 0.3 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for name, axis in zip(sets, axes[:, 0], strict=True):
        mine = [figure for figure in figures if figure.data == name][::-1]
        for place, one in enumerate(mine):
            gap = 1 - mean(one.auc)
            colour = "#d1495b" if one.model == "DeepFM" else "#2e6f95" if one.model in OURS else "#8d99ae"
            spread = min(deviation(one.auc), 0.9 * gap)
            axis.errorbar(gap, place, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5)
            axis.annotate(
                f"{mean(one.auc):.4f}", (gap, place), xytext=(0, 5), textcoords="offset points", fontsize=7, ha="center"
            )
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.xaxis.set_major_locator(FixedLocator(apart(GAPS, axis.get_xlim())))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.4g}"))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_yticks(range(len(mine)), [one.model for one in mine], fontsize=8)
        axis.set_ylim(-0.6, len(mine) - 0.2)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(f"{name}: {mine[0].split} AUC, mean and standard deviation over seeds", fontsize=9, loc="left")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)

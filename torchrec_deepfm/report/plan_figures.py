"""Pictures of plans and experiments, drawn by matplotlib. No torch.

The colour-blind can distinguish the colours: cividis for amounts, Okabe and Ito's palette for kinds.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from torchrec_deepfm.report.page import FAINT, INK, QUIET

# Okabe and Ito, "Color Universal Design" (2008): black left out, which is for text here.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#5b4b8a")
WIDE = 10.5  # inches: what the page has room for
_BOUND = "lower bound on the slowest rank"
MANY = 32  # ranks, or plans, from which on each can't have a label of its own


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, what: str, across: str, down: str
) -> Figure:
    """Draw a matrix as colours, with the numbers in it where there is room; NaN is left empty."""
    numbers = len(columns) <= 16 and len(rows) <= 40
    height = min(max(0.32 * len(rows), 1.2), 12.0) + 1.1
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    finite = [value for row in values for value in row if math.isfinite(value)]
    top = max(finite, default=1.0) or 1.0
    low = min((value for value in finite if value > 0), default=top)
    # From zero on: what differs by a percent shall not look like black and white. But one plan that is much slower than
    # the others would leave those one colour.
    norm = LogNorm(low, top, clip=True) if top > 8 * low else Normalize(0.0, top)
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    _ticks(axes, "x", columns)
    _ticks(axes, "y", rows)
    axes.set_xlabel(across, color=QUIET)
    axes.set_ylabel(down, color=QUIET)
    if numbers:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    # Not quite black, which a dark screen shows white.
                    colour = "white" if norm(value) < 0.55 else "#010101"
                    axes.text(x, y, short(value), ha="center", va="center", color=colour, fontsize=8.5)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, format=lambda value, _: short(value))
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_minor_formatter(lambda value, _: short(value) if _leads(value) else "")
    bar.set_label(what, color=QUIET)
    _plain(axes, bar.ax)
    return figure


def stacked_bars(
    parts: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    what: str,
    marks: Sequence[float] | None = None,
    mark: str = "",
    bound: float | None = None,
) -> Figure:
    """Draw one bar per name, made up of parts, with a mark on each bar's line and a lower bound if given."""
    figure = Figure(figsize=(WIDE, min(max(0.33 * len(names), 1.0), 14.0) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    starts = [0.0] * len(names)
    shown = {part: lengths for part, lengths in parts.items() if any(lengths)}
    for number, (part, lengths) in enumerate(shown.items()):
        axes.barh(
            range(len(names)),
            lengths,
            left=starts,
            height=0.72,
            label=part,
            color=PALETTE[number % len(PALETTE)],
            edgecolor="white",
            linewidth=0.4,
        )
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    if marks is not None:
        axes.plot(marks, range(len(names)), linestyle="none", marker="D", markersize=5, color=INK, label=mark)
    if bound is not None:
        axes.axvline(bound, color=INK, linestyle="--", linewidth=1.2, label=_BOUND)
    _ticks(axes, "y", names)
    axes.invert_yaxis()
    axes.set_xlabel(what, color=QUIET)
    _cut_long_bars(axes, [*starts], marks or [])
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    _plain(axes)
    return figure


def cost_figure(parts: Mapping[str, Sequence[float]], *, what: str, bound: float | None = None) -> Figure:
    """Draw parts on top of each other over very many ranks, where bars would be thinner than a line."""
    figure = Figure(figsize=(WIDE, 3.8), layout="constrained")
    axes = figure.add_subplot()
    shown = {part: lengths for part, lengths in parts.items() if any(lengths)}
    ranks = len(next(iter(parts.values())))
    below = [0.0] * ranks
    edges = [rank - 0.5 for rank in range(ranks + 1)]
    for number, (part, lengths) in enumerate(shown.items()):
        above = [low + length for low, length in zip(below, lengths, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=PALETTE[number % len(PALETTE)], label=part)
        below = above
    if bound is not None:
        axes.axhline(bound, color=INK, linestyle="--", linewidth=1.2, label=_BOUND)
    axes.set_xlim(-0.5, ranks - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rank", color=QUIET)
    axes.set_ylabel(what, color=QUIET)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    _plain(axes)
    return figure


def scatter(predicted: Sequence[float], measured: Sequence[float], spread: Sequence[tuple[float, float]]) -> Figure:
    """Draw predicted against measured times with their range; the table of plans explains the numbers."""
    figure = Figure(figsize=(7.5, 6.2), layout="constrained")
    axes = figure.add_subplot()
    both = [*predicted, *measured]
    low, high = min(both) * 0.8, max(both) * 1.25
    axes.plot([low, high], [low, high], color=QUIET, linewidth=1, linestyle="--", label="as predicted")
    errors = [
        [value - least for value, (least, _) in zip(measured, spread, strict=True)],
        [most - value for value, (_, most) in zip(measured, spread, strict=True)],
    ]
    axes.errorbar(
        predicted, measured, yerr=errors, fmt="o", markersize=6, color=PALETTE[0], ecolor="#8aa9c4", elinewidth=1.2,
        label="plan: median and range of its turns",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(low, min(least for least, _ in spread) * 0.8), max(high, max(most for _, most in spread) * 1.25))
    places = [(math.log(x), math.log(y)) for x, y in zip(predicted, measured, strict=True)]
    for number, shift in enumerate(_apart(places, math.log(high / low))):
        axes.annotate(
            str(number + 1), (predicted[number], measured[number]), xytext=shift, textcoords="offset points",
            ha="center", va="center", fontsize=9, color=INK,
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.5} if max(map(abs, shift)) > 14 else None,
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))
        axis.set_minor_formatter(lambda value, _: short(value) if _leads(value) else "")
    axes.set_xlabel("predicted, ms", color=QUIET)
    axes.set_ylabel("measured, ms", color=QUIET)
    axes.grid(which="both", color=FAINT, linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    _plain(axes)
    return figure


def scaling_curve(lines: Mapping[str, Mapping[int, float]], *, what: str = "ms per step") -> Figure:
    """Draw an amount over the number of ranks, one line per name."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    every = sorted({ranks for line in lines.values() for ranks in line})
    for number, (name, line) in enumerate(lines.items()):
        ranks = sorted(line)
        axes.plot(
            ranks, [line[one] for one in ranks], marker="os^D"[number % 4], markersize=7, linewidth=1.8,
            color=PALETTE[number % len(PALETTE)], label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [f"{ranks:,}" for ranks in every])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks", color=QUIET)
    axes.set_ylabel(what, color=QUIET)
    axes.grid(color=FAINT, linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    _plain(axes)
    return figure


def short(value: float) -> str:
    """Write a number in about three digits.

    Example:
        >>> [short(value) for value in (0, 0.01234, 1.234, 56.78, 1234.5)]
        ['0', '0.012', '1.2', '57', '1,234']
    """
    if value == 0:
        return "0"
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def _cut_long_bars(axes: Axes, lengths: Sequence[float], marks: Sequence[float]) -> None:
    """End the axis where the bulk of the bars does, and write the length of a longer one at its end."""
    ends = sorted([*lengths, *marks])
    usual = ends[int(0.8 * (len(ends) - 1))]
    if ends[-1] < 2.5 * usual or usual == 0:
        axes.set_xlim(0, (ends[-1] or 1.0) * 1.03)
        return
    right = 1.25 * max(end for end in ends if end < 2.5 * usual)
    axes.set_xlim(0, right)
    for number, length in enumerate(lengths):
        if length > right:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            text = f"{short(length)} \N{RIGHTWARDS ARROW}"
            axes.text(right * 0.99, number, text, ha="right", va="center", fontsize=9, color=INK, bbox=box)


def _apart(places: Sequence[tuple[float, float]], size: float) -> list[tuple[float, float]]:
    """Where labels go, in points from their marks, so that none lies on another."""
    circle = [(0.0, 11.0), (11.0, 0.0), (0.0, -11.0), (-11.0, 0.0), (9.0, 9.0), (9.0, -9.0), (-9.0, -9.0), (-9.0, 9.0)]
    choices = [(x * far, y * far) for far in (1.0, 2.0, 3.0, 4.0, 5.0) for x, y in circle]
    points = 400.0 / size  # of the picture's side, for a unit of the logarithm
    marks = [(x * points, y * points) for x, y in places]
    taken = list(marks)
    found = []
    for x, y in marks:
        free = [
            (dx, dy)
            for dx, dy in choices
            if all(abs(x + dx - tx) > 13 or abs(y + dy - ty) > 11 for tx, ty in taken if (tx, ty) != (x, y))
        ]
        dx, dy = (free or choices)[0]
        taken.append((x + dx, y + dy))
        found.append((dx, dy))
    return found


def _leads(value: float) -> bool:
    return value > 0 and round(value / 10 ** math.floor(math.log10(value) + 1e-9)) in (2, 5)


def _ticks(axes: Axes, side: str, names: Sequence[str]) -> None:
    step = max(1, math.ceil(len(names) / MANY))
    # With many ranks a round step is easier to count by.
    step = step if step == 1 else 2 ** math.ceil(math.log2(step))
    at = range(0, len(names), step)
    labels = [names[number] for number in at]
    if side == "x":
        axes.set_xticks(at, labels)
        if max(map(len, labels), default=0) > 4:
            axes.tick_params(axis="x", labelrotation=45)
    else:
        axes.set_yticks(at, labels)


def _plain(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.tick_params(which="both", colors=INK, labelsize=9)
        for spine in axes.spines.values():
            spine.set_color("#b8c0cc")

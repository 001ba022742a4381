"""Writes the quality table as Markdown, CSV, JSON and a picture."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks._lib import formatting
from benchmarks._lib.seed_statistics import compare, deviation, mean, with_deviation

TORCHREC_DEEPFM = ("LR", "FM", "DNN", "FM & DNN", "DeepFM")
# Positions of the lines on the AUC axis, as 1 - AUC.
GAPS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.18, 0.16, 0.15, 0.1, 0.05, 0.03, 0.02, 0.015, 0.0125, 0.01)


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """One model on one data set: a value per seed."""

    data: str
    model: str
    split: str
    seeds: tuple[int, ...]
    auc: tuple[float, ...]
    logloss: tuple[float, ...]
    seconds: tuple[float, ...]
    epochs: tuple[float, ...]
    lift: tuple[float, ...] = ()


def markdown(scores: Sequence[ModelScores]) -> str:
    """Return the table of one data set; its last column compares DeepFM's AUC with each row."""
    lifts = any(one.lift for one in scores)
    head = [
        *("model", f"{scores[0].split} AUC", "logloss", *(["lift"] if lifts else [])),
        *("epochs", "s", "seeds", "DeepFM against it"),
    ]
    auc = {one.model: one.auc for one in scores}
    rows = [
        [
            f"**{one.model}**" if one.model == "DeepFM" else one.model,
            with_deviation(one.auc),
            with_deviation(one.logloss),
            *([f"{mean(one.lift):.1%}"] if lifts else []),
            f"{mean(one.epochs):.0f}" if one.epochs else "",
            f"{mean(one.seconds):.0f}",
            len(one.seeds),
            compare(auc["DeepFM"], one.auc) if "DeepFM" in auc and one.model != "DeepFM" else "",
        ]
        for one in scores
    ]
    text = formatting.markdown(head, rows)
    return f"FM against LR: {compare(auc['FM'], auc['LR'])}\n\n{text}" if {"FM", "LR"} <= auc.keys() else text


def write(scores: Sequence[ModelScores], output: Path, about: dict[str, object]) -> str:
    """Write quality.json, quality.csv, quality.md and quality.png; return the text of the tables."""
    (output / "quality.json").write_text(
        json.dumps({"about": about, "figures": [asdict(one) for one in scores]}, indent=2) + "\n", encoding="utf-8"
    )
    with (output / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "model", "split", "seed", "auc", "logloss", "seconds", "epochs"])
        for one in scores:
            epochs = one.epochs or ("",) * len(one.seeds)
            for row in zip(one.seeds, one.auc, one.logloss, one.seconds, epochs, strict=True):
                writer.writerow([one.data, one.model, one.split, *row])
    parts = [f"## {name}\n\n{markdown(of_data)}" for name, of_data in by_data(scores).items()]
    text = "\n\n".join(parts) + "\n"
    (output / "quality.md").write_text(text, encoding="utf-8")
    draw(scores, output / "quality.png")
    return text


def by_data(scores: Sequence[ModelScores]) -> dict[str, list[ModelScores]]:
    """Group by data set."""
    groups: dict[str, list[ModelScores]] = {}
    for one in scores:
        groups.setdefault(one.data, []).append(one)
    return groups


def readable_ticks(ticks: Iterable[float], limits: tuple[float, float]) -> list[float]:
    """Leave out ticks of a logarithmic axis whose labels would overlap."""
    least = 0.075 * abs(math.log(limits[0] / limits[1]))
    kept: list[float] = []
    for tick in sorted(ticks, reverse=True):
        if min(limits) <= tick <= max(limits) and (not kept or math.log(kept[-1] / tick) >= least):
            kept.append(tick)
    return kept


def draw(scores: Sequence[ModelScores], path: Path) -> None:
    """Draw a panel per data set: AUC with standard deviations, 1 - AUC on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    groups = by_data(scores)
    heights = [len(of_data) for of_data in groups.values()]
    canvas, axes = plt.subplots(
        len(groups), 1, figsize=(8.5, 0.9 * len(groups) + 0.3 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for (name, of_data), axis in zip(groups.items(), axes[:, 0], strict=True):
        for place, one in enumerate(reversed(of_data)):
            gap = 1 - mean(one.auc)
            peer = "#2e6f95" if one.model in TORCHREC_DEEPFM else "#8d99ae"
            colour = "#d1495b" if one.model == "DeepFM" else peer
            spread = min(deviation(one.auc), 0.9 * gap)
            axis.errorbar(gap, place, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5)
            axis.annotate(
                f"{mean(one.auc):.4f}", (gap, place), xytext=(0, 5), textcoords="offset points", fontsize=7, ha="center"
            )
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.xaxis.set_major_locator(FixedLocator(readable_ticks(GAPS, axis.get_xlim())))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.4g}"))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_yticks(range(len(of_data)), [one.model for one in reversed(of_data)], fontsize=8)
        axis.set_ylim(-0.6, len(of_data) - 0.2)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        split = of_data[0].split
        axis.set_title(f"{name}: {split} AUC, mean and standard deviation over seeds", fontsize=9, loc="left")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)

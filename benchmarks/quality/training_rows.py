"""DeepFM on synthetic sets of several sizes, each with a known best possible AUC.

    python -m benchmarks.quality.training_rows --output quality-size

All sets have the same true model and are trained with recipe ``synthetic`` (3 epochs). Lift is
(AUC - 0.5) / (best AUC - 0.5) on the test split, which grows with the set. Writes ``size.md``, ``size.csv`` and
``size.png``. Sets (200 MB per million rows, and 300 MB of text during the preparation) and results are kept, as in
``table.py``.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._lib.formatting import markdown
from benchmarks._lib.seed_statistics import mean, with_deviation
from benchmarks.quality.datasets import synthetic
from benchmarks.quality.workers.training_jobs import Job, result_of
from torchrec_deepfm.data.dataset.prepared import PreparedData


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    output: Path
    """Folder for the results, the table and the picture."""
    rows: tuple[int, ...] = (100_000, 1_000_000, 5_000_000)
    """Training rows of the sets."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings; the sets have seed 0."""
    cores: int = 1
    """Threads of each training."""


@dataclass(frozen=True, kw_only=True)
class SizeScores:
    """The scores of one size, a value per seed."""

    rows: int
    best: float
    auc: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def lift(self) -> tuple[float, ...]:
        """Share of the best possible lift over chance."""
        return tuple((auc - 0.5) / (self.best - 0.5) for auc in self.auc)


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    points: list[SizeScores] = []
    for rows in options.rows:
        folder = synthetic(options.output, rows)
        settings = {"model": "DeepFM", "recipe": "synthetic", "changes": {}}
        results = [
            result_of(
                Job(data=folder, model="DeepFM", worker="train_deepfm", settings=settings, seed=seed),
                options.output,
                cores=options.cores,
            )
            for seed in options.seeds
        ]
        best = PreparedData.open(folder).optimum["test"]["auc"]
        point = SizeScores(
            rows=rows,
            best=best,
            auc=tuple(result["test"]["auc"] for result in results),
            seconds=tuple(result["train_seconds"] for result in results),
        )
        points.append(point)
        print(f"{rows:>10,} rows  AUC {mean(point.auc):.5f} of {best:.5f}  lift {mean(point.lift):.2%}", flush=True)
    report(points, options.output)


def report(points: list[SizeScores], output: Path) -> None:
    """Write and print the table, and draw the picture."""
    rows = [
        [
            f"{one.rows:,}",
            with_deviation(one.auc),
            f"{one.best:.4f}",
            f"{mean(one.lift):.2%}",
            f"{mean(one.seconds):.0f}",
        ]
        for one in points
    ]
    text = markdown(["training rows", "test AUC", "best possible", "lift", "training, s"], rows) + "\n"
    (output / "size.md").write_text(text, encoding="utf-8")
    with (output / "size.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rows", "auc", "best_reachable_auc", "lift", "train_seconds"])
        for one in points:
            for auc, lift, seconds in zip(one.auc, one.lift, one.seconds, strict=True):
                writer.writerow([one.rows, auc, one.best, lift, seconds])
    draw(points, output / "size.png")
    print("\n" + text)


def draw(points: list[SizeScores], path: Path) -> None:
    """Draw the lift missing to the optimum over the number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    canvas, axis = plt.subplots(figsize=(6, 3.6))
    missing = [100 * (1 - mean(one.lift)) for one in points]
    axis.plot([one.rows for one in points], missing, "o-", color="#d1495b")
    for one, gap in zip(points, missing, strict=True):
        label = f"{mean(one.auc):.4f} of {one.best:.4f}"
        axis.annotate(label, (one.rows, gap), xytext=(0, 8), textcoords="offset points", fontsize=8, ha="center")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.margins(x=0.15, y=0.2)
    axis.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axis.set_xlabel("training rows")
    axis.set_ylabel("lift missing to the optimum")
    axis.grid(color="#e5e5e5", linewidth=0.6)
    axis.set_title("DeepFM on synthetic clicks: test AUC, and the best possible", fontsize=9, loc="left")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

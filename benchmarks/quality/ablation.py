"""Ablation on the default synthetic set: LR, FM, DNN and DeepFM, trained by the command line with recipe synthetic.

    python -m benchmarks.quality.ablation --output quality

The set is generated in the output folder, unless ``--data`` is given. Its best possible AUC is known, so each model's
test AUC is also given as a lift: (AUC - 0.5) / (best AUC - 0.5). Every model is trained once per seed; ``quality.csv``
has all runs, the printed table the means and the spread (highest less lowest).
"""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._lib.commands import torchrec_deepfm
from benchmarks._lib.formatting import markdown, versions, versions_line
from benchmarks._lib.seed_statistics import mean
from benchmarks.quality.datasets import synthetic

MODELS = {"LR": ("linear",), "FM": ("linear", "fm"), "DNN": ("deep",), "DeepFM": ("linear", "fm", "deep")}
COLUMNS = ("model", "seed", "auc", "best_reachable_auc", "lift", "logloss", "ne", "samples_per_second", "train_seconds")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    output: Path
    """Folder for the data, the runs and quality.csv."""
    data: Path | None = None
    """Prepared synthetic folder. Default: generate it."""
    data_seed: int = 0
    """Seed of the generated set."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the trainings."""
    rows: int = 1_200_000
    """Training rows of the generated set."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.data or synthetic(options.output, options.rows, options.data_seed)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        for model, terms in MODELS.items():
            run = options.output / f"{model}-{seed}"
            shutil.rmtree(run, ignore_errors=True)
            words = ("--recipe", "synthetic", "--seed", seed, "--terms", *terms)
            torchrec_deepfm("train", "--data", data, "--output", run, *words)
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            found = {"model": model, "seed": seed, **summary, **summary["test"]}
            rows.append({column: found[column] for column in COLUMNS})
            print(f"{model:<7} seed {seed}  AUC {found['auc']:.4f}  lift {found['lift']:.4f}", flush=True)
    with (options.output / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    report(rows, options)


def report(rows: list[dict[str, object]], options: Options) -> None:
    """Print the means over the seeds."""
    print(versions_line(versions("torch", "torchrec")))
    print(f"best possible test AUC {rows[0]['best_reachable_auc']:.4f}; training seeds {options.seeds}")
    lines = []
    for model in MODELS:
        of_model = [row for row in rows if row["model"] == model]
        auc, lift, loss = ([float(str(row[column])) for row in of_model] for column in ("auc", "lift", "logloss"))
        cells = [[f"{mean(values):.4f}", f"{max(values) - min(values):.4f}"] for values in (auc, lift)]
        lines.append([model, *cells[0], *cells[1], f"{mean(loss):.4f}"])
    print(markdown(["model", "test AUC", "spread", "lift", "spread", "logloss"], lines))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

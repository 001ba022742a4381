"""Ablation on the default synthetic set: LR, FM, DNN and DeepFM, trained by the command line with the recipe synthetic.

    python -m benchmarks.quality.ablation --output quality

The set is made and prepared in the output folder, unless ``--data`` names one. The best AUC that it allows is known, so
each model's AUC on the test split stands beside it as a lift: (AUC - 0.5) / (best AUC - 0.5). Every model is trained
once per seed; ``quality.csv`` has all runs, and the printed table the means and the spread (highest less lowest).
"""

import csv
import json
import platform
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._lib.commands import torchrec_deepfm

MODELS = {"LR": ("linear",), "FM": ("linear", "fm"), "DNN": ("deep",), "DeepFM": ("linear", "fm", "deep")}
COLUMNS = ("model", "seed", "auc", "best_reachable_auc", "lift", "logloss", "ne", "samples_per_second", "train_seconds")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    output: Path
    """Folder for the data, the runs and quality.csv."""
    data: Path | None = None
    """Prepared synthetic folder; by default the set is made anew."""
    data_seed: int = 0
    """Seed of the set that is made."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the trainings."""
    rows: int = 1_200_000
    """Training rows of the set that is made."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.data or make_data(options)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        for model, terms in MODELS.items():
            run = options.output / f"{model}-{seed}"
            shutil.rmtree(run, ignore_errors=True)
            torchrec_deepfm(
                "train", "--recipe", "synthetic", "--data", data, "--output", run, "--seed", seed, "--terms", *terms
            )
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            found = {"model": model, "seed": seed, **summary, **summary["test"]}
            rows.append({column: found[column] for column in COLUMNS})
            print(f"{model:<7} seed {seed}  AUC {found['auc']:.4f}  lift {found['lift']:.4f}", flush=True)
    with (options.output / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    report(rows, options)


def make_data(options: Options) -> Path:
    raw, prepared = options.output / "raw", options.output / "prepared"
    if not prepared.exists():
        shutil.rmtree(raw, ignore_errors=True)
        torchrec_deepfm("synthetic", "--output", raw, "--rows", options.rows, "--seed", options.data_seed)
        held_out = ("--validation", raw / "validation.tsv", "--test", raw / "test.tsv")
        torchrec_deepfm("prepare", "--input", raw / "day_0.tsv", *held_out, "--output", prepared)
    return prepared


def report(rows: list[dict[str, object]], options: Options) -> None:
    import torch
    import torchrec

    print(f"torch {torch.__version__}, torchrec {torchrec.__version__}, Python {platform.python_version()}")
    print(f"best reachable test AUC {rows[0]['best_reachable_auc']:.4f}; training seeds {options.seeds}")
    print("| model | test AUC | spread | lift | spread | logloss |\n| --- | --- | --- | --- | --- | --- |")
    for model in MODELS:
        mine = [row for row in rows if row["model"] == model]
        auc, lift, logloss = ([float(str(row[column])) for row in mine] for column in ("auc", "lift", "logloss"))
        print(
            f"| {model} | {statistics.mean(auc):.4f} | {max(auc) - min(auc):.4f} "
            f"| {statistics.mean(lift):.4f} | {max(lift) - min(lift):.4f} | {statistics.mean(logloss):.4f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""What an option costs in quality: DeepFM with and without it, seed by seed on the same rows.

    python -m benchmarks.quality.variants precision --output quality
    python -m benchmarks.quality.variants optimizers --output quality

``precision``: bfloat16 products (medium) and bfloat16 autocast against float32. ``optimizers``: Adagrad and row-wise
Adagrad, fused into the tables' backward pass, against Adam over whole tables. Each optimizer has its own best settings:
all of its ``CANDIDATES`` are trained with the first seed, the best by validation AUC with all seeds.

Recipes and settings are those of ``table.py``. Both may share an output folder: the data and the results that the table
has already are used.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks._lib.formatting import markdown, markdown_row
from benchmarks._lib.seed_statistics import compare_paired, with_deviation
from benchmarks.quality.datasets import SHARED, real, synthetic
from benchmarks.quality.settings import deepfm_config
from benchmarks.quality.workers.training_jobs import Job, result_of

# Changes per variant; the others are compared with the first one.
PRECISIONS: dict[str, list[dict[str, Any]]] = {name: [{"precision": name}] for name in ("float32", "medium", "bf16")}
# Fused kernels have no whole-table penalty, only one on the rows that a batch looks up.
_FUSED = {"embedding_l2": 0.0, "linear_l2": 0.0}
CANDIDATES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "frappe": {
        "adam": [{}],
        **{
            name: [
                {"sparse_optimizer": name, "sparse_lr": rate, **_FUSED, "touched_embedding_l2": penalty}
                for rate in (0.02, 0.05, 0.1)
                for penalty in (0.0, 0.05, 0.2)
            ]
            for name in ("adagrad", "rowwise_adagrad")
        },
    },
    "synthetic": {
        "adam": [{}, {"sparse_lr": 3e-3}],
        **{
            name: [{"sparse_optimizer": name, "sparse_lr": rate, **_FUSED} for rate in (0.01, 0.02, 0.05)]
            for name in ("adagrad", "rowwise_adagrad")
        },
    },
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    what: Annotated[Literal["precision", "optimizers"], tyro.conf.Positional]
    """Which option to vary."""
    output: Path
    """Folder for the data, the results and the table."""
    datasets: tuple[Literal["frappe", "synthetic"], ...] = ("frappe", "synthetic")
    """Data sets; missing ones are reported and left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    shared: Path = SHARED
    """Folder that contains frappe/."""
    rows: int = 300_000
    """Training rows of the synthetic set."""
    cores: int = 1
    """Threads of each training."""
    quick: bool = False
    """Tiny models, one epoch, as a check."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    lines: list[list[str]] = []
    kept: list[list[object]] = []
    for name in options.datasets:
        output, shared = options.output, options.shared
        folder = synthetic(output, options.rows) if name == "synthetic" else real(name, output, shared)
        if folder is None:
            print(f"{name}: not in {options.shared}, left out")
            continue
        variants = PRECISIONS if options.what == "precision" else CANDIDATES[name]
        first: list[float] = []
        for variant, candidates in variants.items():
            chosen = best_of(name, folder, variant, candidates, options)
            results = [train(name, folder, variant, chosen, seed, options) for seed in options.seeds]
            split = "test" if "test" in results[0] else "validation"
            auc = [float(result[split]["auc"]) for result in results]
            first = first or auc
            changes = ", ".join(f"{key} {value}" for key, value in chosen.items()) or "none"
            against = "" if auc is first else compare_paired(auc, first)
            loss = with_deviation([result[split]["logloss"] for result in results])
            lines.append([f"{name}, {split}", variant, changes, with_deviation(auc, 5), against, loss])
            for seed, result in zip(options.seeds, results, strict=True):
                kept.append([name, split, variant, changes, seed, result[split]["auc"], result[split]["logloss"]])
            print(markdown_row(lines[-1]), flush=True)
    text = markdown(["data", "variant", "changes", "AUC", "against the first", "logloss"], lines) + "\n"
    (options.output / f"{options.what}.md").write_text(text, encoding="utf-8")
    with (options.output / f"{options.what}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "split", "variant", "changes", "seed", "auc", "logloss"])
        writer.writerows(kept)
    print("\n" + text)


def best_of(
    name: str, folder: Path, variant: str, candidates: list[dict[str, Any]], options: Options
) -> dict[str, Any]:
    """Return the candidate with the best validation AUC for the first seed."""
    if len(candidates) == 1:
        return candidates[0]
    tried = []
    for candidate in candidates:
        found = train(name, folder, variant, candidate, options.seeds[0], options)["validation"]
        tried.append(found["auc"])
        print(f"{name} {variant} {candidate}: validation AUC {found['auc']:.5f} {found['logloss']:.4f}", flush=True)
    return candidates[tried.index(max(tried))]


def train(
    name: str, folder: Path, variant: str, changes: dict[str, Any], seed: int, options: Options
) -> dict[str, Any]:
    recipe, settings = deepfm_config(name, "DeepFM", precision="medium", quick=options.quick)
    changed = settings | changes
    label = " ".join(["DeepFM", variant, *(f"{key} {value}" for key, value in changes.items())])
    job = Job(
        data=folder,
        model="DeepFM" if changed == settings else label,  # the name in the quality table
        worker="train_deepfm",
        settings={"model": "DeepFM", "recipe": recipe, "changes": changed},
        seed=seed,
    )
    return result_of(job, options.output, cores=options.cores)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

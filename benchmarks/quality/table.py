"""The quality table: DeepFM, its parts and its peers on the same rows and splits, over several seeds.

    python -m benchmarks.quality.table --output quality

LR, FM, DNN, FM & DNN (no shared latent vectors) and DeepFM, trained by this project's trainer; scikit-learn's logistic
regression; DeepFM of FuxiCTR and of DeepCTR-Torch, in environments that the first run installs, with numbers scaled to
[0, 1] as both expect; TorchRec's SimpleDeepFMNN. All read the rows that ``prepare`` wrote, have the same threads and
precision of matrix products, and take their best epoch by validation AUC. ``settings.py`` has every setting. Scores are
those of the test split, or of the validation split if there is none (Frappe's is not among the local data); choosing
the epoch on it makes them slightly too good, for all models alike.

The output folder keeps the result of every training, so that the same command resumes after an interruption.
``quality.md``, ``quality.csv``, ``quality.json`` and ``quality.png`` are written after each seed.
"""

import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks._lib.commands import ROOT
from benchmarks._lib.formatting import versions
from benchmarks.quality.datasets import SHARED, real, synthetic
from benchmarks.quality.settings import Row, rows
from benchmarks.quality.workers.training_jobs import Job, kept_result, result_of
from benchmarks.quality.write_tables import ModelScores, write
from torchrec_deepfm.data.dataset.prepared import PreparedData

QUICK_ROWS = 4000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    output: Path
    """Folder for the data, the results, the table and the picture."""
    datasets: tuple[Literal["frappe", "synthetic", "criteo-sample"], ...] = ("frappe", "synthetic", "criteo-sample")
    """Data sets; missing ones are reported and left out."""
    models: tuple[str, ...] = ()
    """Only rows whose model begins with one of these. Default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    shared: Path = SHARED
    """Folder that contains frappe/ and criteo/."""
    frappe_test: Path | None = None
    """Parquet file with Frappe's test split, to score on."""
    rows: int = 300_000
    """Training rows of the synthetic set."""
    data_seed: int = 0
    """Seed of the synthetic set."""
    precision: Literal["float32", "medium"] = "medium"
    """Of all matrix products: medium multiplies in bfloat16 and adds in float32."""
    cores: int = 1
    """Threads of each training."""
    peers: bool = True
    """Run the peers that need another environment."""
    kept_only: bool = False
    """Train nothing: table and picture of the existing results."""
    quick: bool = False
    """Tiny data, tiny models, one epoch, as a check."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for name in options.datasets:
        if name == "synthetic":
            folder = synthetic(options.output, QUICK_ROWS if options.quick else options.rows, options.data_seed)
        else:
            folder = real(name, options.output, options.shared, options.frappe_test)
        if folder is None:
            print(f"{name}: not in {options.shared}, left out", file=sys.stderr)
        else:
            folders[name] = folder
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for seed in options.seeds:
        for name, folder in folders.items():
            for row in chosen_rows(name, options):
                of_row = found.setdefault((name, row.model), {})
                if of_row and not row.repeats:
                    continue
                job = Job(
                    data=folder,
                    model=row.model,
                    worker=row.worker,
                    settings=row.settings,
                    seed=seed,
                    environment=row.environment,
                )
                if options.kept_only and kept_result(job, options.output) is None:
                    continue
                of_row[seed] = result = result_of(job, options.output, cores=options.cores)
                split = scored_split(result)
                print(
                    f"{name:<14} {row.model:<38} seed {seed}  {split} AUC {result[split]['auc']:.5f}  "
                    f"logloss {result[split]['logloss']:.4f}  {result['seconds']:.0f} s",
                    flush=True,
                )
        scores = [over_seeds(name, model, kept, folders[name]) for (name, model), kept in found.items() if kept]
        if not scores:
            raise SystemExit(f"{options.output}: no results; run without --kept-only, or see --shared")
        text = write(scores, options.output, about(options))
    print("\n" + text)


def chosen_rows(name: str, options: Options) -> list[Row]:
    """List the rows of a data set that ``--models`` selects."""
    wanted = rows(name, precision=options.precision, peers=options.peers, quick=options.quick)
    chosen = [row for row in wanted if not options.models or row.model.startswith(options.models)]
    if not chosen:
        raise SystemExit(f"--models {' '.join(options.models)}: none of {', '.join(row.model for row in wanted)}")
    return chosen


def scored_split(result: dict[str, Any]) -> str:
    """Return the name of the split that a result is scored on."""
    return "test" if "test" in result else "validation"


def over_seeds(name: str, model: str, results: dict[int, dict[str, Any]], folder: Path) -> ModelScores:
    """Gather the seeds of a row."""
    runs = list(results.values())
    split = scored_split(runs[0])
    auc = tuple(float(run[split]["auc"]) for run in runs)
    best = PreparedData.open(folder).optimum.get(split)
    return ModelScores(
        data=name,
        model=model,
        split=split,
        seeds=tuple(results),
        auc=auc,
        logloss=tuple(float(run[split]["logloss"]) for run in runs),
        seconds=tuple(float(run["seconds"]) for run in runs),
        epochs=tuple(float(run["epochs"]) for run in runs if run["epochs"]),
        lift=tuple((one - 0.5) / (best["auc"] - 0.5) for one in auc) if best else (),
    )


def about(options: Options) -> dict[str, object]:
    """Return date, commit, versions and options."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip(),
        "versions": versions("torch", "torchrec", "scikit-learn"),
        "options": {key: str(value) for key, value in vars(options).items()},
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

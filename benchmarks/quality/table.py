"""The quality table: our models and their peers on the same rows and splits, over several seeds, in one run.

    python -m benchmarks.quality.table --output quality

LR, FM, DNN, FM & DNN (no shared latent vectors) and DeepFM of ours, trained by our trainer; scikit-learn's logistic
regression; DeepFM of FuxiCTR and of DeepCTR-Torch, in environments of their own that are made at the first run, with
numbers in [0, 1] as both want them; TorchRec's SimpleDeepFMNN. All read the rows that our ``prepare`` gave, have the
same threads and the same precision of matrix products, and take their best epoch by the AUC on the validation split.
``settings.py`` has every setting. Judged is the test split; where there is none (Frappe's is not among the
local data) the validation split, which by the choice of the epoch is a little too good for all of them alike.

Every training's result is kept in the output folder, so that the same command goes on after a stop. ``quality.md``,
``quality.csv``, ``quality.json`` and ``quality.png`` are written after each seed.
"""

import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks._lib.commands import ROOT
from benchmarks.quality.datasets import SHARED, prepared
from benchmarks.quality.settings import Row, rows
from benchmarks.quality.training_jobs import Job, kept_result, result_of
from benchmarks.quality.write_tables import Figure, write
from torchrec_deepfm.data.prepared import PreparedData

QUICK_ROWS = 4000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    output: Path
    """Folder for the data, the results, the table and the picture."""
    datasets: tuple[Literal["frappe", "synthetic", "criteo-sample"], ...] = ("frappe", "synthetic", "criteo-sample")
    """Data sets; those that are not there are left out, which is said."""
    models: tuple[str, ...] = ()
    """Only rows whose model begins with one of these; default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    shared: Path = SHARED
    """Where frappe/ and criteo/ lie."""
    frappe_test: Path | None = None
    """Parquet file with Frappe's test split, to be judged by."""
    rows: int = 300_000
    """Training rows of the synthetic set."""
    data_seed: int = 0
    """Seed of the synthetic set."""
    precision: Literal["float32", "medium"] = "medium"
    """Of the matrix products, for all: medium multiplies in bfloat16 and adds in float32."""
    cores: int = 1
    """Threads of each training."""
    peers: bool = True
    """Whether to run those that are installed into environments of their own."""
    kept_only: bool = False
    """Train nothing: table and picture of the results that are there."""
    quick: bool = False
    """Tiny data, tiny models, one epoch: to see that it runs."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    size = QUICK_ROWS if options.quick else options.rows
    for name in options.datasets:
        test, shared = options.frappe_test, options.shared
        folder = prepared(name, options.output, shared, rows=size, seed=options.data_seed, frappe_test=test)
        if folder is None:
            print(f"{name}: not in {shared}, left out", file=sys.stderr)
        else:
            folders[name] = folder
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for seed in options.seeds:
        for name, folder in folders.items():
            for row in table(name, options):
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
                split = judged(result)
                print(
                    f"{name:<14} {row.model:<38} seed {seed}  {split} AUC {result[split]['auc']:.5f}  "
                    f"logloss {result[split]['logloss']:.4f}  {result['seconds']:.0f} s",
                    flush=True,
                )
        figures = [figure(name, model, results, folders[name]) for (name, model), results in found.items() if results]
        if not figures:
            raise SystemExit(f"{options.output}: there is nothing to make a table of")
        text = write(figures, options.output, about(options))
    print("\n" + text)


def table(name: str, options: Options) -> list[Row]:
    """List the rows of a data set that were asked for."""
    wanted = rows(name, precision=options.precision, peers=options.peers, quick=options.quick)
    chosen = [row for row in wanted if not options.models or row.model.startswith(options.models)]
    if not chosen:
        raise SystemExit(f"--models {' '.join(options.models)}: none of {', '.join(row.model for row in wanted)}")
    return chosen


def judged(result: dict[str, Any]) -> str:
    """Name the split that a result is judged by."""
    return "test" if "test" in result else "validation"


def figure(name: str, model: str, results: dict[int, dict[str, Any]], folder: Path) -> Figure:
    """Gather the seeds of a row."""
    runs = list(results.values())
    split = judged(runs[0])
    auc = tuple(float(run[split]["auc"]) for run in runs)
    best = PreparedData.open(folder).optimum.get(split)
    return Figure(
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
    """Say when, where and with what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchrec", "scikit-learn")},
        "options": {key: str(value) for key, value in vars(options).items()},
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

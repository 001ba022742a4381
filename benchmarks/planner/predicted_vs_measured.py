"""Predicted against measured step times: does the calibrated planner pick a fast plan on this machine?

    OMP_NUM_THREADS=1 python -m benchmarks.planner.predicted_vs_measured --output measured

Four cases: 2 and 4 ranks, each with two lists of tables. In each case a sweep of plans is measured, the hardware is
calibrated to it, the planner plans for that hardware, and its plan is measured beside the plans of the sweep in a new
run: any plan may look good on the steps that the calibration was fitted to. A hardware description is also tested on
the case with the same ranks and the other tables.

The folder gets every experiment with its report, the hardware descriptions, and results.md. A case takes six to twelve
minutes on two idle cores.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from benchmarks._lib import commands
from benchmarks._lib.formatting import markdown
from torchrec_deepfm.experiment.calibrate import recalculate
from torchrec_deepfm.experiment.ranking import agreement
from torchrec_deepfm.experiment.results import Experiment, PlanMeasured, read_experiment
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware

# (rows, ids per sample). With these sizes no plan takes longer than a few times the fastest.
MIXES = {
    "few_large": [(60_000, 1), (40_000, 10), (30_000, 1), (20_000, 4), (8_000, 1), (3_000, 20), (500, 1), (40, 1)],
    "many_small": [(4_000, 1)] * 6 + [(1_000, 3)] * 6 + [(200, 1)] * 6 + [(12_000, 8)] * 2,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    output: Path
    """New folder for the experiments."""
    ranks: tuple[int, ...] = (2, 4)
    """Numbers of ranks."""
    mixes: tuple[Literal["few_large", "many_small"], ...] = ("few_large", "many_small")
    """Lists of tables."""
    dim: int = 32
    """Width of the tables."""
    batch_size: int = 1024
    """Samples per rank and step."""
    steps: int = 10
    """Steps per turn."""
    turns: int = 7
    """Turns of the sweep; the second experiment has 2 x this - 1."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: an experiment predicted for a hardware description."""

    case: str
    hardware: str
    experiment: Experiment

    def cells(self) -> list[str]:
        """Format the row."""
        pairs = [(one.predicted_ms or 0.0, one.step_ms) for one in self.experiment.plans]
        error = sum(abs(predicted / measured - 1) for predicted, measured in pairs) / len(pairs)
        found = self.experiment.agreement()
        assert found is not None
        rank = "-" if found.spearman is None else f"{found.spearman:.2f}"
        best = min(one.step_ms for one in self.experiment.plans)
        shown = [f"{error:.0%}", rank, found.picked, found.best, f"{best:.1f}", f"{found.regret:.1%}"]
        return [self.case, self.hardware, str(found.plans), *shown]


HEAD = ["case", "predicted for", "plans", "error", "Spearman", "picked", "fastest", "its ms", "regret"]


def write_tables(folder: Path, mix: str, dim: int) -> Path:
    """Write a list of tables as CSV; return the file."""
    path = folder / f"{mix}.csv"
    rows = [f"t_{n},{rows},{dim},{pooling}" for n, (rows, pooling) in enumerate(MIXES[mix], start=1)]
    path.write_text("\n".join(["name,num_embeddings,embedding_dim,pooling_factor", *rows]) + "\n")
    return path


def measure_case(folder: Path, ranks: int, mix: str, options: Options) -> tuple[Path, Path, Path]:
    """Sweep, calibrate, plan, measure again; return both experiments' folders and the hardware description."""
    name = f"{ranks}_ranks_{mix}"
    tables = write_tables(folder, mix, options.dim)
    common = ["--tables", tables, "--ranks", ranks, "--batch-size", options.batch_size]
    steps = ["--steps", options.steps, "--over-arch-layer-sizes"]
    run = partial(commands.torchrec_deepfm, show=True)
    first, second, hardware = folder / name, folder / f"{name}_again", folder / f"{name}.toml"
    run("experiment", *common, *steps, "--turns", options.turns, "--output", first)
    run("calibrate", first, "--output", hardware)
    run("plan", *common, "--hardware", hardware, "--output", folder / f"{name}_calibrated.json")
    plans = [folder / f"{name}_calibrated.json", *sorted((first / "plans").glob("*.json"))]
    # The best of many nearly equal plans is the luckiest one, so the second run has twice the turns.
    again = ["--turns", 2 * options.turns - 1, "--hardware", hardware, "--seed", 1]
    run("experiment", *common, *steps, *again, "--output", second, "--plans", *plans)
    return first, second, hardware


def planned_regret(experiment: Experiment) -> float:
    """Return how much longer the calibrated planner's plan takes than the fastest plan measured beside it."""
    best = min(one.step_ms for one in experiment.plans)
    return next(one.step_ms for one in experiment.plans if one.name.endswith("_calibrated")) / best - 1


def halves(experiment: Experiment) -> str:
    """Return the regret of noise alone: that of the plan that is fastest in every other turn."""

    def half(one: PlanMeasured, first: int) -> float:
        turns = sorted(one.turns_ms[first::2])
        return turns[len(turns) // 2]

    names = [one.name for one in experiment.plans]
    left, right = ([half(one, first) for one in experiment.plans] for first in (0, 1))
    found = agreement(names, left, right)
    return f"{found.regret:.1%}, Spearman {found.spearman:.2f}" if found.spearman is not None else f"{found.regret:.1%}"


def main(options: Options) -> None:
    if options.turns < 2:
        raise SystemExit(f"--turns {options.turns}: at least 2 are needed, to compare the turns of a plan")
    options.output.mkdir(parents=True)
    rows, picked = [], []
    for ranks in options.ranks:
        cases = {mix: measure_case(options.output, ranks, mix, options) for mix in options.mixes}
        for mix, (first, second, hardware) in cases.items():
            case, fitted = f"{ranks} ranks, {mix}", read_hardware(str(hardware))
            sweep, again = read_experiment(first), read_experiment(second)
            rows.append(Row(case=case, hardware="cpu preset", experiment=sweep))
            rows.append(Row(case=case, hardware="fitted to it", experiment=recalculate(sweep, fitted)))
            rows.append(Row(case=f"{case}, again", hardware="fitted before", experiment=again))
            for other, (_, _, foreign) in cases.items():
                if other != mix:
                    held_out = recalculate(sweep, read_hardware(str(foreign)))
                    rows.append(Row(case=case, hardware=f"fitted to {other}", experiment=held_out))
            picked.append([case, str(len(again.plans)), f"{planned_regret(again):.1%}", halves(again)])
    planned = markdown(["case", "plans", "regret of the calibrated planner's plan", "of noise alone"], picked)
    text = f"{markdown(HEAD, [row.cells() for row in rows])}\n\n{planned}\n"
    (options.output / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

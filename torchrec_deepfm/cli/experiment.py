"""The commands that measure: ``experiment`` and ``calibrate``. They load torch when they run."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.errors import UserError, check_range, flag
from torchrec_deepfm.files import check_target
from torchrec_deepfm.launch import launcher
from torchrec_deepfm.sharding.inputs.hardware import MAX_BATCH_SIZE, MAX_RANKS
from torchrec_deepfm.sharding.inputs.sharding_types import FusedOptimizer

if TYPE_CHECKING:
    import torch

    from torchrec_deepfm.experiment.plans import PlanSet
    from torchrec_deepfm.experiment.results import Experiment
    from torchrec_deepfm.experiment.runner import RunnerOptions
    from torchrec_deepfm.sharding.inputs.hardware import Hardware
    from torchrec_deepfm.sharding.inputs.tables import Table


@dataclass(frozen=True, kw_only=True)
class ExperimentCommand:
    """Measure sharding plans on real ranks, beside what is predicted of them."""

    tables: str
    """criteo-terabyte, criteo-dcnv2, a TOML, JSON or CSV file of tables, or a prepared folder."""
    output: Path
    """Folder to write: results.json, plans/, report.html. Must be empty or absent."""
    plans: tuple[Path, ...] = ()
    """Plans as files."""
    rules: tuple[str, ...] = ()
    """Plans as constraints, one text each: "C1=row_wise *=table_wise". TorchRec's planner chooses the rest."""
    sweep: tyro.conf.FlagCreatePairsOff[bool] = False
    """The sweep beside --plans and --rules; it is the default without them: every type, mixes, both planners."""
    ranks: int | None = None
    """Ranks to start on this host, where none are started by torchrun or TorchX. Default: one per GPU; 2 without."""
    dim: int | None = None
    """Width of every table, instead of the one in --tables."""
    batch_size: int = 1024
    """Samples per rank and step."""
    steps: int = 10
    """Steps in a turn."""
    turns: int = 5
    """Turns of each plan; the plans take turns, so that what drifts meets all of them."""
    hardware: str | None = None
    """What the predictions are for: a preset or a TOML file. Default: cpu, or the preset of the GPU."""
    optimizer: FusedOptimizer = "rowwise_adagrad"
    """Optimizer of the tables."""
    over_arch_layer_sizes: tuple[int, ...] = (64,)
    """Hidden layers of the dense part."""
    ids: Literal["zipf", "uniform"] = "zipf"
    """How ids are drawn: zipf, the k-th in proportion to 1/k; or uniform."""
    seed: int = 0
    """Seed of the ids."""
    scaling: tuple[int, ...] = ()
    """Numbers of ranks for which the report shows a prediction too. Default: 1, 2, 4, 8 times those there are."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("batch_size", "steps", "turns", "ranks"):
            check_range(name, getattr(self, name), 1)
        check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        for name, counts in (("ranks", (self.ranks,)), ("scaling", self.scaling)):
            for count in counts:
                check_range(name, count, 1, MAX_RANKS)
        for size in self.over_arch_layer_sizes:
            if size < 1:
                raise UserError("every hidden layer needs at least one unit", where=f"--over-arch-layer-sizes {size}")

    def run(self) -> None:
        """Measure the plans and write the results."""
        console.import_quietly("torchrec")
        if "RANK" not in os.environ:
            import torch

            from torchrec_deepfm.experiment.plans import check_output
            from torchrec_deepfm.sharding.inputs.tables import read_tables

            check_output(self.output)  # a rank would report the same, some seconds later
            read_tables(self.tables, self.dim)
            count = self.ranks or torch.cuda.device_count() or 2
            if count > 1:
                launcher.main(["--standalone", "--nproc_per_node", str(count), "-m", "torchrec_deepfm", *self.words()])
                return
        self._run_as_rank()

    def words(self) -> list[str]:
        """Return the command line that stands for this command."""
        found = ["experiment"]
        for one in fields(self):
            value, option = getattr(self, one.name), flag(one.name)
            if isinstance(value, bool):
                found += [option] * value
            elif value is not None and (value != () or one.name == "over_arch_layer_sizes"):
                found += [option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
        return found

    def _run_as_rank(self) -> None:
        from torchrec_deepfm.distributed import process_group as ranks
        from torchrec_deepfm.experiment.noise import reduce_noise
        from torchrec_deepfm.experiment.runner import measure_plans

        with ranks.process_group() as device:
            reduce_noise(device)
            if self.ranks not in (None, ranks.count()):
                raise UserError(
                    f"{ranks.count()} rank(s) are started already",
                    where=f"--ranks {self.ranks}",
                    remedy="leave --ranks out",
                )
            # All that can go wrong comes before the measuring, which takes long.
            tables, hardware, plans, scaling = ranks.on_main(lambda: self._prepare(device))
            options = self._options(tables)
            if ranks.is_main():
                console.say(f"{len(plans.named)} plans on {ranks.count()} ranks, {options.turns} turns each")
            measured = measure_plans(plans.named, options, device, console.say)

            def write() -> None:
                from torchrec_deepfm.experiment.plans import summarize, write_experiment
                from torchrec_deepfm.sharding.runtime.local_hardware import device_name

                experiment = summarize(measured, plans, options, hardware, device=device_name(device), scaling=scaling)
                write_experiment(experiment, self.output)
                console.say(experiment_table(experiment))
                console.say(f"wrote {self.output}{os.sep}: results.json, plans{os.sep}, report.html")

            ranks.on_main(write)

    def _prepare(self, device: "torch.device") -> "tuple[tuple[Table, ...], Hardware, PlanSet, dict[int, float]]":
        from torchrec_deepfm.distributed import process_group as ranks
        from torchrec_deepfm.experiment.plans import PlanSelection, check_output, make_plans, predict_scaling
        from torchrec_deepfm.sharding.inputs.tables import read_tables
        from torchrec_deepfm.sharding.runtime.local_hardware import describe_hardware

        check_output(self.output)
        tables = read_tables(self.tables, self.dim)
        hardware = describe_hardware(self.hardware, device)
        wanted = PlanSelection(files=self.plans, rules=self.rules, sweep=self.sweep or not (self.plans or self.rules))
        plans = make_plans(wanted, tables, hardware, ranks.count(), self.batch_size, self.optimizer)
        counts = self.scaling or tuple(ranks.count() * times for times in (1, 2, 4, 8))
        scaling = predict_scaling(tables, hardware, counts, self.batch_size, self.optimizer)
        return tables, hardware, plans, scaling

    def _options(self, tables: "tuple[Table, ...]") -> "RunnerOptions":
        from torchrec_deepfm.experiment.runner import RunnerOptions
        from torchrec_deepfm.experiment.workload import BatchOptions

        return RunnerOptions(
            tables=tables,
            batch=BatchOptions(batch_size=self.batch_size, ids=self.ids, seed=self.seed),
            steps=self.steps,
            turns=self.turns,
            optimizer=self.optimizer,
            over_arch_layer_sizes=self.over_arch_layer_sizes,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrateCommand:
    """Fit a hardware description to experiments, so that the next plan is for this machine."""

    experiments: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders that experiment wrote, of one kind of host."""
    output: Path
    """TOML file to write, for --hardware. Beside it a .py file of the same name, which plain TorchRec imports."""
    check: tuple[Path, ...] = ()
    """More folders: the description is not fitted to them, but what it predicts is compared with what they measured."""
    name: Annotated[str | None, tyro.conf.arg(name="name")] = None
    """Name of the description. Default: the file's name."""

    def run(self) -> None:
        """Fit the hardware and write its description."""
        console.import_quietly("torchrec")
        from torchrec_deepfm.experiment.calibrate import calibrate, recalculate
        from torchrec_deepfm.experiment.report import write_experiment_report
        from torchrec_deepfm.experiment.results import RESULTS, read_experiment
        from torchrec_deepfm.sharding.hardware_module import write_hardware_module
        from torchrec_deepfm.sharding.inputs.hardware import EXTRA
        from torchrec_deepfm.sharding.inputs.hardware_toml import write_hardware

        folders = [_folder(named) for named in (*self.experiments, *self.check)]
        written = [folder / name for folder in folders for name in (RESULTS, "report.html", "report-calibrated.html")]
        check_target("--output", self.output, like="here.toml", inputs=written)
        module = self.output.with_suffix(".py")
        check_target("--output", module, like="here.toml", inputs=written)
        fitted_to = {folder: read_experiment(folder) for folder in map(_folder, self.experiments)}
        held_out = {folder: read_experiment(folder) for folder in map(_folder, self.check)}
        found = calibrate(list(fitted_to.values()), self.name or self.output.stem)
        lines = [f"{'':<44}{'plans':>6}{'error':>9}{'spearman':>10}{'regret':>9}  picked"]
        recalculated = {}
        for kind, group in (("fitted", fitted_to), ("held out", held_out)):
            for folder, experiment in group.items():
                after = recalculated[folder] = recalculate(experiment, found.hardware)
                for what, one in (("before", experiment), ("after", after)):
                    lines.append(_agreement_line(f"{folder.absolute().name} ({kind}), {what}", one))
        write_hardware(found.hardware, self.output)
        files = str(self.output)
        if found.hardware.pod_size == 1:
            write_hardware_module(found.hardware, module)
            files += f", {module}"
        for folder, after in recalculated.items():
            write_experiment_report(after, folder / "report-calibrated.html")
        console.say("\n".join(lines))
        for key, value in found.hardware.to_json().items():
            if key.endswith("_bandwidth") and key not in found.unseen:
                shown = "unlimited for these plans" if key in found.unlimited else f"{value / 1e9:.4g} GB/s"
                console.say(f"{key:<24}{shown}")
        for key, value in found.hardware.extra.items():
            console.say(f"{key:<24}{value:.4g} ms for {EXTRA[key]}")
        for line in found.inseparable:
            console.say(f"warning: {line}")
        console.say(f"wrote {files} and report-calibrated.html into each folder")


def experiment_table(experiment: "Experiment") -> str:
    """Lay out an experiment: a line per plan, fastest first, and how well the predictions order them."""
    lines = [f"{'plan':<40}{'predicted':>11}{'measured':>10}  (ms per step; fastest to slowest turn)"]
    ordered = sorted(experiment.plans, key=lambda plan: plan.step_ms)
    for one in ordered:
        predicted = "-" if one.predicted_ms is None else f"{one.predicted_ms:.2f}"
        turns = f"({min(one.turns_ms):.2f} to {max(one.turns_ms):.2f})"
        noise = "  within noise of the fastest" if one is not ordered[0] and one.within_noise_of(ordered[0]) else ""
        lines.append(f"{one.name:<40}{predicted:>11}{one.step_ms:>10.2f}  {turns}{noise}")
    lines += [f"left out: {name}: {why}" for name, why in experiment.left_out.items()]
    found = experiment.agreement()
    if found is not None:
        rank = "-" if found.spearman is None else f"{found.spearman:.3f}"
        lines.append(
            f"rank correlation {rank}; regret {found.regret:.1%}: {found.picked} is predicted to be the fastest"
        )
    return "\n".join(lines)


def _folder(named: Path) -> Path:
    from torchrec_deepfm.experiment.results import RESULTS

    return named.parent if named.name == RESULTS else named


def _agreement_line(name: str, experiment: "Experiment") -> str:
    found = experiment.agreement()
    if found is None:  # nothing was predicted of it
        return f"{name:<44}{len(experiment.plans):>6}{'-':>9}{'-':>10}{'-':>9}  -"
    rank = "-" if found.spearman is None else f"{found.spearman:.3f}"
    return f"{name:<44}{found.plans:>6}{experiment.mean_error():>9.1%}{rank:>10}{found.regret:>9.1%}  {found.picked}"

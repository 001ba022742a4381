"""An experiment: which plans it compares, and the folder it writes. ``measure_plans`` measures in between."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median_low

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.report import write_experiment_report
from torchrec_deepfm.experiment.results import PLANS, RESULTS, Experiment, PlanMeasured, Settings
from torchrec_deepfm.experiment.runner import RunnerOptions
from torchrec_deepfm.files import check_local
from torchrec_deepfm.sharding.estimate import with_prediction
from torchrec_deepfm.sharding.inputs.constraints import parse_constraints
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES, FusedOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.io import load_plan, save_plan
from torchrec_deepfm.sharding.plan.plan import PlanFile, Search
from torchrec_deepfm.sharding.plan.validate import check_fits
from torchrec_deepfm.sharding.search.plan_tables import Planning

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class PlanSelection:
    """Which plans an experiment compares.

    Attributes:
        files: files of plans, whose names become the plans' names.
        rules: sets of constraints (see ``constraints``), each the text of a plan: rules with blanks between them.
        sweep: also each sharding type by itself, mixes of them, and what the planners find.
    """

    files: tuple[Path, ...] = ()
    rules: tuple[str, ...] = ()
    sweep: bool = True


@dataclass(frozen=True, kw_only=True)
class PlanSet:
    """The plans of an experiment by name, with predictions, and what the sweep left out, with the reason."""

    named: tuple[tuple[str, PlanFile], ...]
    left_out: Mapping[str, str]


def make_plans(
    selection: PlanSelection,
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    batch_size: int,
    optimizer: FusedOptimizer,
) -> PlanSet:
    """Make the plans of an experiment, with predictions; refuse files and rules that the ranks can't run."""
    local = hardware.local_world_size(ranks)
    named: dict[str, PlanFile] = {}
    left_out: dict[str, str] = {}
    for path in selection.files:
        if not path.stem.isprintable() or len(path.stem.encode()) > 200:  # it names a file of the experiment too
            raise UserError(
                "the name is too long or can't be printed", where=f"--plans {str(path)!r}", remedy="rename the file"
            )
        plan = load_plan(path)
        check_fits(plan, tables, ranks, local_world_size=local, compute_device=hardware.compute_device, where=str(path))
        if path.stem in named:
            raise UserError(
                f"another plan has the name {path.stem}", where=f"--plans {path}", remedy="rename one of the files"
            )
        named[path.stem] = with_prediction(
            replace(plan, local_world_size=local), tables, hardware, ranks, batch_size, optimizer=optimizer
        )
    for text in selection.rules:
        name = re.sub(r"[^\w.+-]+", "_", text.strip()).strip("_.")[:60] or "rules"  # a file's name, at 4 bytes a letter
        if name in named:
            raise UserError(
                f"another plan has the name {name}", where=f"--rules {text!r}", remedy="leave one of them out"
            )
        named[name] = _planned(text.split(), "torchrec", tables, hardware, ranks, batch_size, optimizer)
    if selection.sweep:
        for name, rules, search in sweep(tables):
            if name in named:
                left_out[name] = "a plan of this name is named already"
                continue
            try:
                plan = _planned(rules, search, tables, hardware, ranks, batch_size, optimizer)
            except UserError as error:
                left_out[name] = str(error)
                continue
            twin = next((other for other, there in named.items() if _same(plan, there)), None)
            if twin is None:
                named[name] = plan
            else:
                left_out[name] = f"the same plan as {twin}"
    if not named:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"no plan to measure{f' ({why})' if why else ''}", remedy="name some with --plans or --rules")
    return PlanSet(named=tuple(named.items()), left_out=left_out)


def sweep(tables: Sequence[Table]) -> Iterator[tuple[str, list[str], Search]]:
    """List the plans of a sweep: name, constraints, and the search that fills in the rest.

    Both searches first, then each type by itself, then mixes: the smaller half of the tables replicated and the others
    sharded; the larger half one way and the others table-wise.
    """
    yield "balanced", [], "balanced"
    yield "torchrec", [], "torchrec"
    for kind in SHARDING_TYPES:
        yield kind, [f"*={kind}"], "torchrec"
    half = median_low(table.num_embeddings for table in tables)
    for kind in ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"):
        yield f"small_replicated+{kind}", [f"<={half}=data_parallel", f">{half}={kind}"], "torchrec"
    for kind in ("row_wise", "column_wise", "table_row_wise"):
        yield f"large_{kind}+table_wise", [f">{half}={kind}", f"<={half}=table_wise"], "torchrec"


def _planned(
    rules: Sequence[str],
    search: Search,
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    batch_size: int,
    optimizer: FusedOptimizer,
) -> PlanFile:
    constraints = parse_constraints(
        rules,
        tables,
        compute_device=hardware.compute_device,
        world_size=ranks,
        local_world_size=hardware.local_world_size(ranks),
    )
    planning = Planning(tables, hardware, ranks, batch_size, constraints=constraints, optimizer=optimizer)
    return planning.checked_plan(search)


def _same(one: PlanFile, other: PlanFile) -> bool:
    def places(plan: PlanFile) -> dict[str, object]:
        return {
            table.name: (
                table.sharding_type,
                table.compute_kernel,
                [(shard.rank, shard.offsets, shard.sizes) for shard in table.shards],
            )
            for table in plan.tables
        }

    return places(one) == places(other)


def predict_scaling(
    tables: Sequence[Table], hardware: Hardware, ranks: Sequence[int], batch_size: int, optimizer: FusedOptimizer
) -> dict[int, float]:
    """Predict the balanced plan for several numbers of ranks, in ms; those without room for it are left out."""
    found = {}
    for count in ranks:
        try:
            hardware.local_world_size(count)
        except UserError as error:
            raise error.within(f"--scaling {count}") from error
        try:
            plan = _planned([], "balanced", tables, hardware, count, batch_size, optimizer)
        except UserError:
            continue
        assert plan.predicted is not None
        found[count] = plan.predicted.critical_path_ms
    return found


def summarize(
    measured: Sequence[PlanMeasured],
    plans: PlanSet,
    options: RunnerOptions,
    hardware: Hardware,
    *,
    device: str,
    scaling: Mapping[int, float],
) -> Experiment:
    """Put an experiment together."""
    first = plans.named[0][1]
    return Experiment(
        settings=Settings(
            tables=options.tables,
            ranks=first.world_size,
            local_ranks=first.local_world_size,
            batch_size=options.batch.batch_size,
            steps=options.steps,
            turns=options.turns,
            optimizer=options.optimizer,
            over_arch_layer_sizes=options.over_arch_layer_sizes,
            ids=options.batch.ids,
            seed=options.batch.seed,
            device=device,
        ),
        plans=tuple(measured),
        hardware=hardware,
        left_out=plans.left_out,
        scaling=scaling,
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        made_with=first.made_with,
    )


def check_output(folder: Path) -> None:
    """Refuse a folder that is not empty, or below which nothing can be written."""
    check_local(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            "the folder is not empty", where=f"--output {folder}", remedy="name another one, or remove it first"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError("a file has this name", where=f"--output {folder}", remedy="name a folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"nothing can be written below {above}", where=f"--output {folder}", remedy="name another folder"
        )


def write_experiment(experiment: Experiment, folder: Path) -> None:
    """Write the folder of an experiment, completely or not at all."""
    check_output(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        try:
            (partial / PLANS).mkdir(parents=True)
            for one in experiment.plans:
                save_plan(one.plan, partial / PLANS / f"{one.name}.json")
            text = json.dumps(experiment.to_json(), indent=1, allow_nan=False)
            (partial / RESULTS).write_text(f"{text}\n", encoding="utf-8")
            write_experiment_report(experiment, partial / REPORT)
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"can't be written ({error.strerror})", where=f"--output {folder}", remedy="name another folder"
        ) from error

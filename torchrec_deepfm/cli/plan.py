"""The command that plans: ``plan``, ``plan show`` and ``plan diff``. It loads torch when it plans."""

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import tyro

from torchrec_deepfm import console
from torchrec_deepfm.errors import UserError, check_range, one_of
from torchrec_deepfm.files import check_target
from torchrec_deepfm.sharding.inputs.sharding_types import FusedOptimizer
from torchrec_deepfm.sharding.plan.plan import OLD_SEARCHES, Objective, PlanFile, Search

# Ranks times tables up to which a report shows TorchRec's plan beside: its planner takes seconds there.
_BESIDE = 1024


def _search(words: list[str]) -> str:
    """Read the name of a search; those of earlier versions still work."""
    name = OLD_SEARCHES.get(words[0], words[0])
    if name not in get_args(Search):
        raise ValueError(f"{name!r} is not valid; choose {one_of(get_args(Search), name)}")
    return name


SearchOption = Annotated[
    Search,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{balanced,torchrec}",
        instance_from_str=_search,
        is_instance=lambda value: value in get_args(Search),
        str_from_instance=lambda value: [value],
    ),
]


@dataclass(frozen=True, kw_only=True)
class ShowPlan:
    """Print a plan: its costs, its memory, and where each table goes."""

    file: tyro.conf.Positional[Path]
    """File of a plan."""
    report: Path | None = None
    """HTML file for a report of the plan."""

    def run(self) -> None:
        """Print the plan."""
        from torchrec_deepfm.sharding.inputs.hardware import RESERVED
        from torchrec_deepfm.sharding.plan.io import load_plan
        from torchrec_deepfm.sharding.plan.text import plan_text

        _check_report(self.report, [self.file])
        plan = load_plan(self.file)
        console.say(plan_text(plan, reserved=RESERVED))
        _write_report(plan, self.report)


@dataclass(frozen=True, kw_only=True)
class DiffPlans:
    """Print how two plans differ: types, ranks, shards and kernels of tables, and predictions."""

    first: tyro.conf.Positional[Path]
    """File of a plan."""
    second: tyro.conf.Positional[Path]
    """File of another plan."""

    def run(self) -> None:
        """Print the differences."""
        from torchrec_deepfm.sharding.plan.io import load_plan
        from torchrec_deepfm.sharding.plan.text import diff_text

        console.say(diff_text(load_plan(self.first), load_plan(self.second), (str(self.first), str(self.second))))


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Plan where tables go on hardware that need not be there. See also plan show and plan diff."""

    tables: str
    """criteo-terabyte, criteo-dcnv2, a TOML, JSON or CSV file of tables, or a prepared folder."""
    hardware: str
    """a100-40, a100-80, h100, h200, b200, gb200, gh200, cpu, torchrec (TorchRec's defaults), or a TOML file."""
    ranks: int
    """Ranks (GPUs) of this hardware."""
    output: Path
    """File of the plan, which train --plan takes."""
    dim: int | None = None
    """Width of every table, instead of the one in --tables."""
    batch_size: int = 8192
    """Samples per rank and step."""
    search: SearchOption = "balanced"
    """balanced, or torchrec: TorchRec's own planner."""
    objective: Objective = "all"
    """Time of the slowest rank that balanced makes small: all terms; total: without the exchange of ids (TorchRec's
    Perf.total); hidden-ids: ids overlap with look-ups and updates, as in a pipelined training."""
    constraint: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.arg(metavar="RULE [RULE ...]"), tyro.conf.UseAppendAction
    ] = ()
    """How a table may be sharded: C1=row_wise, 't_C*=column_wise:min_partition=8', '>1e6=row_wise'."""
    optimizer: FusedOptimizer = "rowwise_adagrad"
    """Optimizer of the tables, whose state takes memory."""
    ema: bool = False
    """Leave memory for the moving average of the weights that train --ema keeps."""
    report: Path | None = None
    """HTML file for a report of the plan."""

    def run(self) -> None:
        """Search for a plan, print and write it."""
        if os.environ.get("RANK", "0") != "0":  # a plan is made once, however many ranks were started
            return
        from torchrec_deepfm.sharding.inputs.hardware import MAX_BATCH_SIZE, MAX_RANKS, RESERVED
        from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware
        from torchrec_deepfm.sharding.inputs.tables import read_tables

        check_range("ranks", self.ranks, 1, MAX_RANKS)
        check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        inputs = [Path(self.tables), Path(self.hardware)]
        check_target("--output", self.output, like="plan.json", inputs=inputs)
        _check_report(self.report, [*inputs, self.output])
        tables = read_tables(self.tables, self.dim)
        hardware = read_hardware(self.hardware)
        domain_size = hardware.local_world_size(self.ranks) * hardware.pod_size_of(self.ranks)

        console.import_quietly("torchrec")
        from torchrec_deepfm.sharding.inputs.constraints import parse_constraints
        from torchrec_deepfm.sharding.plan.io import save_plan
        from torchrec_deepfm.sharding.plan.text import plan_text
        from torchrec_deepfm.sharding.search.plan_tables import Planning

        constraints = parse_constraints(
            tuple(itertools.chain.from_iterable(self.constraint)),
            tables,
            compute_device=hardware.compute_device,
            world_size=self.ranks,
            local_world_size=domain_size,
        )
        planning = Planning(
            tables,
            hardware,
            self.ranks,
            self.batch_size,
            constraints=constraints,
            objective=self.objective,
            optimizer=self.optimizer,
            ema=self.ema,
        )
        plan = planning.checked_plan(self.search)
        bound = planning.lower_bound_ms
        save_plan(plan, self.output)
        console.say(plan_text(plan, bound_ms=bound, reserved=RESERVED))
        console.say(f"\nwrote {self.output}")
        beside = None
        if self.report is not None and self.search == "balanced" and self.ranks * len(tables) <= _BESIDE:
            with contextlib.suppress(UserError):  # TorchRec's planner finds no plan
                beside = planning.checked_plan("torchrec")
        _write_report(plan, self.report, bound if self.objective == "all" else None, beside)


@dataclass(frozen=True, kw_only=True)
class ComparePlans:
    """Plan the same tables for several kinds of hardware and numbers of ranks, and compare."""

    compare: tuple[str, ...]
    """Kinds of hardware: presets or TOML files. With dollars_per_hour in a file, prices are compared too."""
    tables: str
    """criteo-terabyte, criteo-dcnv2, a TOML, JSON or CSV file of tables, or a prepared folder."""
    ranks: tuple[int, ...]
    """Numbers of ranks."""
    dim: int | None = None
    """Width of every table, instead of the one in --tables."""
    batch_size: int = 8192
    """Samples per rank and step."""
    constraint: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.arg(metavar="RULE [RULE ...]"), tyro.conf.UseAppendAction
    ] = ()
    """How a table may be sharded, as for plan."""
    report: Path | None = None
    """HTML file for the table and a picture."""

    def run(self) -> None:
        """Search for the plans and print the table."""
        if os.environ.get("RANK", "0") != "0":
            return
        from torchrec_deepfm.sharding.inputs.hardware import MAX_BATCH_SIZE, MAX_RANKS
        from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware
        from torchrec_deepfm.sharding.inputs.tables import read_tables

        for option, values in (("compare", self.compare), ("ranks", self.ranks)):
            if not values:
                raise UserError("needs at least one value", where=f"--{option}")
        for count in self.ranks:
            check_range("ranks", count, 1, MAX_RANKS)
        check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        _check_report(self.report, [Path(self.tables), *map(Path, self.compare)])
        tables = read_tables(self.tables, self.dim)
        kinds = [read_hardware(each) for each in dict.fromkeys(self.compare)]
        if twice := next((each.name for each in kinds if [one.name for one in kinds].count(each.name) > 1), None):
            raise UserError(
                f"two descriptions have the name {twice}", where="--compare", remedy="give one of them another name"
            )

        console.import_quietly("torchrec")
        from torchrec_deepfm.sharding.search.compare import compare, comparison_text

        found = compare(
            tables,
            kinds,
            list(dict.fromkeys(self.ranks)),
            batch_size=self.batch_size,
            rules=tuple(itertools.chain.from_iterable(self.constraint)),
            say=console.say,
        )
        console.say(f"{len(tables)} tables, {self.batch_size:,} samples per rank; steps without their dense part:")
        console.say(comparison_text(found))
        if self.report is not None:
            from torchrec_deepfm.sharding.plan.report import write_comparison_report

            write_comparison_report(found, self.report)
            console.say(f"wrote {self.report}")


def _check_report(report: Path | None, inputs: Sequence[Path]) -> None:
    if report is not None:
        check_target("--report", report, like="plan.html", inputs=inputs)


def _write_report(
    plan: PlanFile, report: Path | None, bound_ms: float | None = None, torchrecs: PlanFile | None = None
) -> None:
    if report is not None:
        from torchrec_deepfm.sharding.plan.report import write_plan_report

        write_plan_report(plan, report, bound_ms=bound_ms, torchrecs=torchrecs)
        console.say(f"wrote {report}")

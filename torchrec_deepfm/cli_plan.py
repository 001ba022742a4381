"""The command that plans: ``plan``, ``plan show`` and ``plan diff``. It loads torch when it plans."""

import itertools
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from torchrec_deepfm import terminal
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.sharding_types import FusedOptimizer
from torchrec_deepfm.small_file import check_target

if TYPE_CHECKING:
    from torchrec_deepfm.sharding.plan import PlanFile


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Plan where tables go on hardware that need not be there; show a plan, or how two differ.

    ``plan --tables ... --hardware ... --ranks N --output plan.json``, ``plan show FILE``, ``plan diff A B``.
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Nothing, to plan; or: show FILE; or: diff FILE FILE."""
    tables: str | None = None
    """criteo-terabyte, a TOML, JSON or CSV file of tables, or a prepared folder."""
    hardware: str | None = None
    """a100-40, a100-80, h100, h200, b200, cpu, torchrec (TorchRec's default bandwidths), or a TOML file."""
    ranks: int | None = None
    """How many ranks (GPUs) of it."""
    output: Path | None = None
    """File of the plan, which train --plan takes."""
    dim: int | None = None
    """Width of every table, instead of what --tables says."""
    batch_size: int = 8192
    """Samples per rank and step."""
    search: Literal["ours", "stock"] = "ours"
    """ours, or TorchRec's own."""
    constraint: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """What may be done with a table: C1=row_wise, 't_C*=column_wise:min_partition=8', '>1e6=row_wise'."""
    optimizer: FusedOptimizer = "rowwise_adagrad"
    """Optimizer of the tables, whose state takes memory."""
    ema: bool = False
    """Leave memory for the moving average of the weights that train --ema keeps."""
    report: Path | None = None
    """HTML file for a report of the plan."""

    def run(self) -> None:
        """Run the command."""
        terminal.quiet()
        if os.environ.get("RANK", "0") != "0":  # a plan is made once, however many ranks were started
            return
        action, *files = self.words or ("",)
        if action:
            self._read(action, [Path(file) for file in files])
        else:
            self._plan()

    def _read(self, action: str, files: list[Path]) -> None:
        from torchrec_deepfm.sharding.hardware import RESERVED
        from torchrec_deepfm.sharding.plan_file import load_plan
        from torchrec_deepfm.sharding.plan_text import diff_text, plan_text

        wanted = {"show": 1, "diff": 2}
        if action not in wanted:
            raise UserError(
                f"plan {action}: there is no such thing to do; give options to plan, or show FILE, or diff A B"
            )
        for option in fields(self):
            used = option.name == "words" or (option.name == "report" and action == "show")
            if not used and getattr(self, option.name) != option.default:
                raise UserError(
                    f"--{option.name.replace('_', '-')}: plan {action} reads plans that are there; leave the option out"
                )
        if len(files) != wanted[action]:
            raise UserError(
                f"plan {action}: {len(files)} file(s) given, {wanted[action]} wanted; name the plans' files"
            )
        self._check_report(files)
        plans = [load_plan(file) for file in files]
        if action == "show":
            terminal.say(plan_text(plans[0], reserved=RESERVED))
            self._write_report(plans[0])
        else:
            terminal.say(diff_text(plans[0], plans[1], (str(files[0]), str(files[1]))))

    def _plan(self) -> None:
        from torchrec_deepfm.sharding.hardware import MAX_BATCH_SIZE, MAX_RANKS, RESERVED
        from torchrec_deepfm.sharding.hardware_file import read_hardware
        from torchrec_deepfm.sharding.table_list import read_tables

        for option in ("tables", "hardware", "ranks", "output"):
            if getattr(self, option) is None:
                raise UserError(f"--{option} is missing; plan wants --tables, --hardware, --ranks and --output")
        assert self.tables is not None
        assert self.hardware is not None
        assert self.ranks is not None
        assert self.output is not None
        if self.ranks < 1:
            raise UserError(f"--ranks {self.ranks}: must be at least 1")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        for option, value, most in (("ranks", self.ranks, MAX_RANKS), ("batch-size", self.batch_size, MAX_BATCH_SIZE)):
            if value > most:
                raise UserError(f"--{option} {value}: must be at most {most:,}")
        inputs = [Path(self.tables), Path(self.hardware)]
        check_target("--output", self.output, like="plan.json", inputs=inputs)
        self._check_report([*inputs, self.output])
        tables = read_tables(self.tables, self.dim)
        hardware = read_hardware(self.hardware)
        local_world_size = hardware.local_world_size(self.ranks)

        from torchrec_deepfm.sharding.constraints import keep_to_possible, parse_constraints
        from torchrec_deepfm.sharding.plan_check import check_fits
        from torchrec_deepfm.sharding.plan_file import save_plan
        from torchrec_deepfm.sharding.plan_text import plan_text
        from torchrec_deepfm.sharding.search import lower_bound_ms, plan_tables

        rules = tuple(itertools.chain.from_iterable(self.constraint))
        constraints = parse_constraints(
            rules,
            tables,
            compute_device=hardware.compute_device,
            world_size=self.ranks,
            local_world_size=local_world_size,
        )
        possible = constraints
        if self.search == "stock":
            possible = keep_to_possible(
                constraints,
                tables,
                compute_device=hardware.compute_device,
                world_size=self.ranks,
                local_world_size=local_world_size,
            )
        plan = plan_tables(
            tables,
            hardware,
            self.ranks,
            batch_size=self.batch_size,
            constraints=possible,
            search=self.search,
            optimizer=self.optimizer,
            ema=self.ema,
        )
        check_fits(
            plan,
            tables,
            self.ranks,
            local_world_size=local_world_size,
            compute_device=hardware.compute_device,
            where=f"the plan of --search {self.search}",
        )
        bound = lower_bound_ms(tables, hardware, self.ranks, batch_size=self.batch_size, constraints=constraints)
        save_plan(plan, self.output)
        terminal.say(plan_text(plan, bound_ms=bound, reserved=RESERVED))
        terminal.say(f"\nwrote {self.output}")
        self._write_report(plan)

    def _check_report(self, inputs: list[Path]) -> None:
        if self.report is not None:
            check_target("--report", self.report, like="plan.html", inputs=inputs)

    def _write_report(self, plan: "PlanFile") -> None:
        if self.report is not None:
            from torchrec_deepfm.sharding.plan_report import write_plan_report

            write_plan_report(plan, self.report)
            terminal.say(f"wrote {self.report}")

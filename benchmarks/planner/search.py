"""The balanced search against every rival, over random lists of tables and hosts, scored by code of its own.

    python -m benchmarks.planner.search --output cases.jsonl                  # 300 cases of seed 0; again: resumes
    python -m benchmarks.planner.search --preset criteo --ranks 8 16 --output criteo.jsonl
    python -m benchmarks.planner.search --preset dcnv2 --output dcnv2.jsonl
    python -m benchmarks.planner.search --cases 0 --output cases.jsonl        # the summary of what is there

Rivals, all with TorchRec's partitioner: TorchRec's planner as it comes; each of its proposers with its options
(``DynamicProgrammingProposer`` too) at every ``min_partition``; and a loop that a user would tune: tables above a
threshold sharded one way, the others replicated, the best of 4 thresholds x 9 ways. Each is asked for its best plan by
each objective. Plans are scored by ``score``: TorchRec's equations written down again, which import nothing of the
search and none of TorchRec's estimators.

A rival has ``--seconds`` of CPU time per case; its options are given to it enumerated and with estimates. Where the
time runs out its best plan until then counts, and the case is counted as such. Cases are drawn by their number, so what
is finished is skipped when the command runs again.
"""

import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import tyro

from torchrec_deepfm import console

console.quiet()

from torchrec.distributed.planner import ParameterConstraints  # noqa: E402
from torchrec.distributed.planner.proposers import (  # noqa: E402
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.types import Enumerator, PlannerError, Proposer, ShardingOption  # noqa: E402

from torchrec_deepfm.errors import UserError  # noqa: E402
from torchrec_deepfm.sharding.estimate import table_module  # noqa: E402
from torchrec_deepfm.sharding.inputs.hardware import RESERVED, Hardware  # noqa: E402
from torchrec_deepfm.sharding.inputs.presets import PRESETS  # noqa: E402
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES  # noqa: E402
from torchrec_deepfm.sharding.inputs.tables import Table, criteo_dcnv2_tables, criteo_tables  # noqa: E402
from torchrec_deepfm.sharding.plan.plan import Objective  # noqa: E402
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder  # noqa: E402
from torchrec_deepfm.sharding.search.best_plan import EnumeratedOptions  # noqa: E402
from torchrec_deepfm.sharding.search.plan_tables import plan_tables, torchrec_planner  # noqa: E402

Kernel = str | tuple[str, float]
OBJECTIVES: Final[tuple[Objective, ...]] = ("total", "all")
PROPOSERS: Final[dict[str, Callable[[], list[Proposer]]]] = {
    "greedy": lambda: [GreedyProposer(), GreedyProposer(use_depth=False)],
    "uniform": lambda: [UniformProposer(), UniformProposer(use_depth=False)],
    "grid search": lambda: [GridSearchProposer()],
    "dynamic programming": lambda: [DynamicProgrammingProposer()],
}
WAYS: Final = (
    ("table_wise", None),
    ("row_wise", None),
    ("table_row_wise", None),
    ("column_wise", 8),
    ("column_wise", 16),
    ("column_wise", 32),
    ("column_wise", 64),
    ("grid_shard", 16),
    ("grid_shard", 32),
)
THRESHOLDS: Final = (1e3, 1e4, 1e5, 1e6)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    preset: Literal["random", "criteo", "dcnv2"] = "random"
    """random lists of tables, or Criteo Terabyte (one-hot), or MLPerf's DCNv2 (multi-hot), 128 wide."""
    cases: int = 300
    """Random cases."""
    seed: int = 0
    """Of the random cases."""
    first: int = 0
    """Number of the first random case, so that several processes can share them."""
    largest: int = 10**9
    """Tables times ranks of a case at most; larger random cases are left to another run."""
    ranks: tuple[int, ...] = (16, 32, 64, 128)
    """Numbers of ranks of criteo and dcnv2."""
    rivals: tuple[Literal["torchrec", "proposers", "loop"], ...] = ("torchrec", "proposers", "loop")
    """Whom to compare with."""
    seconds: int = 20
    """CPU time of each rival per case."""
    output: Path | None = None
    """File for the results, a line of JSON per case. Cases that it has are not run again."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task; ``memory`` says how much there is."""

    tables: tuple[Table, ...]
    hardware: Hardware
    ranks: int
    batch_size: int
    name: str
    memory: str


# --- the independent score ---------------------------------------------------------------------------------------


def score(placed: Sequence[tuple[Table, str, Kernel, Sequence[tuple[int, int, int]]]], case: Case) -> dict[str, float]:
    """Return milliseconds of the slowest rank by each objective.

    Args:
        placed: For each table its sharding type, kernel (with its share of cached rows, if not 0.2), and
            (rank, rows, columns) of every shard.
        case: What it is for.
    """
    total, ids = [0.0] * case.ranks, [0.0] * case.ranks
    for table, kind, kernel, shards in placed:
        costs: dict[tuple[int, int], tuple[float, float]] = {}
        for rank, rows, columns in shards:
            if (rows, columns) not in costs:
                costs[rows, columns] = shard_ms(table, kind, kernel, rows, columns, case)
            total[rank] += costs[rows, columns][0]
            ids[rank] += costs[rows, columns][1]
    return {"total": max(total), "all": max(map(sum, zip(total, ids, strict=True)))}


def shard_ms(table: Table, kind: str, kernel: Kernel, rows: int, columns: int, case: Case) -> tuple[float, float]:
    """TorchRec's equations for one shard of float32: milliseconds without ids, and those of the ids that arrive."""
    hardware, ranks = case.hardware, case.ranks
    kernel, cached = (kernel, 0.2) if isinstance(kernel, str) else kernel
    local = min(hardware.ranks_per_host, ranks)
    hosts = ranks // local
    gpu = hardware.compute_device == "cuda"
    memory = (hardware.hbm_bandwidth if gpu else hardware.ddr_bandwidth) / 1e3  # bytes per millisecond
    slow = hardware.hbm_to_ddr_bandwidth / 1e3
    device = {
        "fused": memory,
        "dense": memory / 2,
        "fused_uvm": slow / 10,
        "fused_uvm_caching": (cached * memory + (1 - cached) * slow) / 10,
    }[kernel]
    intra, inter = hardware.intra_host_bandwidth / 1e3, hardware.inter_host_bandwidth / 1e3
    link = intra if hosts == 1 else inter
    looked_up = case.batch_size * table.pooling_factor * (1 if kind == "data_parallel" else ranks)
    looked_up /= {"row_wise": ranks, "table_row_wise": local, "grid_shard": local}.get(kind, 1)
    samples = case.batch_size * (1 if kind == "data_parallel" else ranks)
    whole_rows = kind in ("table_wise", "column_wise", "table_column_wise")
    penalty = (1.0 if columns >= 128 else 1.15 if columns >= 64 else 1.75) if whole_rows else 1.0
    id_bytes = math.ceil(8 * looked_up) * (2 if table.weighted else 1)
    read = id_bytes + 4 * looked_up * (max(columns, 32) if whole_rows else columns) + 4 * samples * columns
    forward = read * penalty / device
    compute = forward * 3 + (forward * 1.1 if table.weighted else 0.0)
    pooled = 4 * samples * columns
    if kind == "data_parallel":
        size, rings = 4 * rows * columns, min(ranks / local, 2)
        reduced = size * (2 * rings - 1) / rings / (inter * local) * (2 if ranks > 2 * local else 1)
        return compute + reduced + size * 9.22 / device, 0.0
    if whole_rows:
        comms = 2 * pooled / link
    elif kind == "row_wise":
        comms = 2 * pooled / link + pooled * 2.455 / device
    else:
        across = pooled / local / inter if hosts > 1 else 0.0
        comms = 2 * (pooled / intra + across) + pooled * 2.455 / device
    arriving = case.batch_size * table.pooling_factor * ranks * rows / table.num_embeddings
    return compute + comms, arriving * (12 if table.weighted else 8) / link


# --- cases --------------------------------------------------------------------------------------------------------


def cases(options: Options) -> Iterator[tuple[str, Case]]:
    """Yield the cases with their names; a random one depends on the seed and its number only."""
    base = PRESETS["torchrec"]
    if options.preset != "random":
        tables = criteo_tables(128) if options.preset == "criteo" else criteo_dcnv2_tables(128)
        for ranks in options.ranks:
            yield (
                f"{options.preset} {ranks}",
                Case(tables=tables, hardware=base, ranks=ranks, batch_size=8192, name=options.preset, memory="enough"),
            )
        return
    for number in range(options.first, options.first + options.cases):
        case = random_case(random.Random(f"{options.seed} {number}"))
        if len(case.tables) * case.ranks <= options.largest:
            yield f"{options.seed} {number}", case


def random_case(draw: random.Random) -> Case:
    """Draw tables (20 to 200, power-law rows), hosts, ranks and memory."""
    per_host = draw.choice([1, 4, 5, 8, 24, 40, 72])
    hosts = draw.choice([each for each in (1, 2, 3, 4, 8, 16, 32, 64, 128) if each * per_host <= 1024])
    ranks = per_host * hosts
    count = draw.choice([20, 20, 26, 26, 40, 60] if ranks > 128 else [20, 20, 26, 26, 26, 40, 40, 60, 100, 200])
    style = draw.choice(["one-hot", "multi-hot"])
    widths = draw.choice([(16,), (64,), (128,), (256,), (16, 64, 128), (12, 36, 100), (48, 96, 192)])
    tables = []
    for number in range(count):
        rows = int(min(10 ** min(1.5 + draw.paretovariate(1.1), 8.0), 4e7))
        pooling = 1.0 if style == "one-hot" else float(min(round(draw.paretovariate(0.8)), 100))
        tables.append(
            Table(
                name=f"t{number}",
                num_embeddings=rows,
                embedding_dim=draw.choice(widths),
                pooling_factor=pooling,
                weighted=style == "multi-hot" and draw.random() < 0.1,
            )
        )
    hardware = replace(PRESETS[draw.choice(["torchrec", "h100", "a100-80"])], ranks_per_host=per_host)
    memory = draw.choice(["enough", "enough", "tight", "UVM"])
    weights = sum(table.gib for table in tables) * 2**30
    if memory != "enough":
        per_rank = weights / ranks / (1 - RESERVED) * (1.6 if memory == "tight" else 0.7)
        buffers = 8192 * ranks * 16 * sum(table.embedding_dim for table in tables) / ranks
        hardware = replace(hardware, hbm_bytes=math.ceil(per_rank + buffers + 2**28))
    return Case(tables=tuple(tables), hardware=hardware, ranks=ranks, batch_size=8192, name=style, memory=memory)


# --- planners -----------------------------------------------------------------------------------------------------


class Clock:
    """CPU time that a rival has.

    Args:
        seconds: How much.
    """

    def __init__(self, seconds: float) -> None:
        self._limit, self._since = seconds, 0.0
        self.used = 0.0
        self.ran_out = False

    def start(self) -> None:
        """Count from here."""
        self._since = time.process_time()

    def stop(self) -> None:
        """Count until here."""
        self.used += time.process_time() - self._since

    def left(self) -> bool:
        """Whether there is time for more; remembers when there was none. Only while it runs."""
        self.ran_out |= self.used + time.process_time() - self._since > self._limit
        return not self.ran_out


class TimedProposer(Proposer):
    """A proposer of TorchRec's that ends with its rival's time.

    Args:
        proposer: The proposer.
        clock: The time.
    """

    def __init__(self, proposer: Proposer, clock: Clock) -> None:
        self._proposer, self._clock = proposer, clock

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take the options of all tables."""
        if self._clock.left():
            self._proposer.load(search_space, enumerator)

    def propose(self) -> list[ShardingOption] | None:
        """Return the next proposal while there is time."""
        return self._proposer.propose() if self._clock.left() else None

    def feedback(self, *args: Any, **named: Any) -> None:
        """Pass on the outcome of a proposal."""
        self._proposer.feedback(*args, **named)


class TorchRecs:
    """TorchRec's planner on a case; its options are enumerated once per width, on nobody's time.

    Args:
        case: The case.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._module = table_module(case.tables)
        self._options: dict[int | None, list[ShardingOption]] = {}

    def plan(
        self,
        clock: Clock,
        proposers: list[Proposer] | None = None,
        width: int | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> dict[str, float] | None:
        """Run the planner; None where it finds no plan.

        Args:
            clock: The time that it has.
            proposers: In the place of its own.
            width: Columns of a shard (``min_partition``) in tables that it divides.
            kinds: The only sharding type of each table. Default: all that TorchRec offers unasked.
        """
        case = self._case
        planner = torchrec_planner(case.tables, case.hardware, case.ranks, batch_size=case.batch_size)
        options = [
            option
            for option in self._options.get(width) or self._enumerate(width)
            if (option.sharding_type == kinds[option.name] if kinds else option.sharding_type != "grid_shard")
        ]
        planner._enumerator = EnumeratedOptions(options)
        clock.start()
        planner._proposers = [TimedProposer(each, clock) for each in proposers or planner._proposers]
        try:
            planner.plan(self._module, [AllTypesSharder()])  # type: ignore[list-item]
        except (PlannerError, RuntimeError):
            return None
        finally:
            clock.stop()
        tables = {table.name: table for table in case.tables}
        placed = []
        for option in planner._best_plan or []:
            shards = [(int(shard.rank or 0), shard.size[0], shard.size[1]) for shard in option.shards]
            placed.append((tables[option.name], option.sharding_type, option.compute_kernel, shards))
        return score(placed, case)

    def _enumerate(self, width: int | None) -> list[ShardingOption]:
        case = self._case
        rules = {
            table.name: ParameterConstraints(
                sharding_types=list(SHARDING_TYPES),
                min_partition=width if width and table.embedding_dim % width == 0 else None,
            )
            for table in case.tables
        }
        planner = torchrec_planner(
            case.tables, case.hardware, case.ranks, batch_size=case.batch_size, constraints=rules
        )
        self._options[width] = planner._enumerator.enumerate(self._module, [AllTypesSharder()])  # type: ignore[list-item]
        return self._options[width]


def balanced_plan(case: Case, objective: Objective) -> tuple[dict[str, float] | None, str]:
    """Plan with the balanced search; its scores, and the types that it takes."""
    try:
        plan = plan_tables(case.tables, case.hardware, case.ranks, batch_size=case.batch_size, objective=objective)
    except UserError:
        return None, ""
    tables = {table.name: table for table in case.tables}
    found = score(
        [
            (
                tables[table.name],
                table.sharding_type,
                (table.compute_kernel, table.kernel_options.get("cache_load_factor", 0.2)),
                [(shard.rank, *shard.sizes) for shard in table.shards],
            )
            for table in plan.tables
        ],
        case,
    )
    counts = Counter(table.sharding_type for table in plan.tables)
    return found, ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def tuned_loop(torchrecs: TorchRecs, case: Case, clock: Clock) -> list[dict[str, float]]:
    """The plans of a loop over thresholds and ways."""
    found = []
    for threshold, (kind, width) in itertools.product(THRESHOLDS, WAYS):
        kinds = {
            table.name: kind
            if table.num_embeddings > threshold and (width is None or table.embedding_dim % width == 0)
            else "data_parallel"
            for table in case.tables
        }
        plan = None if clock.ran_out else torchrecs.plan(clock, width=width, kinds=kinds)
        found += [] if plan is None else [plan]
    return found


def best_of_proposer(torchrecs: TorchRecs, clock: Clock, make: Callable[[], list[Proposer]]) -> list[dict[str, float]]:
    """The plans of a proposer at every ``min_partition``."""
    found = []
    for width in (None, 8, 16, 32, 64):
        plan = None if clock.ran_out else torchrecs.plan(clock, make(), width)
        found += [] if plan is None else [plan]
    return found


def compare(case: Case, options: Options) -> dict[str, Any]:
    """Run everybody on a case; a line of the results."""
    row: dict[str, Any] = {
        "tables": len(case.tables),
        "kind": case.name,
        "memory": case.memory,
        "ranks": case.ranks,
        "per host": case.hardware.local_world_size(case.ranks),
        "hardware": case.hardware.name,
    }
    for objective in OBJECTIVES:
        begin = time.process_time()
        found, types = balanced_plan(case, objective)
        row[f"balanced {objective} s"] = round(time.process_time() - begin, 1)
        row[f"balanced {objective}"] = None if found is None else found[objective]
        row[f"types {objective}"] = types
    torchrecs = TorchRecs(case)
    rivals: dict[str, Callable[[Clock], list[dict[str, float]]]] = {}
    if "torchrec" in options.rivals:
        rivals["torchrec"] = lambda clock: [plan] if (plan := torchrecs.plan(clock)) else []
    if "proposers" in options.rivals:
        rivals |= {name: partial(best_of_proposer, torchrecs, make=make) for name, make in PROPOSERS.items()}
    if "loop" in options.rivals:
        rivals["tuned loop"] = partial(tuned_loop, torchrecs, case)
    row["ran out of time"] = []
    for name, run in rivals.items():
        clock = Clock(options.seconds)
        plans = run(clock)
        row[f"{name} s"] = round(clock.used, 1)
        row["ran out of time"] += [name] if clock.ran_out else []
        for objective in OBJECTIVES:
            row[f"{name} {objective}"] = min((plan[objective] for plan in plans), default=None)
    return row


def worse_than(row: Mapping[str, object]) -> list[str]:
    """The rivals that are better than the balanced search by an objective."""
    found = []
    for objective, name in itertools.product(OBJECTIVES, ("torchrec", *PROPOSERS, "tuned loop")):
        mine, theirs = row.get(f"balanced {objective}"), row.get(f"{name} {objective}")
        if isinstance(theirs, float) and (not isinstance(mine, float) or mine > theirs * (1 + 1e-6)):
            found.append(f"{name} {objective} {theirs if mine is None else float(mine) / theirs:.3f}")  # type: ignore[arg-type]
    return found


def main(options: Options) -> None:
    """Run the cases that the file does not have yet, write each when it is finished, and print a summary."""
    rows: dict[str, dict[str, Any]] = {}
    if options.output is not None and options.output.exists():
        for line in options.output.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["case"]] = row
    for name, case in cases(options):
        if name in rows:
            continue
        rows[name] = row = {"case": name, **compare(case, options)}
        worse = worse_than(row)
        shown = " ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        print(f"{shown}{'  WORSE THAN ' + ', '.join(worse) if worse else ''}", flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    summarise(list(rows.values()))


def summarise(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print, for each rival and objective, how often and by how much the balanced search is better."""
    print(f"{len(rows)} cases")
    print(f"{'rival':<21}{'objective':<11}{'cases':>6}{'balanced worse':>16}{'rival : balanced, least':>25}"
          f"{'median':>8}{'most':>8}{'planned by balanced only':>26}{'rival only':>12}{'out of time':>13}")  # fmt: skip
    for name, objective in itertools.product(("torchrec", *PROPOSERS, "tuned loop"), OBJECTIVES):
        asked = [row for row in rows if f"{name} {objective}" in row]
        pairs = [(row[f"{name} {objective}"], row[f"balanced {objective}"]) for row in asked]
        ratios = sorted(theirs / mine for theirs, mine in pairs if theirs is not None and mine is not None)
        if ratios:
            print(f"{name:<21}{objective:<11}{len(asked):>6}{sum(ratio < 1 - 1e-6 for ratio in ratios):>16}"
                  f"{ratios[0]:>25.3f}{ratios[len(ratios) // 2]:>8.2f}{ratios[-1]:>8.1f}"
                  f"{sum(theirs is None and mine is not None for theirs, mine in pairs):>26}"
                  f"{sum(theirs is not None and mine is None for theirs, mine in pairs):>12}"
                  f"{sum(name in row['ran out of time'] for row in asked):>13}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
    sys.exit(0)

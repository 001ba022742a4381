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
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import tyro

from torchrec_deepfm import console

console.quiet()

from benchmarks.planner.cases import Case, published_case, random_case  # noqa: E402
from benchmarks.planner.rivals import PROPOSERS, Clock, TorchRecs, best_of_proposer, tuned_loop  # noqa: E402
from benchmarks.planner.score import score  # noqa: E402
from torchrec_deepfm.errors import UserError  # noqa: E402
from torchrec_deepfm.sharding.plan.plan import Objective  # noqa: E402
from torchrec_deepfm.sharding.search.plan_tables import plan_tables  # noqa: E402

OBJECTIVES: Final[tuple[Objective, ...]] = ("total", "all")


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


def cases(options: Options) -> Iterator[tuple[str, Case]]:
    """Yield the cases with their names; a random one depends on the seed and its number only."""
    if options.preset != "random":
        for ranks in options.ranks:
            yield f"{options.preset} {ranks}", published_case(options.preset, ranks)
        return
    for number in range(options.first, options.first + options.cases):
        case = random_case(random.Random(f"{options.seed} {number}"))
        if len(case.tables) * case.ranks <= options.largest:
            yield f"{options.seed} {number}", case


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
    print(f"{'':<32}{'balanced is':^21}{'plan only of':^18}{'':>8}{'rival : balanced':^24}")
    print(f"{'rival':<21}{'objective':<11}{'better':>7}{'equal':>7}{'worse':>7}{'balanced':>10}{'rival':>8}"
          f"{'no plan':>8}{'least':>8}{'median':>8}{'most':>8}{'out of time':>13}")  # fmt: skip
    for name, objective in itertools.product(("torchrec", *PROPOSERS, "tuned loop"), OBJECTIVES):
        asked = [row for row in rows if f"{name} {objective}" in row]
        pairs = [(row[f"{name} {objective}"], row[f"balanced {objective}"]) for row in asked]
        ratios = sorted(theirs / mine for theirs, mine in pairs if theirs is not None and mine is not None)
        if asked:
            worse, better = sum(ratio < 1 - 1e-6 for ratio in ratios), sum(ratio > 1 + 1e-6 for ratio in ratios)
            spread = [f"{ratios[at]:.3f}" if ratios else "-" for at in (0, len(ratios) // 2, -1)]
            print(f"{name:<21}{objective:<11}{better:>7}{len(ratios) - better - worse:>7}{worse:>7}"
                  f"{sum(theirs is None and mine is not None for theirs, mine in pairs):>10}"
                  f"{sum(theirs is not None and mine is None for theirs, mine in pairs):>8}"
                  f"{sum(theirs is None and mine is None for theirs, mine in pairs):>8}"
                  f"{spread[0]:>8}{spread[1]:>8}{spread[2]:>8}"
                  f"{sum(name in row['ran out of time'] for row in asked):>13}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
    sys.exit(0)

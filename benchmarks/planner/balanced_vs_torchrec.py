"""The balanced search against TorchRec's planner, under the same estimates with every term included.

    python -m benchmarks.planner.balanced_vs_torchrec                  # Criteo Terabyte, 8 to 1,024 ranks
    python -m benchmarks.planner.balanced_vs_torchrec --sweep          # 192 cases: ranks x widths x tables x memory
    python -m benchmarks.planner.balanced_vs_torchrec --hardware h100  # the vendor's bandwidths, not TorchRec's

The critical path is the time of the slowest rank: all six terms of every shard on it, added up. "By hand" shards the
tables of more than 1e5 rows one way and replicates the others. TorchRec's planner runs with its own estimators,
proposers and partitioner; ``--quick-torchrec`` runs its estimators once for equal shards, which changes no plan, only
its time.
"""

import csv
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from torchrec_deepfm import console

console.quiet()

from torchrec.distributed.planner import ParameterConstraints  # noqa: E402
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator  # noqa: E402

from torchrec_deepfm.errors import UserError  # noqa: E402
from torchrec_deepfm.sharding.inputs.hardware import Hardware  # noqa: E402
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware  # noqa: E402
from torchrec_deepfm.sharding.inputs.tables import Table, criteo_tables  # noqa: E402
from torchrec_deepfm.sharding.search import plan_tables  # noqa: E402

# Their names in `make_planner`.
BALANCED, TORCHREC = "balanced", "torchrec"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Sharding type and width that a user would try by hand.
BY_HAND: Mapping[int, tuple[str, int]] = {
    8: ("column_wise", 64),
    16: ("column_wise", 32),
    32: ("column_wise", 16),
    64: ("column_wise", 8),
    128: ("column_wise", 8),
    256: ("grid_shard", 32),
    512: ("grid_shard", 16),
    1024: ("grid_shard", 8),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    ranks: tuple[int, ...] = RANKS
    """Numbers of ranks."""
    hardware: str = "torchrec"
    """A preset or a TOML file; torchrec: TorchRec's default bandwidths with 80 GiB of HBM."""
    batch_size: int = 8192
    """Samples per rank and step."""
    dims: tuple[int, ...] | None = None
    """Widths of the tables. Default: 128; in the sweep 16, 64, 128, 256."""
    sweep: bool = False
    """All cases of ranks, widths, three lists of tables, and enough or tight memory."""
    torchrec: bool = True
    """Run TorchRec's planner too."""
    quick_torchrec: bool = False
    """Run TorchRec's estimators once for equal shards."""
    torchrec_seconds: int | None = None
    """Time limit of TorchRec's planner per case, in seconds. Default: none."""
    output: Path | None = None
    """CSV file for the results."""


@dataclass(frozen=True, kw_only=True)
class PlanFound:
    """The best plan of a search; the critical path is in ms."""

    critical_path: float
    seconds: float
    types: str


def many_small(dim: int) -> tuple[Table, ...]:
    """60 tables from 100 to a million rows, one to 20 ids per sample."""
    return tuple(
        Table(
            name=f"t_{number}",
            num_embeddings=round(100 * 10 ** (4 * number / 59)),
            embedding_dim=dim,
            pooling_factor=(1.0, 1.0, 2.0, 5.0, 20.0)[number % 5],
        )
        for number in range(60)
    )


def few_huge(dim: int) -> tuple[Table, ...]:
    """6 tables of 8 to 48 GiB, at any width, one to 50 ids per sample."""
    return tuple(
        Table(
            name=f"t_{number}",
            num_embeddings=8 * (number + 1) * 2**28 // dim,
            embedding_dim=dim,
            pooling_factor=(1.0, 3.0, 10.0, 50.0, 1.0, 1.0)[number],
        )
        for number in range(6)
    )


MIXES: Mapping[str, Callable[[int], tuple[Table, ...]]] = {
    "criteo": criteo_tables,
    "many small": many_small,
    "few huge": few_huge,
}


def tight(hardware: Hardware, tables: Sequence[Table], ranks: int) -> Hardware:
    """Reduce the HBM until the weights fill four fifths of what a planner may use."""
    weights = sum(table.gib for table in tables) * 2**30
    return replace(hardware, hbm_bytes=math.ceil(weights / ranks / 0.8 / (1 - plan_tables.RESERVED)))


def run(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    options: Options,
    kind: plan_tables.Search,
    constraints: Mapping[str, ParameterConstraints] | None = None,
) -> PlanFound | None:
    """Plan once and time the planner's call; None if no plan was found."""
    parts = {"batch_size": options.batch_size, "constraints": constraints}
    planner = plan_tables.make_planner(tables, hardware, ranks, search=kind, **parts)
    if kind == TORCHREC:
        planner._timeout_seconds = options.torchrec_seconds
        if not options.quick_torchrec:
            planner._enumerator = EmbeddingEnumerator(planner._topology, options.batch_size, planner._constraints)
    module = plan_tables.table_module(tables)
    begin = time.perf_counter()
    try:
        sharder = plan_tables.AllTypesSharder if kind == BALANCED else plan_tables.EmbeddingBagCollectionSharder
        planner.plan(module, [sharder()])
    except (plan_tables.PlannerError, RuntimeError):
        return None
    seconds = time.perf_counter() - begin
    best = planner._best_plan
    kinds = sorted({option.sharding_type for option in best})
    count = {kind: sum(option.sharding_type == kind for option in best) for kind in kinds}
    return PlanFound(
        critical_path=plan_tables.AllTermsPerfModel(planner._topology).rate(best),
        seconds=seconds,
        types=", ".join(f"{number} {kind}" for kind, number in count.items()),
    )


def by_hand(tables: Sequence[Table], ranks: int) -> dict[str, ParameterConstraints]:
    kind, width = BY_HAND[ranks]
    large = ParameterConstraints(sharding_types=[kind], min_partition=width)
    small = ParameterConstraints(sharding_types=["data_parallel"])
    return {table.name: large if table.num_embeddings > 1e5 else small for table in tables}


def cases(options: Options) -> Iterator[tuple[str, str, int, int, tuple[Table, ...], Hardware]]:
    """Yield (name of the tables, memory, width, ranks, tables, hardware)."""
    hardware = read_hardware(options.hardware)
    if not options.sweep:
        for dim, ranks in itertools.product(options.dims or (128,), options.ranks):
            yield "criteo", "enough", dim, ranks, criteo_tables(dim), hardware
        return
    for ranks, dim, mix in itertools.product(options.ranks, options.dims or (16, 64, 128, 256), MIXES):
        tables = MIXES[mix](dim)
        yield mix, "enough", dim, ranks, tables, hardware
        yield mix, "tight", dim, ranks, tables, tight(hardware, tables, ranks)


def shown(found: PlanFound | None) -> tuple[str, str]:
    """Format milliseconds of the critical path and seconds of the search."""
    return ("none", "-") if found is None else (f"{found.critical_path:.2f}", f"{found.seconds:.1f}")


def compare(options: Options) -> list[dict[str, object]]:
    """Run all cases, print them as a table, and return the rows."""
    rows: list[dict[str, object]] = []
    names = (
        "tables",
        "memory",
        "width",
        "ranks",
        "torchrec ms",
        "by hand ms",
        "balanced ms",
        "bound ms",
        "torchrec s",
        "balanced s",
        "balanced",
    )
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" for _ in names) + " |", flush=True)
    for mix, memory, dim, ranks, tables, hardware in cases(options):
        balanced = run(tables, hardware, ranks, options, BALANCED)
        torchrec = run(tables, hardware, ranks, options, TORCHREC) if options.torchrec else None
        hand = None
        if not options.sweep and ranks in BY_HAND and options.torchrec:
            hand = run(tables, hardware, ranks, options, TORCHREC, by_hand(tables, ranks))
        bound = plan_tables.lower_bound_ms(tables, hardware, ranks, batch_size=options.batch_size)
        values = (mix, memory, dim, ranks, shown(torchrec)[0], shown(hand)[0], shown(balanced)[0], f"{bound:.2f}")
        values += (shown(torchrec)[1], shown(balanced)[1], "" if balanced is None else balanced.types)
        print("| " + " | ".join(str(each) for each in values) + " |", flush=True)
        worse = torchrec is not None and (
            balanced is None or balanced.critical_path > torchrec.critical_path * (1 + 1e-9)
        )
        rows.append({**dict(zip(names, values, strict=True)), "worse": worse})
    return rows


def main(options: Options) -> None:
    rows = compare(options)
    if options.output is not None:
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    worse = [row for row in rows if row["worse"]]
    print(f"\n{len(rows)} cases, balanced worse than torchrec in {len(worse)}")
    for row in worse:
        print(row)
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(str(error))

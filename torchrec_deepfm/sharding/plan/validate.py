"""What makes a sharding plan sound, and whether it fits tables, ranks and device. Standard library only.

TorchRec takes a plan at its word: one with a hole, an overlap or rows cut elsewhere than it expects trains something
else, or hangs. So all of that is checked here.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise, product

from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.sharding.inputs.sharding_types import (
    COLUMN_ALIGNMENT,
    COLUMN_TYPES,
    CUDA_KERNELS,
    HOST_TYPES,
    SHARDING_TYPES,
    TableSize,
    kernels_of,
    why_rows_impossible,
)
from torchrec_deepfm.sharding.plan.plan import PlanFile, PlannedShard, PlannedTable


def check_sound(plan: PlanFile, where: str) -> None:
    """Check a plan for itself: its shards cover every table once, cut as its type requires, on existing ranks.

    The ranks fill the hosts, and no table appears twice. ``where`` is the file, for messages.
    """
    if plan.world_size % plan.local_world_size:
        raise UserError(
            f"world_size {plan.world_size} is not a multiple of local_world_size {plan.local_world_size}",
            where=where,
            remedy="every host has the same number of ranks",
        )
    if plan.world_size % plan.domain_size:
        raise UserError(
            f"world_size {plan.world_size} is not a multiple of {plan.domain_size} = local_world_size "
            f"{plan.local_world_size} x pod_size {plan.pod_size}",
            where=where,
            remedy="every NVLink domain has the same number of ranks",
        )
    if plan.predicted is not None and len(plan.predicted.per_rank) != plan.world_size:
        raise UserError(
            f"predicted.per_rank has {len(plan.predicted.per_rank)} ranks, world_size is {plan.world_size}",
            where=where,
            remedy="make the plan again",
        )
    seen: set[str] = set()
    for table in plan.tables:
        if table.label in seen:
            raise UserError(f"table {table.label} appears twice", where=where, remedy="remove one")
        seen.add(table.label)
        _check_table(table, plan, f"{where}: table {table.label}")


def check_fits(
    plan: PlanFile,
    tables: Iterable[TableSize],
    world_size: int,
    *,
    local_world_size: int | None = None,
    pod_size: int | None = None,
    compute_device: str | None = None,
    where: str = "plan",
) -> None:
    """Check that a sound plan is for these tables, ranks and device; a None is not compared.

    The UserError names the table, the numbers and what to do.
    """
    if plan.world_size != world_size:
        raise UserError(
            f"made for {plan.world_size} rank(s), but there are {world_size}",
            where=where,
            remedy=f"start {plan.world_size} (-j), or make a plan for {world_size}",
        )
    bound = next((table for table in plan.tables if table.sharding_type in HOST_TYPES), None)
    which = f"and table {bound.name} is {bound.sharding_type}, which depends on" if bound else ""
    if bound and local_world_size not in (None, plan.local_world_size):
        raise UserError(
            f"made for hosts of {plan.local_world_size} rank(s), but they have {local_world_size}, {which} hosts",
            where=where,
            remedy=f"start {plan.local_world_size} ranks per host, or make a plan for {local_world_size}",
        )
    if bound and pod_size not in (None, plan.pod_size):
        raise UserError(
            f"made for NVLink domains of {plan.pod_size} host(s), but they have {pod_size}, {which} them",
            where=where,
            remedy=f"if they share NVLink, set TORCHREC_RESOLVED_POD_SIZE={plan.pod_size} in the environment "
            f"of every rank, otherwise make a plan for pod_size = {pod_size}",
        )
    given = {table.name: table for table in tables}
    planned = {table.name: table for table in plan.tables}
    if missing := [name for name in given if name not in planned]:
        raise UserError(f"it lacks table {_some(missing)}", where=where, remedy="make a plan for these tables")
    if foreign := [name for name in planned if name not in given]:
        raise UserError(
            f"table {_some(foreign)} does not exist here", where=where, remedy="make a plan for these tables"
        )
    for name, table in given.items():
        mine, theirs = planned[name], table
        if (mine.num_embeddings, mine.embedding_dim) != (theirs.num_embeddings, theirs.embedding_dim):
            raise UserError(
                f"table {name} is {mine.num_embeddings} x {mine.embedding_dim} in the plan, but "
                f"{theirs.num_embeddings} x {theirs.embedding_dim} here",
                where=where,
                remedy="make a plan for these tables",
            )
        if compute_device == "cpu" and mine.compute_kernel in CUDA_KERNELS:
            raise UserError(
                f"table {name} has the kernel {mine.compute_kernel}, which needs GPUs",
                where=where,
                remedy="write fused, or start where there are some",
            )
        reason = why_rows_impossible(
            mine.sharding_type,
            mine,
            world_size=world_size,
            local_world_size=plan.domain_size,
            compute_device=compute_device,
        )
        if reason is not None:
            raise UserError(f"table {name}: {reason}", where=where)


def check_memory(held: Sequence[int], available: Sequence[int], *, what: str, ema: bool, where: str) -> None:
    """Check that every rank can hold what a plan gives it, in bytes: what tables take, with all that is kept beside.

    ``what`` names the memory; the UserError names the fullest rank and what to do.
    """
    rank = max(range(len(held)), key=lambda rank: held[rank] - available[rank])
    if held[rank] > available[rank]:
        beside, without = (
            ("optimizer, moving average and buffers", " with --ema, or train without it")
            if ema
            else ("optimizer and buffers", "")
        )
        raise UserError(
            f"rank {rank} would hold {held[rank] / 2**30:,.2f} GiB of tables with {beside}, but has "
            f"{available[rank] / 2**30:,.2f} GiB of {what} for tables",
            where=where,
            remedy=f"use more ranks, or make a plan for this memory{without}",
        )


def _check_table(table: PlannedTable, plan: PlanFile, where: str) -> None:
    if table.sharding_type not in SHARDING_TYPES:
        choices = one_of(SHARDING_TYPES, table.sharding_type)
        raise UserError(f"unknown sharding type {table.sharding_type!r}", where=where, remedy=f"choose {choices}")
    kernels = kernels_of(table.sharding_type)
    if table.compute_kernel not in kernels:
        raise UserError(
            f"{table.sharding_type} has no kernel {table.compute_kernel!r}",
            where=where,
            remedy=f"choose one of {', '.join(kernels)}",
        )
    _check_options(table, where)
    for number, shard in enumerate(table.shards):
        if shard.rank >= plan.world_size:
            raise UserError(
                f"shard {number} is on rank {shard.rank}, but there are {plan.world_size} ranks, 0 to "
                f"{plan.world_size - 1}",
                where=where,
                remedy="name one of those",
            )
    if table.sharding_type == "data_parallel":
        _check_replicated(table, plan.world_size, where)
        return
    _check_covered(table, where)
    _check_cut(table, plan, where)


# Fields of TorchRec's ParameterSharding and CacheParams for a kernel; values of its enums are written by name.
_FLAGS = ("cache_prefetch_pipeline", "enforce_hbm", "stochastic_rounding")
_NAMES = {
    "cache_algorithm": ("LRU", "LFU"),
    "cache_precision": ("FP32", "FP16", "BF16"),
    "bounds_check_mode": ("FATAL", "WARNING", "IGNORE", "NONE"),
    "output_dtype": ("FP32", "FP16", "BF16"),
}
_SHARES = ("cache_load_factor", "cache_reserved_memory")


def _check_options(table: PlannedTable, where: str) -> None:
    for name, value in table.kernel_options.items():
        if name in _FLAGS:
            fine, what = isinstance(value, bool), "true or false"
        elif name in _NAMES:
            fine, what = value in _NAMES[name], f"one of {', '.join(_NAMES[name])}"
        elif name == "cache_load_factor":
            fine, what = type(value) in (int, float) and 0.0 < value < 1.0, "a number between 0 and 1"
        elif name == "cache_reserved_memory":
            fine, what = type(value) in (int, float) and value >= 0.0, "a number of at least 0"
        else:
            choices = [*_FLAGS, *_NAMES, *_SHARES]
            raise UserError(f"unknown kernel option {name!r}", where=where, remedy=f"choose {one_of(choices, name)}")
        if not fine:
            raise UserError(f"kernel option {name} must be {what}, not {value!r}", where=where)


def _check_replicated(table: PlannedTable, world_size: int, where: str) -> None:
    whole = (table.num_embeddings, table.embedding_dim)
    for number, shard in enumerate(table.shards):
        if shard.offsets != (0, 0) or shard.sizes != whole:
            raise UserError(
                f"shard {number} is {_block(shard)}, but each rank of data_parallel has the whole table", where=where
            )
    if sorted(table.ranks) != list(range(world_size)):
        raise UserError(f"data_parallel needs one whole shard on each of the {world_size} ranks", where=where)


def _check_covered(table: PlannedTable, where: str) -> None:
    """No hole and no overlap: blocks inside the table, no two of which meet, with as many cells as the table."""
    rows, columns = table.num_embeddings, table.embedding_dim
    for number, shard in enumerate(table.shards):
        if shard.offsets[0] + shard.sizes[0] > rows or shard.offsets[1] + shard.sizes[1] > columns:
            raise UserError(f"shard {number} is {_block(shard)}, beyond the table of {rows} x {columns}", where=where)
    bands: dict[tuple[int, int], list[tuple[int, PlannedShard]]] = {}
    for number, shard in enumerate(table.shards):
        if shard.sizes[0] and shard.sizes[1]:
            bands.setdefault((shard.offsets[1], shard.offsets[1] + shard.sizes[1]), []).append((number, shard))
    for band in bands.values():
        band.sort(key=lambda each: each[1].offsets[0])
    # Few pairs can meet, and a thousand ranks have half a million of them: neighbours below each other, and all of two
    # bands of columns that meet without being the same.
    pairs = [pair for band in bands.values() for pair in pairwise(band)]
    for (begin, end), (other_begin, other_end) in combinations(bands, 2):
        if begin < other_end and other_begin < end:
            pairs += product(bands[begin, end], bands[other_begin, other_end])
    for (number, shard), (other, later) in pairs:
        if (
            shard.offsets[0] < later.offsets[0] + later.sizes[0]
            and later.offsets[0] < shard.offsets[0] + shard.sizes[0]
        ):
            raise UserError(f"shards {number} and {other} overlap: {_block(shard)} and {_block(later)}", where=where)
    cells = sum(shard.sizes[0] * shard.sizes[1] for shard in table.shards)
    if cells != rows * columns:
        raise UserError(
            f"the shards hold {cells:,} of its {rows:,} x {columns} = {rows * columns:,} numbers and leave a hole",
            where=where,
            remedy="cover the table exactly",
        )


def _check_cut(table: PlannedTable, plan: PlanFile, where: str) -> None:
    """Check the cuts that TorchRec computes by itself when it sends ids, without regard to the plan."""
    kind, local = table.sharding_type, plan.domain_size
    rows, width = table.num_embeddings, table.embedding_dim
    if kind == "table_wise" and len(table.shards) != 1:
        raise UserError(f"table_wise has one shard, not {len(table.shards)}", where=where)
    if kind in ("row_wise", "table_row_wise"):
        _check_rows(table.shards, (0, width), rows, plan.world_size if kind == "row_wise" else local, where, kind)
    if kind == "row_wise" and table.ranks != tuple(range(plan.world_size)):
        raise UserError(f"row_wise has one shard on each rank, in order, not on {_listed(table.ranks)}", where=where)
    if kind in ("column_wise", "table_column_wise"):
        for number, shard in enumerate(table.shards):
            if shard.sizes[0] != rows:
                raise UserError(
                    f"shard {number} of {kind} is {_block(shard)}, but must have all {rows} rows", where=where
                )
    if kind in COLUMN_TYPES:
        for number, shard in enumerate(table.shards):
            if len(table.shards) > 1 and (shard.sizes[1] % COLUMN_ALIGNMENT or not shard.sizes[1]):
                raise UserError(
                    f"shard {number} is {shard.sizes[1]} columns wide",
                    where=where,
                    remedy=f"FBGEMM's kernels need multiples of {COLUMN_ALIGNMENT}",
                )
    if kind == "grid_shard":
        if len(table.shards) % local:
            raise UserError(
                f"grid_shard has {local} shards per host, but {len(table.shards)} is not a multiple of that",
                where=where,
            )
        for first in range(0, len(table.shards), local):
            block = table.shards[first : first + local]
            _check_rows(block, (block[0].offsets[1], block[0].sizes[1]), rows, local, where, kind)
            _check_host(block, local, where, kind)
    if kind in ("table_column_wise", "table_row_wise"):
        _check_host(table.shards, local, where, kind)


def _check_rows(
    shards: Sequence[PlannedShard], columns: tuple[int, int], rows: int, parts: int, where: str, kind: str
) -> None:
    step = math.ceil(rows / parts)
    expected = [(min(part * step, rows), min((part + 1) * step, rows)) for part in range(parts)]
    found = [(shard.offsets[0], shard.offsets[0] + shard.sizes[0]) for shard in shards]
    # An empty shard may say that it begins anywhere.
    same = len(found) == parts and all(
        mine == theirs or (mine[0] == mine[1] and theirs[0] == theirs[1])
        for mine, theirs in zip(found, expected, strict=True)
    )
    if not same or any((shard.offsets[1], shard.sizes[1]) != columns for shard in shards):
        raise UserError(
            f"{kind} over {parts} ranks has pieces of {step} rows (the last ones of the remainder), "
            "all of the same columns, in order",
            where=where,
            remedy=f"the plan cuts at rows {_listed([first for first, _ in found])}",
        )


def _check_host(shards: Sequence[PlannedShard], local: int, where: str, kind: str) -> None:
    ranks = [shard.rank for shard in shards]
    host = ranks[0] // local
    if any(rank // local != host for rank in ranks):
        raise UserError(
            f"{kind} must be on one host of {local} ranks, but the plan names ranks {_listed(ranks)}", where=where
        )
    if kind != "table_column_wise" and ranks != list(range(host * local, (host + 1) * local)):
        raise UserError(f"{kind} needs every rank of a host, in order, not {_listed(ranks)}", where=where)


def _block(shard: PlannedShard) -> str:
    (row, column), (rows, columns) = shard.offsets, shard.sizes
    return f"rows {row} to {row + rows}, columns {column} to {column + columns}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest

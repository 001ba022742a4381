"""What TorchRec's planner means by its errors.

The kind of a ``PlannerError`` is misleading:

- ``INSUFFICIENT_STORAGE`` is raised where the smallest proposal that was tried exceeds all ranks together; and so where
  none was tried at all, as by ``GridSearchProposer``, which proposes nothing above a limit of combinations.
- ``STRICT_CONSTRAINTS`` is raised in every other case in which no proposal could be placed: most often one table has no
  shard small enough for a rank, without any constraint of the user.
- ``PARTITION`` is about a single proposal: a shard fits on no rank.

So the options themselves are checked: the least that some rank must hold of each table, and all ranks of all tables.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, ShardingOption, Storage, Topology
from torchrec.distributed.types import ShardingPlan

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import CUDA_KERNELS
from torchrec_deepfm.units import format_bytes


def explain_planner_error(
    error: PlannerError,
    options: Sequence[ShardingOption],
    topology: Topology,
    *,
    proposals: int | None = None,
    ema: bool = False,
    ranks_option: str = "-j",
) -> UserError:
    """Return the error to raise: why there is no plan, with the table, the numbers and what to do."""
    reason = out_of_memory(options, topology, ema=ema, ranks_option=ranks_option)
    if reason is not None:
        return reason
    tried = "" if proposals is None else f" {proposals}"
    if proposals == 0:
        tables = len({option.fqn for option in options})
        return UserError(
            f"the search proposed no plan at all: {len(options)} options of {tables} tables are more combinations than "
            "it goes through, and memory is not what is short",
            remedy="constrain some tables (--constraint), or take another search",
        )
    if error.error_type in (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS):
        tried = "no plan" if proposals is None else f"none of the {proposals} plans"
        full = re.search(r"Couldn't find a rank for shard .* of table ([^,]+),", str(error))
        last = f" (the last left no room for a part of table {full[1]})" if full else ""
        return UserError(
            f"{tried} that the search tried fits the memory of the ranks{last}, though each table by itself fits, and "
            "all take less than the ranks have",
            remedy=f"use more ranks ({ranks_option}), or let the large tables be row_wise (--constraint)"
            f"{_without(ema)}",
        )
    return UserError(f"the planner found no plan ({error.error_type.value}): {_first_line(error)}")


def run_planner(
    planner: EmbeddingShardingPlanner,
    module: nn.Module,
    sharders: list[Any],
    *,
    ema: bool,
    ranks_option: str = "-j",
) -> ShardingPlan:
    """Run TorchRec's planner; where it finds no plan, the error says why."""
    try:
        return planner.plan(module, sharders)
    except PlannerError as error:
        raise explain_planner_error(
            error,
            planner._enumerator.last_stored_search_space or [],  # type: ignore[attr-defined]
            planner._storage_reservation.last_reserved_topology or planner._topology,
            proposals=planner._num_proposals,
            ema=ema,
            ranks_option=ranks_option,
        ) from error


def out_of_memory(
    options: Iterable[ShardingOption], topology: Topology, *, ema: bool = False, ranks_option: str = "-j"
) -> UserError | None:
    """Report a table whose part fits on no rank, or that all ranks together are too small; else None."""
    capacity = [device.storage for device in topology.devices]
    largest = Storage(hbm=max(each.hbm for each in capacity), ddr=max(each.ddr for each in capacity))
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name, []).append(option)
    on_gpu = topology.compute_device != "cpu"
    beside = "optimizer, moving average and buffers" if ema else "optimizer and buffers"
    least = Storage(hbm=0, ddr=0)
    for name, choices in by_table.items():
        best = min(choices, key=lambda option: max(_overfull(shard.storage, largest) for shard in option.shards))
        held = max((_known(shard.storage) for shard in best.shards), key=lambda storage: _overfull(storage, largest))
        if _overfull(held, largest) > 1.0:
            tier = "hbm" if held.hbm > largest.hbm else "ddr"
            rows, width = best.tensor.shape
            tried = ", ".join(dict.fromkeys(option.sharding_type for option in choices))
            return UserError(
                f"{rows:,} x {width} are {format_bytes(rows * width * best.tensor.element_size())} of "
                f"weights; at best, as {best.sharding_type} (of {tried}), one rank holds "
                f"{format_bytes(getattr(held, tier))} of it with "
                f"{beside}, but has {format_bytes(getattr(largest, tier))} of {_memory(tier, on_gpu)} for tables",
                where=f"table {name}",
                remedy=f"use more ranks ({ranks_option}), let it be row_wise or column_wise (--constraint), or take "
                f"fewer rows or columns{_host_rows(tier, choices, ema=ema)}{_without(ema)}",
            )
        totals = [[_known(shard.storage) for shard in option.shards] for option in choices]
        totals = [shards for shards in totals if all(_overfull(each, largest) <= 1.0 for each in shards)]
        least.hbm += min(sum(each.hbm for each in shards) for shards in totals)
        least.ddr += min(sum(each.ddr for each in shards) for shards in totals)
    for tier in ("hbm", "ddr"):
        needed, there = getattr(least, tier), sum(getattr(each, tier) for each in capacity)
        if needed > there:
            ranks = math.ceil(needed / max(there / len(capacity), 1))
            return UserError(
                f"the {len(by_table)} tables take {format_bytes(needed)} with {beside}, but {len(capacity)} "
                f"rank(s) have {format_bytes(there)} of {_memory(tier, on_gpu)} for tables",
                remedy=f"use at least {ranks} ranks ({ranks_option}), or take fewer rows or columns"
                + _host_rows(tier, itertools.chain.from_iterable(by_table.values()), ema=ema)
                + _without(ema),
            )
    return None


def _without(ema: bool) -> str:
    return ", or train without --ema" if ema else ""


def _host_rows(tier: str, options: Iterable[ShardingOption], *, ema: bool) -> str:
    """The remedy that some tables have where GPU memory is short and no option keeps rows in host memory."""
    if tier != "hbm" or ema or any(option.compute_kernel in CUDA_KERNELS for option in options):
        return ""
    return ", or keep rows in host memory (--constraint with kernel=fused_uvm_caching:cache_load_factor=0.5)"


def _known(storage: Storage | None) -> Storage:
    assert storage is not None, "options have their estimates"
    return storage


def _overfull(storage: Storage | None, capacity: Storage) -> float:
    """The share of a rank's memory that a shard takes; more than 1 where it does not fit."""
    needed = _known(storage)
    shares = ((needed.hbm, capacity.hbm), (needed.ddr, capacity.ddr))
    return max(taken / there if there > 0 else (math.inf if taken else 0.0) for taken, there in shares)


def _memory(tier: str, on_gpu: bool) -> str:
    return "GPU memory" if tier == "hbm" else "host memory" if on_gpu else "memory"


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)

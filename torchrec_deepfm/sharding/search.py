"""Planning a list of tables for named hardware, by TorchRec's own search or by ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.balance import Machine, Pieces
from torchrec_deepfm.sharding.balanced import (
    AllTermsPerfModel,
    BalancedPartitioner,
    BalancedProposer,
    machine_of,
    pieces_of,
)
from torchrec_deepfm.sharding.bound import lower_bound
from torchrec_deepfm.sharding.choose import Effort
from torchrec_deepfm.sharding.constraints import in_device_memory
from torchrec_deepfm.sharding.estimate import (
    shard_estimators,
    table_constraints,
    table_module,
    with_prediction,
)
from torchrec_deepfm.sharding.few_types import with_fewer_types
from torchrec_deepfm.sharding.hardware import RESERVED as RESERVED
from torchrec_deepfm.sharding.hardware import Hardware
from torchrec_deepfm.sharding.plan import PlanFile, PlannedShard, PlannedTable
from torchrec_deepfm.sharding.plan_check import check_fits
from torchrec_deepfm.sharding.planner_errors import explain
from torchrec_deepfm.sharding.sharder import AllTypesSharder
from torchrec_deepfm.sharding.sharding_types import SparseOptimizer
from torchrec_deepfm.sharding.table_list import Table
from torchrec_deepfm.sharding.topology import topology
from torchrec_deepfm.sharding.widths import WidthEnumerator

Search = Literal["ours", "stock"]

# Ranks, and ranks times tables, up to which ours has a look at TorchRec's plan: about two seconds. Of a few tables
# TorchRec's grid search tries up to 10,000 combinations, which 128 ranks make seven seconds.
_STOCK_TOO: Final = (32, 1000)
_SAME: Final = 1e-9  # relative: what is left of equal sums in another order


def plan_tables(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    search: Search = "ours",
    optimizer: SparseOptimizer = "rowwise_adagrad",
    ema: bool = False,
    effort: Effort | None = None,
) -> PlanFile:
    """Plan tables for hardware that need not be there.

    Args:
        tables: The tables.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        search: ``ours``, or ``stock`` for TorchRec's enumerator, proposers, partitioner and performance model.
        optimizer: The tables' optimizer, for its memory.
        ema: Whether a moving average of the weights is kept. It takes as much memory as the weights, and tables then
            stay in the device's memory.
        effort: How long ours searches.

    Returns:
        The plan with its predictions, all terms of them in. Ours is TorchRec's plan where the task is small (ranks
        times tables), that plan can run, and it is faster than what our own search finds.

    Raises:
        UserError: The tables fit no plan, or the ranks fill no hosts.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: a rank takes one sample a step at least")
    if ema:
        constraints = in_device_memory(tables, constraints or {})
    task = _Task(tables, hardware, ranks, batch_size, constraints, optimizer, ema, effort)
    if search == "stock":
        return task.plan("stock")
    found = task.plan_with_fallbacks()
    if not hardware.extra.get("group_ms"):
        return found
    free = replace(hardware, extra={**hardware.extra, "group_ms": 0.0})

    def again(narrowed: Mapping[str, ParameterConstraints]) -> PlanFile:
        made = replace(task, hardware=free, constraints=narrowed).plan("ours")
        return with_prediction(made, tables, hardware, optimizer=optimizer, ema=ema)

    return with_fewer_types(found, [table.name for table in tables], constraints or {}, again)


@dataclass(frozen=True)
class _Task:
    """What to plan."""

    tables: Sequence[Table]
    hardware: Hardware
    ranks: int
    batch_size: int
    constraints: Mapping[str, ParameterConstraints] | None
    optimizer: SparseOptimizer
    ema: bool
    effort: Effort | None

    def plan(self, search: Search, *, host_memory: bool = False) -> PlanFile:
        """Run a search once."""
        planner = make_planner(
            self.tables,
            self.hardware,
            self.ranks,
            batch_size=self.batch_size,
            constraints=self.constraints,
            search=search,
            ema=self.ema,
            effort=self.effort,
            host_memory=host_memory,
        )
        options = _run(planner, self.tables, self.optimizer, search, ema=self.ema)
        plan = PlanFile(
            world_size=self.ranks,
            local_world_size=self.hardware.local_world_size(self.ranks),
            batch_size=self.batch_size,
            search=search,
            tables=tuple(_planned(options[table.name]) for table in self.tables),
        )
        return with_prediction(plan, self.tables, self.hardware, optimizer=self.optimizer, ema=self.ema)

    def plan_with_fallbacks(self) -> PlanFile:
        """Run ours, then what may still be better: kernels that use host memory, TorchRec's own search."""
        found: list[PlanFile] = []
        why: UserError | None = None
        machine, ways = _ways(self.tables, self.hardware, self.ranks, self.batch_size, self.constraints)
        bound = _fixed_ms(self.hardware) + lower_bound(machine.ranks, machine.ranks_per_host, ways)
        on_gpu = self.hardware.compute_device == "cuda" and not self.ema
        small = self.ranks <= _STOCK_TOO[0] and self.ranks * len(self.tables) <= _STOCK_TOO[1]
        for needed, search, host_memory in (
            (True, "ours", False),
            (on_gpu, "ours", True),
            (small, "stock", True),
        ):
            if host_memory and search == "ours" and found and _half_empty(found[0], float(machine.hbm.min())):
                continue  # memory is not what stands in the way
            if not needed or (found and critical_path_ms(found[0]) <= bound * (1 + _SAME)):
                continue
            try:
                made = self.plan(cast(Search, search), host_memory=host_memory)
                check_fits(made, self.tables, self.ranks, compute_device=self.hardware.compute_device)
                found.append(made)
            except UserError as error:  # nothing fits; the last of ours knows all the options
                why = error if search == "ours" else why
        if not found:
            assert why is not None
            raise why
        best = found[0]
        for other in found[1:]:
            if critical_path_ms(other) < critical_path_ms(best) * (1 - _SAME):
                best = other
        return replace(best, search="ours")


def _half_empty(plan: PlanFile, hbm: float) -> bool:
    """Whether the fullest rank has more than half of the memory left that tables may take."""
    assert plan.predicted is not None
    return max(cost.hbm_bytes for cost in plan.predicted.per_rank) < 0.5 * (1 - RESERVED) * hbm


def critical_path_ms(plan: PlanFile) -> float:
    """Return the predicted time of a plan's slowest rank, for plans with predictions."""
    assert plan.predicted is not None
    return plan.predicted.critical_path_ms


def _run(
    planner: EmbeddingShardingPlanner,
    tables: Sequence[Table],
    optimizer: SparseOptimizer,
    search: Search,
    *,
    ema: bool,
) -> dict[str, ShardingOption]:
    """Let a planner plan, with what its errors mean.

    Returns:
        The option of each table, its shards on ranks.
    """
    try:
        planner.plan(table_module(tables, optimizer), [AllTypesSharder()])
    except RuntimeError as error:
        if not str(error).startswith("No available sharding type"):  # as TorchRec's enumerator begins
            raise
        raise UserError(f"{str(error).partition('. ')[0]}; loosen its constraints (--constraint)") from error
    except PlannerError as error:
        options: list[ShardingOption] = planner._enumerator.last_stored_search_space or []  # type: ignore[attr-defined]
        reserved = planner._storage_reservation.last_reserved_topology
        told = explain(
            error,
            options,
            reserved or planner._topology,
            proposals=planner._num_proposals if search == "stock" else None,
            ema=ema,
        )
        raise UserError(f"{told}".replace("(-j)", "(--ranks)")) from error
    return {option.name: option for option in planner._best_plan or []}


def make_planner(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    search: Search = "ours",
    ema: bool = False,
    effort: Effort | None = None,
    host_memory: bool = True,
) -> EmbeddingShardingPlanner:
    """Make TorchRec's planner with our parts in it, or with its own.

    Args:
        tables: The tables, for what they look up.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        search: ``ours`` or ``stock``. Stock's estimators too run once for equal shards, which changes no estimate.
        ema: Whether a moving average of the weights is kept.
        effort: How long ours searches.
        host_memory: Whether ours offers kernels that keep rows in host memory where no constraint names the kernel.

    Returns:
        The planner, for a module of these tables.

    Raises:
        UserError: The ranks fill no hosts.
    """
    planner_topology = topology(hardware, ranks)
    merged = _merge(tables, constraints or {})
    estimators = shard_estimators(hardware, planner_topology, merged, ema=ema)
    parts: dict[str, Any] = {
        "topology": planner_topology,
        "batch_size": batch_size,
        "constraints": merged,
        "storage_reservation": FixedPercentageStorageReservation(percentage=RESERVED),
        "stats": NoopEmbeddingStats(),
    }
    if search == "stock":
        return EmbeddingShardingPlanner(
            **parts, enumerator=EmbeddingEnumerator(planner_topology, batch_size, merged, estimators)
        )
    return EmbeddingShardingPlanner(
        **parts,
        enumerator=WidthEnumerator(planner_topology, batch_size, merged, estimators, host_memory=host_memory),
        proposer=BalancedProposer(effort, fallbacks=False),
        partitioner=BalancedPartitioner(),
        performance_model=AllTermsPerfModel(planner_topology),
    )


def lower_bound_ms(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
) -> float:
    """Return what no plan of the options that ``WidthEnumerator`` offers can go below (``bound.lower_bound``).

    These are all that TorchRec's enumerator offers, kernels in host memory included, and more.

    Args:
        tables: The tables.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.

    Returns:
        Milliseconds of the slowest rank, all terms in.

    Raises:
        UserError: The ranks fill no hosts.
    """
    machine, ways = _ways(tables, hardware, ranks, batch_size, constraints)
    return _fixed_ms(hardware) + lower_bound(machine.ranks, machine.ranks_per_host, ways)


def _fixed_ms(hardware: Hardware) -> float:
    """What any plan costs: a step, and one sharding type."""
    return hardware.extra.get("step_ms", 0.0) + hardware.extra.get("group_ms", 0.0)


def _ways(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None,
) -> tuple[Machine, list[list[Pieces]]]:
    """All ways to shard each table, on ranks of which nothing is reserved."""
    planner = make_planner(tables, hardware, ranks, batch_size=batch_size, constraints=constraints)
    options: dict[str, list[ShardingOption]] = {}
    for option in planner._enumerator.enumerate(table_module(tables), [AllTypesSharder()]):  # type: ignore[list-item]
        options.setdefault(option.fqn, []).append(option)
    machine = machine_of(planner._topology)
    return machine, [[pieces_of(option, machine) for option in each] for each in options.values()]


def _merge(tables: Sequence[Table], constraints: Mapping[str, ParameterConstraints]) -> dict[str, ParameterConstraints]:
    """The user's constraints and what the list of tables says of their look-ups."""
    merged = table_constraints(tables)
    default = ParameterConstraints().pooling_factors
    for name, given in constraints.items():
        known = merged[name]
        pooling = known.pooling_factors if given.pooling_factors == default else given.pooling_factors
        merged[name] = replace(given, pooling_factors=pooling, is_weighted=known.is_weighted)
    return merged


def _planned(option: ShardingOption) -> PlannedTable:
    rows, columns = option.tensor.shape
    load_factor = option.cache_load_factor
    shards = []
    for shard in option.shards:
        assert shard.rank is not None
        shards.append(
            PlannedShard(
                rank=shard.rank,
                offsets=(shard.offset[0], shard.offset[1]),
                sizes=(shard.size[0], shard.size[1]),
            )
        )
    return PlannedTable(
        name=option.name,
        num_embeddings=rows,
        embedding_dim=columns,
        sharding_type=option.sharding_type,
        compute_kernel=option.compute_kernel,
        shards=tuple(shards),
        kernel_options={} if load_factor is None else {"cache_load_factor": load_factor},
    )

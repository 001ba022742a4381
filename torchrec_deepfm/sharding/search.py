"""Planning a list of tables for named hardware, by TorchRec's own search or by ours."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.balanced import (
    AllTermsPerfModel,
    BalancedPartitioner,
    BalancedProposer,
    machine_of,
    pieces_of,
)
from torchrec_deepfm.sharding.bound import lower_bound
from torchrec_deepfm.sharding.choose import Effort
from torchrec_deepfm.sharding.estimate import (
    SparseOptimizer,
    shard_estimators,
    table_constraints,
    table_module,
    with_prediction,
)
from torchrec_deepfm.sharding.few_types import with_fewer_types
from torchrec_deepfm.sharding.hardware import Hardware
from torchrec_deepfm.sharding.plan import PlanFile, PlannedShard, PlannedTable
from torchrec_deepfm.sharding.planner_errors import explain
from torchrec_deepfm.sharding.sharder import AllTypesSharder
from torchrec_deepfm.sharding.table_list import Table
from torchrec_deepfm.sharding.topology import topology
from torchrec_deepfm.sharding.widths import WidthEnumerator

Search = Literal["ours", "stock"]

RESERVED: Final = 0.15
"""Share of a GPU's memory that is kept for the dense part, activations and what the estimates miss."""


def plan_tables(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    search: Search = "ours",
    optimizer: SparseOptimizer = "rowwise_adagrad",
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
        effort: How long ours searches.

    Returns:
        The plan with its predictions, all terms of them in.

    Raises:
        UserError: The tables fit no plan, or the ranks fill no hosts.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: a rank takes one sample a step at least")
    planner = make_planner(
        tables, hardware, ranks, batch_size=batch_size, constraints=constraints, search=search, effort=effort
    )
    try:
        planner.plan(table_module(tables, optimizer), [AllTypesSharder()])
    except RuntimeError as error:
        if not str(error).startswith("No available sharding type"):  # as TorchRec's enumerator begins
            raise
        raise UserError(f"{str(error).partition('. ')[0]}; loosen its constraints (--constraint)") from error
    except PlannerError as error:
        options: list[ShardingOption] = planner._enumerator.last_stored_search_space or []  # type: ignore[attr-defined]
        reserved = planner._storage_reservation.last_reserved_topology
        told = explain(error, options, reserved or planner._topology, proposals=planner._num_proposals)
        raise UserError(f"{told}".replace("(-j)", "(--ranks)")) from error
    best = {option.name: option for option in planner._best_plan or []}
    plan = PlanFile(
        world_size=ranks,
        local_world_size=hardware.local_world_size(ranks),
        batch_size=batch_size,
        search=search,
        tables=tuple(_planned(best[table.name]) for table in tables),
    )
    found = with_prediction(plan, tables, hardware, optimizer=optimizer)
    if search == "stock" or not hardware.extra.get("group_ms"):
        return found
    free = replace(hardware, extra={**hardware.extra, "group_ms": 0.0})

    def again(narrowed: Mapping[str, ParameterConstraints]) -> PlanFile:
        made = plan_tables(
            tables, free, ranks, batch_size=batch_size, constraints=narrowed, optimizer=optimizer, effort=effort
        )
        return with_prediction(made, tables, hardware, optimizer=optimizer)

    return with_fewer_types(found, [table.name for table in tables], constraints or {}, again)


def make_planner(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    search: Search = "ours",
    effort: Effort | None = None,
) -> EmbeddingShardingPlanner:
    """Make TorchRec's planner with our parts in it, or with its own.

    Args:
        tables: The tables, for what they look up.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        search: ``ours`` or ``stock``. Stock's estimators too run once for equal shards, which changes no estimate.
        effort: How long ours searches.

    Returns:
        The planner, for a module of these tables.

    Raises:
        UserError: The ranks fill no hosts.
    """
    planner_topology = topology(hardware, ranks)
    merged = _merge(tables, constraints or {})
    estimators = shard_estimators(hardware, planner_topology, merged)
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
        enumerator=WidthEnumerator(planner_topology, batch_size, merged, estimators),
        proposer=BalancedProposer(effort),
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
    planner = make_planner(tables, hardware, ranks, batch_size=batch_size, constraints=constraints)
    options: dict[str, list[ShardingOption]] = {}
    for option in planner._enumerator.enumerate(table_module(tables), [AllTypesSharder()]):  # type: ignore[list-item]
        options.setdefault(option.fqn, []).append(option)
    machine = machine_of(planner._topology)
    ways = [[pieces_of(option, machine) for option in each] for each in options.values()]
    fixed = hardware.extra.get("step_ms", 0.0) + hardware.extra.get("group_ms", 0.0)
    return fixed + lower_bound(machine.ranks, machine.ranks_per_host, ways)


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

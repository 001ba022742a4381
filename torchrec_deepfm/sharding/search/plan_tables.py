"""Planning a list of tables for named hardware, by the balanced search or by TorchRec's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.estimate import (
    shard_estimators,
    table_constraints,
    table_module,
    with_prediction,
)
from torchrec_deepfm.sharding.inputs.constraints import in_device_memory, keep_to_possible
from torchrec_deepfm.sharding.inputs.hardware import RESERVED, Hardware
from torchrec_deepfm.sharding.inputs.sharding_types import SparseOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.inputs.topology import topology
from torchrec_deepfm.sharding.plan.plan import Objective, PlanFile, PlannedShard, PlannedTable, Search
from torchrec_deepfm.sharding.plan.validate import check_fits
from torchrec_deepfm.sharding.runtime.planner_errors import explain_planner_error
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder
from torchrec_deepfm.sharding.search.assignment import Effort
from torchrec_deepfm.sharding.search.best_plan import BestPlan
from torchrec_deepfm.sharding.search.few_types import with_fewer_types

_SHARDERS: Final[Any] = [AllTypesSharder()]


def plan_tables(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    search: Search = "balanced",
    objective: Objective = "all",
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
        search: ``balanced``, or ``torchrec`` for TorchRec's enumerator, proposers, partitioner and performance model.
        objective: What the balanced search makes small. TorchRec's own makes ``Perf.total`` small.
        optimizer: The tables' optimizer, for its memory.
        ema: Whether a moving average of the weights is kept. It takes as much memory as the weights, and tables then
            stay in the device's memory.
        effort: How long the balanced search runs.

    Returns:
        The plan with its predictions, all terms included. The balanced search returns TorchRec's plan where the ranks
        can run it and it is better by the objective.

    Raises:
        UserError: The tables fit no plan, or the ranks do not fill their hosts.
    """
    return Planning(
        tables,
        hardware,
        ranks,
        batch_size,
        constraints=constraints,
        objective=objective,
        optimizer=optimizer,
        ema=ema,
        effort=effort,
    ).plan(search)


def lower_bound_ms(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    objective: Objective = "all",
) -> float:
    """Return a time that no plan made of the options of ``WidthEnumerator`` can go below (``lower_bound.lower_bound``).

    These are all options of TorchRec's enumerator at its default ``min_partition``, kernels in host memory included,
    and more; not all plans there are: column shards narrower than 8 columns are among what is left out.

    Args:
        tables: The tables.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        objective: Which terms count.

    Returns:
        Milliseconds of the slowest rank under the objective.

    Raises:
        UserError: The ranks do not fill their hosts.
    """
    return Planning(tables, hardware, ranks, batch_size, constraints=constraints, objective=objective).lower_bound_ms


class Planning:
    """The tables, the hardware and the constraints of one plan; their options are enumerated once.

    Args:
        tables: As in ``plan_tables``, and so are the others.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        objective: What the balanced search makes small.
        optimizer: The tables' optimizer.
        ema: Whether a moving average of the weights is kept.
        effort: How long the balanced search runs.

    Raises:
        UserError: The ranks do not fill their hosts, or a constraint contradicts ``ema``.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        hardware: Hardware,
        ranks: int,
        batch_size: int,
        *,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        objective: Objective = "all",
        optimizer: SparseOptimizer = "rowwise_adagrad",
        ema: bool = False,
        effort: Effort | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: must be at least 1 sample per rank and step")
        self._tables, self._hardware, self._ranks, self._batch_size = tables, hardware, ranks, batch_size
        self._constraints = in_device_memory(tables, constraints or {}) if ema else dict(constraints or {})
        self._objective, self._optimizer, self._ema, self._effort = objective, optimizer, ema, effort
        self._local_world_size = hardware.local_world_size(ranks)
        hardware.pod_size_of(ranks)  # refuses ranks that do not fill their domains

    def plan(self, search: Search = "balanced") -> PlanFile:
        """Plan with one of the searches; see ``plan_tables``."""
        if search == "torchrec":
            return self._torchrecs_plan()
        found = self._best.find(self._ranks_can_run)
        if found is None:
            assert self._best.error is not None
            raise explain_planner_error(
                self._best.error, self._best.options, self._best.reserved, ema=self._ema, ranks_option="--ranks"
            )
        plan = self._made(found.options, "balanced")
        if not self._hardware.extra.get("group_ms"):
            return plan
        free = replace(self._hardware, extra={**self._hardware.extra, "group_ms": 0.0})

        def plan_again(narrowed: Mapping[str, ParameterConstraints]) -> PlanFile:
            searched = self._with(free, narrowed)._only_in_device_memory.balanced(self._additive)
            if searched is None:
                raise UserError("no plan of these types fits")
            return self._made(searched.options, "balanced")

        return with_fewer_types(plan, [table.name for table in self._tables], self._constraints, plan_again)

    def checked_plan(self, search: Search) -> PlanFile:
        """Plan so that these ranks can run it, whichever search is used.

        Raises:
            UserError: The tables fit no plan, or the ranks can't run the one found.
        """
        device = self._hardware.compute_device
        planning = self
        if search == "torchrec":  # it ignores that some kernels need a row on every rank
            ranks = {"world_size": self._ranks, "local_world_size": self._local_world_size}
            possible = keep_to_possible(self._constraints, self._tables, compute_device=device, **ranks)
            planning = self._with(self._hardware, possible)
        plan = planning.plan(search)
        where = f"the plan of --search {search}"
        check_fits(
            plan,
            self._tables,
            self._ranks,
            local_world_size=self._local_world_size,
            compute_device=device,
            where=where,
        )
        return plan

    @cached_property
    def lower_bound_ms(self) -> float:
        """See ``lower_bound_ms``."""
        return self._hardware.extra.get("step_ms", 0.0) + self._best.lower_bound_ms()

    @property
    def _additive(self) -> Objective:
        return "total" if self._objective == "hidden-ids" else self._objective

    @cached_property
    def _best(self) -> BestPlan:
        return self._search(in_device_memory=self._ema)

    @cached_property
    def _only_in_device_memory(self) -> BestPlan:
        return self._search(in_device_memory=True)

    def _search(self, *, in_device_memory: bool) -> BestPlan:
        at = topology(self._hardware, self._ranks)
        constraints = _with_pooling_factors(self._tables, self._constraints)
        return BestPlan(
            self._module,
            _SHARDERS,
            topology=at,
            batch_size=self._batch_size,
            constraints=constraints,
            estimators=shard_estimators(self._hardware, at, constraints, ema=self._ema),
            storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED),
            objective=self._objective,
            effort=self._effort,
            group_ms=self._hardware.extra.get("group_ms", 0.0),
            in_device_memory=in_device_memory,
        )

    @cached_property
    def _module(self) -> nn.Module:
        return table_module(self._tables, self._optimizer)

    def _with(self, hardware: Hardware, constraints: Mapping[str, ParameterConstraints]) -> "Planning":
        options = {
            "objective": self._objective,
            "optimizer": self._optimizer,
            "ema": self._ema,
            "effort": self._effort,
        }
        return Planning(
            self._tables,
            hardware,
            self._ranks,
            self._batch_size,
            constraints=constraints,
            **options,  # type: ignore[arg-type]
        )

    def _ranks_can_run(self, options: Sequence[ShardingOption]) -> bool:
        plan = self._plan_file(options, "balanced")
        try:
            check_fits(plan, self._tables, self._ranks, compute_device=self._hardware.compute_device)
        except UserError:
            return False
        return True

    def _torchrecs_plan(self) -> PlanFile:
        """Run TorchRec's planner as it comes; its error becomes one that explains it."""
        planner = torchrec_planner(
            self._tables,
            self._hardware,
            self._ranks,
            batch_size=self._batch_size,
            constraints=self._constraints,
            ema=self._ema,
        )
        try:
            planner.plan(self._module, _SHARDERS)
        except RuntimeError as error:
            if not str(error).startswith("No available sharding type"):  # as TorchRec's enumerator begins
                raise
            raise UserError(f"{str(error).partition('. ')[0]}; loosen its constraints (--constraint)") from error
        except PlannerError as error:
            reserved = planner._storage_reservation.last_reserved_topology
            raise explain_planner_error(
                error,
                planner._enumerator.last_stored_search_space or [],  # type: ignore[attr-defined]
                reserved or planner._topology,
                proposals=planner._num_proposals,
                ema=self._ema,
                ranks_option="--ranks",
            ) from error
        return self._made(planner._best_plan or [], "torchrec")

    def _made(self, options: Sequence[ShardingOption], search: Search) -> PlanFile:
        plan = self._plan_file(options, search)
        return with_prediction(plan, self._tables, self._hardware, optimizer=self._optimizer, ema=self._ema)

    def _plan_file(self, options: Sequence[ShardingOption], search: Search) -> PlanFile:
        by_name = {option.name: option for option in options}
        return PlanFile(
            world_size=self._ranks,
            local_world_size=self._local_world_size,
            pod_size=self._hardware.pod_size_of(self._ranks),
            batch_size=self._batch_size,
            search=search,
            objective="total" if search == "torchrec" else self._objective,
            tables=tuple(_planned_table(by_name[table.name]) for table in self._tables),
        )


def torchrec_planner(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    ema: bool = False,
) -> EmbeddingShardingPlanner:
    """Make TorchRec's planner as it comes, with ids as they arrive; its estimators run once for equal shards.

    Args:
        tables: The tables and their pooling factors.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        ema: Whether a moving average of the weights is kept.

    Returns:
        The planner, for a module of these tables.

    Raises:
        UserError: The ranks do not fill their hosts.
    """
    at = topology(hardware, ranks)
    merged = _with_pooling_factors(tables, constraints or {})
    estimators = shard_estimators(hardware, at, merged, ema=ema)
    return EmbeddingShardingPlanner(
        topology=at,
        batch_size=batch_size,
        constraints=merged,
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED),
        stats=NoopEmbeddingStats(),
        enumerator=EmbeddingEnumerator(at, batch_size, merged, estimators),
    )


def _with_pooling_factors(
    tables: Sequence[Table], constraints: Mapping[str, ParameterConstraints]
) -> dict[str, ParameterConstraints]:
    """Add the pooling factors of the list of tables where a constraint has none of its own."""
    merged = table_constraints(tables)
    default = ParameterConstraints().pooling_factors
    for name, given in constraints.items():
        known = merged[name]
        pooling = known.pooling_factors if given.pooling_factors == default else given.pooling_factors
        merged[name] = replace(given, pooling_factors=pooling, is_weighted=known.is_weighted)
    return merged


def _planned_table(option: ShardingOption) -> PlannedTable:
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

"""Planning a list of tables for named hardware, by the balanced search or by TorchRec's own."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Final

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardEstimator, ShardingOption, Topology

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
from torchrec_deepfm.sharding.runtime.planner_errors import explain_planner_error, run_planner
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder
from torchrec_deepfm.sharding.search.best_plan import BestPlan
from torchrec_deepfm.sharding.search.choice import Effort
from torchrec_deepfm.sharding.search.enumerator import constraints_leave_a_type
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
    """Plan tables for hardware that need not be there; the plan has its predictions, all terms included.

    ``search`` is ``balanced``, or ``torchrec`` for TorchRec's enumerator, proposers, partitioner and performance model.
    The balanced search makes ``objective`` small (TorchRec's own ``Perf.total``), and returns TorchRec's plan where the
    ranks can run it and it is better by the objective. The state of ``optimizer`` takes memory, and so does a moving
    average of the weights (``ema``), with which all tables stay in the device's memory. UserError: the tables fit no
    plan, or the ranks do not fill their hosts.
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


@dataclass(frozen=True)
class Planning:
    """The arguments of ``plan_tables``; the options of the tables are enumerated once.

    Raises:
        UserError: The ranks do not fill their hosts, or a constraint contradicts ``ema``.
    """

    tables: Sequence[Table]
    hardware: Hardware
    ranks: int
    batch_size: int
    _: KW_ONLY
    constraints: Mapping[str, ParameterConstraints] | None = None
    objective: Objective = "all"
    optimizer: SparseOptimizer = "rowwise_adagrad"
    ema: bool = False
    effort: Effort | None = None

    def __post_init__(self) -> None:
        """Refuse what has no plan, whatever the search."""
        if self.batch_size < 1:
            raise UserError("must be at least 1 sample per rank and step", where=f"--batch-size {self.batch_size}")
        self.hardware.local_world_size(self.ranks)
        self.hardware.pod_size_of(self.ranks)
        if self.ema:
            in_device_memory(self.tables, self.constraints or {})

    def plan(self, search: Search = "balanced") -> PlanFile:
        """Plan with one of the searches; see ``plan_tables``."""
        if search == "torchrec":
            return self._torchrecs_plan()
        found = self._best.find()
        if found is None:
            assert self._best.error is not None
            raise explain_planner_error(
                self._best.error, self._best.options, self._best.reserved, ema=self.ema, ranks_option="--ranks"
            )
        plan = self._made(found.options, "balanced")
        if not self.hardware.extra.get("group_ms"):
            return plan
        free = replace(self.hardware, extra={**self.hardware.extra, "group_ms": 0.0})

        def plan_again(narrowed: Mapping[str, ParameterConstraints]) -> PlanFile:
            search = replace(self, hardware=free, constraints=narrowed)._search(in_device_memory=True)
            searched = search.balanced(search.additive)
            if searched is None:
                raise UserError("no plan of these types fits")
            return self._made(searched.options, "balanced")

        return with_fewer_types(plan, [table.name for table in self.tables], self._allowed, plan_again)

    def checked_plan(self, search: Search) -> PlanFile:
        """Plan so that these ranks can run it, whichever search is used; else a UserError."""
        device = self.hardware.compute_device
        local = self.hardware.local_world_size(self.ranks)
        planning = self
        if search == "torchrec":  # it ignores that some kernels need a row on every rank
            planning = replace(self, constraints=self._possible)
        plan = planning.plan(search)
        where = f"the plan of --search {search}"
        check_fits(plan, self.tables, self.ranks, local_world_size=local, compute_device=device, where=where)
        return plan

    @cached_property
    def lower_bound_ms(self) -> float:
        """A time that no plan made of the options of ``WidthEnumerator`` goes below (``lower_bound.lower_bound``).

        These are all options of TorchRec's enumerator at its default ``min_partition``, with kernels in host memory,
        and more; not all plans there are: column shards narrower than 8 columns are among what is left out.
        """
        return self.hardware.extra.get("step_ms", 0.0) + self._best.lower_bound_ms()

    @cached_property
    def _allowed(self) -> Mapping[str, ParameterConstraints]:
        given = self.constraints or {}
        return in_device_memory(self.tables, given) if self.ema else given

    @cached_property
    def _possible(self) -> Mapping[str, ParameterConstraints]:
        """Constraints that keep TorchRec's own search to types that these ranks can run."""
        return keep_to_possible(
            self._allowed,
            self.tables,
            compute_device=self.hardware.compute_device,
            world_size=self.ranks,
            local_world_size=self.hardware.local_world_size(self.ranks),
        )

    @cached_property
    def _best(self) -> BestPlan:
        return self._search(in_device_memory=self.ema)

    def _search(self, *, in_device_memory: bool) -> BestPlan:
        at, constraints, estimators = self._parts()
        return BestPlan(
            self._module,
            _SHARDERS,
            topology=at,
            batch_size=self.batch_size,
            constraints=constraints,
            estimators=estimators,
            storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED),
            objective=self.objective,
            effort=self.effort,
            group_ms=self.hardware.extra.get("group_ms", 0.0),
            in_device_memory=in_device_memory,
            torchrec_constraints=_with_pooling_factors(self.tables, self._possible),
        )

    @cached_property
    def _module(self) -> nn.Module:
        return table_module(self.tables, self.optimizer)

    def _torchrecs_plan(self) -> PlanFile:
        """Run TorchRec's planner as it comes; its error becomes one that explains it."""
        planner = self.torchrec_planner()
        with constraints_leave_a_type():
            run_planner(planner, self._module, _SHARDERS, ema=self.ema, ranks_option="--ranks")
        return self._made(planner._best_plan or [], "torchrec")

    def torchrec_planner(self) -> EmbeddingShardingPlanner:
        """Make TorchRec's planner as it comes, with ids as they arrive; its estimators run once for equal shards."""
        at, constraints, estimators = self._parts()
        return EmbeddingShardingPlanner(
            topology=at,
            batch_size=self.batch_size,
            constraints=constraints,
            storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED),
            stats=NoopEmbeddingStats(),
            enumerator=EmbeddingEnumerator(at, self.batch_size, constraints, estimators),
        )

    def _parts(self) -> tuple[Topology, dict[str, ParameterConstraints], list[ShardEstimator]]:
        at = topology(self.hardware, self.ranks)
        constraints = _with_pooling_factors(self.tables, self._allowed)
        shard_ms = self.hardware.extra.get("shard_ms", 0.0)
        return at, constraints, shard_estimators(at, constraints, shard_ms=shard_ms, ema=self.ema)

    def _made(self, options: Sequence[ShardingOption], search: Search) -> PlanFile:
        plan = self._plan_file(options, search)
        return with_prediction(plan, self.tables, self.hardware, optimizer=self.optimizer, ema=self.ema)

    def _plan_file(self, options: Sequence[ShardingOption], search: Search) -> PlanFile:
        by_name = {option.name: option for option in options}
        return PlanFile(
            world_size=self.ranks,
            local_world_size=self.hardware.local_world_size(self.ranks),
            pod_size=self.hardware.pod_size_of(self.ranks),
            batch_size=self.batch_size,
            search=search,
            objective="total" if search == "torchrec" else self.objective,
            tables=tuple(_planned_table(by_name[table.name]) for table in self.tables),
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

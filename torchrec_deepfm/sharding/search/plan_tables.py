"""Planning a list of tables for named hardware, by the balanced search or by TorchRec's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Final

from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Enumerator, PlannerError, ShardingOption
from torchrec.distributed.types import ModuleSharder

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.estimate import (
    shard_estimators,
    table_constraints,
    table_module,
    with_prediction,
)
from torchrec_deepfm.sharding.inputs.constraints import in_device_memory, keep_to_possible
from torchrec_deepfm.sharding.inputs.hardware import RESERVED as RESERVED
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.sharding_types import CUDA_KERNELS, SparseOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.inputs.topology import topology
from torchrec_deepfm.sharding.plan.plan import Objective, PlanFile, PlannedShard, PlannedTable, Search
from torchrec_deepfm.sharding.plan.validate import check_fits
from torchrec_deepfm.sharding.runtime.planner_errors import explain
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder
from torchrec_deepfm.sharding.search.assignment import Effort
from torchrec_deepfm.sharding.search.enumerator import WidthEnumerator
from torchrec_deepfm.sharding.search.few_types import with_fewer_types
from torchrec_deepfm.sharding.search.lower_bound import lower_bound
from torchrec_deepfm.sharding.search.placement import PlacementOption
from torchrec_deepfm.sharding.search.torchrec_parts import (
    AllTermsPerfModel,
    BalancedPartitioner,
    BalancedProposer,
    machine_of,
    perf_ms,
    placement_option,
)
from torchrec_deepfm.sharding.search.torchrec_proposals import ProposalsThatMayWin

# Ranks times tables up to which TorchRec's own plan is looked for: enumerating its options takes a minute there.
_RUN_TORCHREC_TOO: Final = 2**17
_SAME: Final = 1e-9  # relative: what is left of equal sums in another order


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
        can run it and it is better by the objective, up to 131,072 ranks times tables.

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
            return self._run("torchrec")
        found = self._best_of_fallbacks()
        if not self._hardware.extra.get("group_ms"):
            return found
        free = replace(self._hardware, extra={**self._hardware.extra, "group_ms": 0.0})

        def plan_again(narrowed: Mapping[str, ParameterConstraints]) -> PlanFile:
            made = self._with(free, narrowed)._run("balanced")
            return self._with_prediction(made)

        return with_fewer_types(found, [table.name for table in self._tables], self._constraints, plan_again)

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
        machine = machine_of(topology(self._hardware, self._ranks))
        by_table: dict[str, list[PlacementOption]] = {}
        for option in self._options:
            by_table.setdefault(option.fqn, []).append(placement_option(option, machine, self._additive))
        fixed = self._hardware.extra.get("step_ms", 0.0) + self._hardware.extra.get(
            "group_ms", 0.0
        )  # one type at least
        return fixed + lower_bound(machine.ranks, machine.ranks_per_host, list(by_table.values()))

    @property
    def _additive(self) -> Objective:
        """What a rank takes at least under the objective, and is a sum over its shards."""
        return "total" if self._objective == "hidden-ids" else self._objective

    @cached_property
    def _options(self) -> list[ShardingOption]:
        """All options of all tables with their estimates, kernels in host memory included."""
        return self._enumerate(host_memory=True)

    def _enumerate(self, *, host_memory: bool) -> list[ShardingOption]:
        at = topology(self._hardware, self._ranks)
        constraints = _with_pooling_factors(self._tables, self._constraints)
        estimators = shard_estimators(self._hardware, at, constraints, ema=self._ema)
        enumerator = WidthEnumerator(at, self._batch_size, constraints, estimators, host_memory=host_memory)
        return enumerator.enumerate(self._module, [AllTypesSharder()])  # type: ignore[list-item]

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

    def _with_prediction(self, plan: PlanFile) -> PlanFile:
        return with_prediction(plan, self._tables, self._hardware, optimizer=self._optimizer, ema=self._ema)

    def _best_of_fallbacks(self) -> PlanFile:
        """Run the balanced search, then what may still be better: kernels in host memory, TorchRec's own search."""
        best: PlanFile | None = None
        why: UserError | None = None
        bound = self.lower_bound_ms  # first, since it enumerates the options of every attempt
        on_gpu = self._hardware.compute_device == "cuda" and not self._ema
        # Ids that hide behind kernels do not add up over shards: the search takes what is below and what is above.
        hidden = self._objective == "hidden-ids"
        scores: tuple[Objective, ...] = ("total", "hidden-ids") if hidden else (self._objective,)
        attempts = [partial(self._run, "balanced", score=score) for score in scores]
        if on_gpu:
            attempts.append(partial(self._run, "balanced", score=scores[-1], host_memory=True))
        for attempt in attempts:
            if attempt.keywords.get("host_memory") and best is not None and self._is_half_empty(best):
                continue  # memory is not the limit
            if best is not None and self._ms(best) <= bound * (1 + _SAME):
                break
            try:
                best = self._better(best, attempt())
            except UserError as error:  # nothing fits; the last search saw all options
                why = error
        if best is None or self._ms(best) > bound * (1 + _SAME):
            best = self._better(best, self._torchrecs_plan(math.inf if best is None else self._ms(best)))
        if best is None:
            assert why is not None
            raise why
        return replace(best, search="balanced", objective=self._objective)

    def _ms(self, plan: PlanFile) -> float:
        assert plan.predicted is not None
        return plan.predicted.slowest_ms(self._objective)

    def _better(self, best: PlanFile | None, other: PlanFile | None) -> PlanFile | None:
        """The better plan by the objective, of those that the ranks can run."""
        if other is None:
            return best
        try:
            check_fits(other, self._tables, self._ranks, compute_device=self._hardware.compute_device)
        except UserError:
            return best
        faster = best is None or self._ms(other) < self._ms(best) * (1 - _SAME)
        return other if faster else best

    def _torchrecs_plan(self, known_ms: float) -> PlanFile | None:
        """The best of what TorchRec's planner would place, if it may be better than a plan of ``known_ms``.

        TorchRec's enumerator, proposals and partitioner; its own plan is among them.
        """
        if self._ranks * len(self._tables) > _RUN_TORCHREC_TOO:
            return None
        fixed = sum(self._hardware.extra.get(key, 0.0) for key in ("step_ms", "group_ms"))
        planner = self._planner("torchrec")
        planner._perf_model = AllTermsPerfModel(planner._topology, self._objective)
        ms = partial(perf_ms, objective=self._additive)
        planner._proposers = [ProposalsThatMayWin(self._ranks, known_ms - fixed, ms)]
        try:
            planner.plan(self._module, [AllTypesSharder()])
        except (PlannerError, RuntimeError):  # none may win, or fits
            return None
        return self._made(planner, "torchrec")

    def _is_half_empty(self, plan: PlanFile) -> bool:
        """Whether the fullest rank has more than half of the memory left that tables may take."""
        assert plan.predicted is not None
        hbm = min(device.storage.hbm for device in topology(self._hardware, self._ranks).devices)
        return max(cost.hbm_bytes for cost in plan.predicted.per_rank) < 0.5 * (1 - RESERVED) * hbm

    def _planner(
        self, search: Search, *, score: Objective = "all", host_memory: bool = False
    ) -> EmbeddingShardingPlanner:
        return make_planner(
            self._tables,
            self._hardware,
            self._ranks,
            batch_size=self._batch_size,
            constraints=self._constraints,
            search=search,
            objective=score,
            ema=self._ema,
            effort=self._effort,
            host_memory=host_memory,
        )

    def _run(self, search: Search, *, score: Objective = "all", host_memory: bool = False) -> PlanFile:
        """Run a search once; an error of TorchRec's planner becomes one that explains it."""
        planner = self._planner(search, score=score, host_memory=host_memory)
        if search == "balanced":
            planner._enumerator = EnumeratedOptions(self._chosen_options(host_memory))
        try:
            planner.plan(self._module, [AllTypesSharder()])
        except RuntimeError as error:
            if not str(error).startswith("No available sharding type"):  # as TorchRec's enumerator begins
                raise
            raise UserError(f"{str(error).partition('. ')[0]}; loosen its constraints (--constraint)") from error
        except PlannerError as error:
            reserved = planner._storage_reservation.last_reserved_topology
            raise explain(
                error,
                planner._enumerator.last_stored_search_space or [],  # type: ignore[attr-defined]
                reserved or planner._topology,
                proposals=planner._num_proposals if search == "torchrec" else None,
                ema=self._ema,
                ranks_option="--ranks",
            ) from error
        return self._made(planner, search)

    def _made(self, planner: EmbeddingShardingPlanner, search: Search) -> PlanFile:
        options = {option.name: option for option in planner._best_plan or []}
        return self._with_prediction(
            PlanFile(
                world_size=self._ranks,
                local_world_size=self._local_world_size,
                pod_size=self._hardware.pod_size_of(self._ranks),
                batch_size=self._batch_size,
                search=search,
                objective="total" if search == "torchrec" else self._objective,
                tables=tuple(_planned_table(options[table.name]) for table in self._tables),
            )
        )

    def _chosen_options(self, host_memory: bool) -> list[ShardingOption]:
        if host_memory:
            return self._options
        if "_options" not in vars(self):  # a third of the work
            return self._enumerate(host_memory=False)
        named = {name for name, given in self._constraints.items() if given.compute_kernels}
        return [each for each in self._options if each.name in named or each.compute_kernel not in CUDA_KERNELS]


class EnumeratedOptions(Enumerator):
    """Gives TorchRec's planner options that were enumerated and estimated before.

    Args:
        options: Options of all tables, with their estimates.
    """

    def __init__(self, options: list[ShardingOption]) -> None:
        self.last_stored_search_space = options

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Return the options."""
        return self.last_stored_search_space

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Leave the estimates as they are."""


def make_planner(
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int,
    *,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    search: Search = "balanced",
    objective: Objective = "all",
    ema: bool = False,
    effort: Effort | None = None,
    host_memory: bool = True,
) -> EmbeddingShardingPlanner:
    """Make TorchRec's planner with the parts of the balanced search in it, or with its own.

    Args:
        tables: The tables and their pooling factors.
        hardware: The hardware.
        ranks: How many ranks of it.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name.
        search: ``balanced`` or ``torchrec``. TorchRec's estimators too run once for equal shards; no estimate changes.
        objective: What the balanced search makes small.
        ema: Whether a moving average of the weights is kept.
        effort: How long the balanced search runs.
        host_memory: Whether the balanced search offers kernels that keep rows in host memory where no constraint names
            the kernel.

    Returns:
        The planner, for a module of these tables.

    Raises:
        UserError: The ranks do not fill their hosts.
    """
    planner_topology = topology(hardware, ranks)
    merged = _with_pooling_factors(tables, constraints or {})
    estimators = shard_estimators(hardware, planner_topology, merged, ema=ema)
    parts: dict[str, Any] = {
        "topology": planner_topology,
        "batch_size": batch_size,
        "constraints": merged,
        "storage_reservation": FixedPercentageStorageReservation(percentage=RESERVED),
        "stats": NoopEmbeddingStats(),
    }
    if search == "torchrec":
        return EmbeddingShardingPlanner(
            **parts, enumerator=EmbeddingEnumerator(planner_topology, batch_size, merged, estimators)
        )
    return EmbeddingShardingPlanner(
        **parts,
        enumerator=WidthEnumerator(planner_topology, batch_size, merged, estimators, host_memory=host_memory),
        proposer=BalancedProposer(effort, fallbacks=False, objective=objective),
        partitioner=BalancedPartitioner(objective),
        performance_model=AllTermsPerfModel(planner_topology, objective),
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

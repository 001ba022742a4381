"""The search as parts of TorchRec's planner: a proposer, a partitioner and a performance model.

    constraints = {...}
    estimator = shard_estimators(ranks, constraints)
    planner = EmbeddingShardingPlanner(
        topology=ranks,
        batch_size=8192,
        constraints=constraints,
        enumerator=WidthEnumerator(ranks, 8192, constraints, estimator),
        proposer=BalancedProposer(),
        partitioner=BalancedPartitioner(),
        performance_model=AllTermsPerfModel(ranks),
    )

Each works with TorchRec's own parts in the place of the others.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.types import (
    Enumerator,
    PartitionByType,
    Partitioner,
    Perf,
    PerfModel,
    PlannerError,
    PlannerErrorType,
    Proposer,
    ShardingOption,
    Topology,
)
from torchrec.distributed.types import ShardingType

from torchrec_deepfm.sharding.inputs.sharding_types import COLUMN_TYPES, WIDE_ENOUGH, default_min_partition
from torchrec_deepfm.sharding.plan.plan import Objective
from torchrec_deepfm.sharding.search.choice import Choice, Effort, choose
from torchrec_deepfm.sharding.search.placement import Machine, PlacementOption, place
from torchrec_deepfm.sharding.search.torchrec_proposals import greedy_proposals


def perf_ms(perf: Perf, objective: Objective) -> float:
    """Return the milliseconds of a shard, or of a rank, under an objective, as ``plan.Cost.ms`` does."""
    ids = perf.input_dist_comms
    kernels = perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute
    return float(perf.total + {"all": ids, "total": 0.0, "hidden-ids": max(ids - kernels, 0.0)}[objective])


class AllTermsPerfModel(PerfModel):
    """Rates a plan by its slowest rank, all terms of the objective counted: the critical path."""

    def __init__(self, topology: Topology, objective: Objective = "all") -> None:
        self._ranks = topology.world_size
        self._objective = objective

    def rate(self, plan: list[ShardingOption]) -> float:
        """Return milliseconds of the slowest rank."""
        alike: list[dict[int, list[Any]]] = [{} for _ in range(self._ranks)]  # shards of a size share their Perf
        for option in plan:
            for shard in option.shards:
                assert shard.rank is not None
                alike[shard.rank].setdefault(id(shard.perf), [shard.perf, 0])[1] += 1
        return max(self._rank_ms(held.values()) for held in alike)

    def _rank_ms(self, held: Iterable[Sequence[Any]]) -> float:
        ids = kernels = rest = 0.0
        for perf, count in held:
            ids += count * perf.input_dist_comms
            kernels += count * (perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute)
            rest += count * (perf.fwd_comms + perf.bwd_comms)
        return perf_ms(Perf(kernels, rest, 0.0, 0.0, ids), self._objective)


class BalancedPartitioner(Partitioner):
    """Places the shards of a proposal so that the slowest rank is fast, all terms counted (``placement.place``).

    TorchRec's greedy one places the largest tables first, by ``Perf.total``. A proposal with tables that must stay
    together (embedding towers) is left to that one.

    Args:
        objective: Which terms of a shard count; ``hidden-ids`` hides a shard's ids behind its own kernels only.
    """

    def __init__(self, objective: Objective = "all") -> None:
        self._objective = objective

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Give every shard a rank, in place; raise ``PlannerError`` (``PARTITION``) where they do not fit."""
        if any(option.dependency for option in proposal):
            return GreedyPerfPartitioner().partition(proposal, storage_constraint)
        machine = machine_of(storage_constraint)
        if any(len(option.shards) % machine.ranks_per_host for option in proposal if _by_host(option)):
            raise PlannerError("the shards of a host do not fill it", PlannerErrorType.PARTITION)
        ways = [placement_option(option, machine, self._objective) for option in proposal]
        found = place(machine, ways)
        if found.short:
            raise PlannerError(
                f"{found.short / 2**30:.1f} GiB of shards find no room on the ranks", PlannerErrorType.PARTITION
            )
        for option, slots in zip(proposal, found.slots, strict=True):
            if not len(slots):
                ranks: Sequence[int] = range(machine.ranks)
            elif _by_host(option):
                inside = np.arange(machine.ranks_per_host)
                ranks = (slots[:, None] * machine.ranks_per_host + inside[None, :]).ravel().tolist()
            else:
                ranks = slots.tolist()
            for shard, rank in zip(option.shards, ranks, strict=True):
                shard.rank = int(rank)
        if any(option.sharding_type == ShardingType.TABLE_COLUMN_WISE.value for option in proposal):
            return GreedyPerfPartitioner().partition(proposal, storage_constraint)
        return proposal


class BalancedProposer(Proposer):
    """Proposes the plan that a search over all options finds (``choice.choose``), or TorchRec's if it fits nowhere.

    TorchRec's proposers try the options of a table one after another, each by itself. This one knows what is on every
    rank, on a host and on a single one, so it rates all tables together before it proposes. The proposals of the greedy
    ones are among the starts of its search. It first proposes the fastest option of each table, since the planner
    reports the memory only in its feedback.

    Args:
        effort: How long to search.
        fallbacks: Whether to propose TorchRec's where the plan found fits nowhere. With ``BalancedPartitioner`` that
            can't help: the search has tried the same placements.
        objective: Which terms of a shard count, as for ``BalancedPartitioner``.
    """

    def __init__(self, effort: Effort | None = None, *, fallbacks: bool = True, objective: Objective = "all") -> None:
        self._effort = effort or Effort()
        self._objective = objective
        self._with_fallbacks = fallbacks
        self._options: list[list[ShardingOption]] = []
        self._next: list[ShardingOption] | None = None
        self._fallbacks: list[Proposer] = []
        self._searched = False
        self._fits = False
        self.choice: Choice | None = None
        """What the search found; None before it has run."""

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take the options of all tables, with their estimates."""
        self._options = by_table(search_space)
        self._next = [min(options, key=self._max_shard_ms) for options in self._options] or None
        self._fallbacks = []
        if self._with_fallbacks:
            self._fallbacks = [GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()]
        for fallback in self._fallbacks:
            fallback.load(search_space, enumerator)
        self._searched, self._fits, self.choice = False, False, None

    def propose(self) -> list[ShardingOption] | None:
        """Return an option of each table; None when there is nothing left to try."""
        if not self._searched or self._next is not None:
            return self._next
        if self._fits:
            return None
        while self._fallbacks:
            proposal = self._fallbacks[0].propose()
            if proposal is not None:
                return proposal
            self._fallbacks.pop(0)
        return None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Take the outcome of a proposal; the first one brings the memory of the ranks."""
        if not self._searched:
            assert storage_constraint is not None
            self._searched, self._next = True, self._search(storage_constraint)
        elif self._next is not None:
            self._next, self._fits = None, partitionable
        elif self._fallbacks:
            self._fallbacks[0].feedback(partitionable, plan, perf_rating, storage_constraint)

    def _search(self, storage_constraint: Topology) -> list[ShardingOption]:
        self.choice = choose_options(self._options, storage_constraint, self._objective, self._effort)
        return [options[number] for options, number in zip(self._options, self.choice.ways, strict=True)]

    def _max_shard_ms(self, option: ShardingOption) -> float:
        return max(perf_ms(shard.perf, self._objective) for shard in option.shards if shard.perf is not None)


def choose_options(
    options: Sequence[Sequence[ShardingOption]], ranks: Topology, objective: Objective, effort: Effort | None
) -> Choice:
    """Choose an option of each table for ranks with so much memory left."""
    machine = machine_of(ranks)
    ways = [[placement_option(option, machine, objective) for option in each] for each in options]
    theirs = {id(option) for option in torchrecs_options(itertools.chain.from_iterable(options))}
    known = [{number: option for number, option in enumerate(each) if id(option) in theirs} for each in options]
    return choose(machine, ways, effort, starts=greedy_proposals(known))


def by_table(options: Iterable[ShardingOption]) -> list[list[ShardingOption]]:
    """Group options by their table."""
    found: dict[str, list[ShardingOption]] = {}
    for option in options:
        found.setdefault(option.fqn, []).append(option)
    return list(found.values())


def torchrecs_options(
    options: Iterable[ShardingOption], constraints: Mapping[str, ParameterConstraints] = MappingProxyType({})
) -> list[ShardingOption]:
    """Return the options that TorchRec's enumerator would offer: grid_shard only if asked, and one width of columns."""
    found: list[ShardingOption] = []
    for each in by_table(options):
        given = constraints.get(each[0].name, ParameterConstraints())
        columns = each[0].tensor.shape[1]
        width = max(default_min_partition(columns) or columns, min(columns, WIDE_ENOUGH))
        known = [
            option
            for option in each
            if (option.sharding_type != ShardingType.GRID_SHARD.value or given.sharding_types)
            and (
                option.sharding_type not in COLUMN_TYPES
                or given.min_partition is not None
                or option.shards[0].size[1] == width
            )
        ]
        found += known or each
    return found


def machine_of(ranks: Topology) -> Machine:
    """Describe ranks in arrays. A "host" is what table_row_wise may spread over (``intra_group_size``)."""
    storages = [device.storage for device in ranks.devices]
    return Machine(
        ranks=ranks.world_size,
        ranks_per_host=ranks.intra_group_size,
        hbm=np.array([float(storage.hbm) for storage in storages]),
        ddr=np.array([float(storage.ddr) for storage in storages]),
    )


def placement_option(option: ShardingOption, machine: Machine, objective: Objective = "all") -> PlacementOption:
    """Describe an option as pieces; shards of unequal rows count as the largest of them."""
    distinct = {(id(shard.perf), id(shard.storage)): shard for shard in option.shards}.values()
    hbm = max(shard.storage.hbm for shard in distinct if shard.storage is not None)
    ddr = max(shard.storage.ddr for shard in distinct if shard.storage is not None)
    ms = max(perf_ms(shard.perf, objective) for shard in distinct if shard.perf is not None)
    if option.partition_by == PartitionByType.UNIFORM.value:
        return PlacementOption(where="every rank", count=1, ms=ms, hbm=hbm, ddr=ddr)
    if _by_host(option):
        count = max(len(option.shards) // machine.ranks_per_host, 1)
        return PlacementOption(where="any host", count=count, ms=ms, hbm=hbm, ddr=ddr)
    return PlacementOption(where="any rank", count=len(option.shards), ms=ms, hbm=hbm, ddr=ddr)


def _by_host(option: ShardingOption) -> bool:
    return option.sharding_type in (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)

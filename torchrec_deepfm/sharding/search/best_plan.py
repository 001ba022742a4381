"""The best plan of several searches: the balanced one, also with rows in host memory, and TorchRec's own.

A plan of TorchRec's planner is kept where it is better by the objective, at any number of ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Final

from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.types import (
    PlannerError,
    PlannerErrorType,
    ShardEstimator,
    ShardingOption,
    StorageReservation,
)
from torchrec.distributed.types import ModuleSharder

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import CUDA_KERNELS
from torchrec_deepfm.sharding.plan.plan import Objective
from torchrec_deepfm.sharding.search.choice import Effort
from torchrec_deepfm.sharding.search.enumerator import UncopiedEnumerator, WidthEnumerator
from torchrec_deepfm.sharding.search.lower_bound import lower_bound
from torchrec_deepfm.sharding.search.torchrec_parts import (
    AllTermsPerfModel,
    BalancedPartitioner,
    by_table,
    choose_options,
    machine_of,
    perf_ms,
    placement_option,
    torchrecs_options,
)
from torchrec_deepfm.sharding.search.torchrec_proposals import best_proposal, own_shards

# Ranks times tables up to which TorchRec's enumerator makes its options: that takes a minute there. Above, they are
# picked from those at hand, the same except table_column_wise, which costs what column_wise does.
_ENUMERATE_AGAIN: Final = 2**17
_SAME: Final = 1e-9  # relative: what is left of equal sums in another order

Sharders = list[ModuleSharder[nn.Module]]


@dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """A plan as TorchRec's options, with ranks and estimates.

    ``ms`` are those of the slowest rank under the objective. ``lacked_memory``: the search met plans that might be
    faster, if there were more memory.
    """

    options: list[ShardingOption]
    search: str
    ms: float
    lacked_memory: bool = True


class BestPlan:
    """Searches for the best plan of one model.

    ``group_ms`` are milliseconds of each sharding type in a plan. ``in_device_memory``: all tables must stay in the
    device's memory. ``torchrec_constraints`` keep TorchRec's own search to types that these ranks can run; by default
    ``constraints``.
    """

    def __init__(
        self,
        module: nn.Module,
        sharders: Sharders,
        *,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints] | None,
        estimators: list[ShardEstimator],
        storage_reservation: StorageReservation,
        objective: Objective = "all",
        effort: Effort | None = None,
        group_ms: float = 0.0,
        in_device_memory: bool = False,
        torchrec_constraints: dict[str, ParameterConstraints] | None = None,
    ) -> None:
        self._module, self._sharders, self._topology, self._batch_size = module, sharders, topology, batch_size
        self._constraints, self._estimators, self._reservation = constraints, estimators, storage_reservation
        self._objective, self._effort, self._group_ms = objective, effort, group_ms
        self._in_device_memory = in_device_memory or topology.compute_device == "cpu"
        self._torchrec_constraints = constraints if torchrec_constraints is None else torchrec_constraints
        self._enumerator = WidthEnumerator(
            topology, batch_size, constraints, estimators, host_memory=not self._in_device_memory
        )
        self.options: list[ShardingOption] = self._enumerator.enumerate(module, sharders)
        """All options of all tables, kernels in host memory included."""
        self.error: PlannerError | None = None
        """Why the last search found no plan."""

    @property
    def reserved(self) -> Topology:
        """The ranks with the memory that tables may take."""
        return self._reservation.last_reserved_topology or self._topology

    def lower_bound_ms(self) -> float:
        """Return a time that no plan made of the options goes below (``lower_bound.lower_bound``)."""
        machine = machine_of(self._topology)
        ways = [
            [placement_option(option, machine, self.additive) for option in each] for each in by_table(self.options)
        ]
        return self._group_ms + lower_bound(machine.ranks, machine.ranks_per_host, ways)

    def find(self) -> FoundPlan | None:
        """Return the best plan of all searches; None where nothing fits."""
        best: FoundPlan | None = None
        bound = self.lower_bound_ms() * (1 + _SAME)
        # Ids that hide behind kernels do not add up over shards: the search takes what is below and what is above.
        scores: tuple[Objective, ...] = (
            ("total", "hidden-ids") if self._objective == "hidden-ids" else (self._objective,)
        )
        attempts: list[Callable[[], FoundPlan | None]] = [partial(self.balanced, score) for score in scores]
        if not self._in_device_memory:
            # With scarce memory the search is rough, and what it finds by other terms may be better by these too.
            by: tuple[Objective, ...] = (scores[-1], "all" if scores[-1] == "total" else "total")
            attempts += [partial(self.balanced, score, host_memory=True) for score in by]
        attempts.append(lambda: self._torchrec(math.inf if best is None else best.ms))
        for attempt in attempts:
            of_host_memory = isinstance(attempt, partial) and attempt.keywords.get("host_memory")
            if best is not None and (best.ms <= bound or (of_host_memory and not best.lacked_memory)):
                continue  # nothing can be better, or memory is not the limit
            found = attempt()
            if found is not None:
                best = found if best is None or found.ms < best.ms * (1 - _SAME) else best
        return best

    def balanced(self, score: Objective, *, host_memory: bool = False) -> FoundPlan | None:
        """Run the balanced search once, by an objective of its own."""
        if host_memory:
            options = self._of_all_caches
        else:
            named = {name for name, given in (self._constraints or {}).items() if given.compute_kernels}
            options = [each for each in self.options if each.name in named or each.compute_kernel not in CUDA_KERNELS]
        ranks = self._reserve()
        listed = by_table(options)
        choice = choose_options(listed, ranks, score, self._effort)
        # TorchRec's planner would copy a million shards twice, with their estimates.
        chosen = [own_shards(each[number]) for each, number in zip(listed, choice.ways, strict=True)]
        try:
            found = self._found("balanced", BalancedPartitioner(score).partition(chosen, ranks))
            return replace(found, lacked_memory=choice.lacked_memory)
        except PlannerError as error:  # the best that was tried fits nowhere, as TorchRec's planner calls that
            self.error = PlannerError(str(error), PlannerErrorType.STRICT_CONSTRAINTS)
            return None

    def _torchrec(self, known_ms: float) -> FoundPlan | None:
        """The best of what TorchRec's planner would place, if it may be better than a plan of ``known_ms``.

        TorchRec's enumerator, proposals and partitioner; its own plan is among them.
        """
        tables = {option.fqn for option in self.options}
        if self._topology.world_size * len(tables) <= _ENUMERATE_AGAIN:
            enumerator = UncopiedEnumerator(
                self._topology, self._batch_size, self._torchrec_constraints, self._estimators
            )
            try:
                options = enumerator.enumerate(self._module, self._sharders)
            except UserError:
                return None
        else:
            options = torchrecs_options(self.options, self._constraints or {})
        found = best_proposal(
            [dict(enumerate(each)) for each in by_table(options)],
            self._reserve(),
            known_ms - self._group_ms,
            shard_ms=partial(perf_ms, objective=self.additive),
            plan_ms=AllTermsPerfModel(self._topology, self._objective).rate,
        )
        return None if found is None else self._found("torchrec", found)

    @cached_property
    def _of_all_caches(self) -> list[ShardingOption]:
        return [*self.options, *self._enumerator.other_cache_sizes(self.options)]

    def _reserve(self) -> Topology:
        return self._reservation.reserve(
            topology=self._topology,
            batch_size=self._batch_size,
            module=self._module,
            sharders=self._sharders,
            constraints=self._constraints,
        )

    def _found(self, search: str, options: list[ShardingOption]) -> FoundPlan:
        ms = AllTermsPerfModel(self._topology, self._objective).rate(options)
        types = {option.sharding_type for option in options}
        return FoundPlan(options=options, search=search, ms=ms + self._group_ms * len(types))

    @property
    def additive(self) -> Objective:
        """What a rank takes at least under the objective, and is a sum over its shards."""
        return "total" if self._objective == "hidden-ids" else self._objective

"""What TorchRec's planner would propose, without the proposals that can't win.

TorchRec's planner places every proposal of its proposers, which takes minutes on a thousand ranks. Most of them can't
be better than a plan that is known: their mean rank, or what they put on every rank plus their most expensive shard, is
already slower, or their memory exceeds that of all ranks. Such proposals are skipped, so the rest is placed in seconds
and the best of all is still found.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from torchrec.distributed.planner.proposers import MAX_PROPOSALS
from torchrec.distributed.planner.types import (
    Enumerator,
    PartitionByType,
    Perf,
    Proposer,
    ShardingOption,
    Topology,
)

_SAME: Final = 1e-9  # relative: what is left of equal sums in another order

Options = Sequence[Mapping[int, ShardingOption]]
"""Of each table its options by number."""
Choice = tuple[int, ...]
"""The number of an option for each table."""


def greedy_proposals(options: Options) -> Iterator[Choice]:
    """Yield the proposals of TorchRec's two greedy proposers, by largest shard and by sum of shards.

    They ignore feedback: the table that takes the most memory gets its next more expensive option. TorchRec's own code
    sums every shard of every table again at each step, which is too slow for a thousand ranks.
    """
    sizes = [{number: _memory(option) for number, option in each.items()} for each in options]
    for total in (max, sum):
        ranked = [
            sorted(each, key=lambda number, each=each: total(_perf_totals(each[number])))  # type: ignore[misc]
            for each in options
        ]
        choice = [each[0] for each in ranked]
        left = [iter(each[1:]) for each in ranked]
        largest = [
            (_negated(each[number]), table) for table, (each, number) in enumerate(zip(sizes, choice, strict=True))
        ]
        heapq.heapify(largest)
        yield tuple(choice)
        while largest:
            table = largest[0][1]
            number = next(left[table], None)
            if number is None:
                heapq.heappop(largest)
                continue
            choice[table] = number
            heapq.heapreplace(largest, (_negated(sizes[table][number]), table))
            yield tuple(choice)


def torchrec_proposals(options: Options) -> Iterator[Choice]:
    """Yield what TorchRec's default proposers propose: all combinations if they are few, greedy and uniform ones."""
    if math.prod(len(each) for each in options) <= MAX_PROPOSALS:
        yield from itertools.product(*options)
        return  # the others are among them
    yield from greedy_proposals(options)
    kinds = {option.sharding_type for option in options[0].values()}
    for kind in sorted(kinds):
        fitting = [[n for n, option in each.items() if option.sharding_type == kind] for each in options]
        if all(fitting):
            yield tuple(
                min(numbers, key=lambda n, each=each: max(_perf_totals(each[n])))  # type: ignore[misc]
                for numbers, each in zip(fitting, options, strict=True)
            )


class ProposalsThatMayWin(Proposer):
    """Proposes what TorchRec's proposers do, except what can't be faster than the best plan so far.

    Args:
        ranks: How many there are.
        known_ms: The slowest rank of a plan that is known already.
        ms: A lower bound on what a shard adds to its rank under the planner's ``PerfModel``.
    """

    def __init__(self, ranks: int, known_ms: float, ms: Callable[[Perf], float]) -> None:
        self._ranks, self._best, self._ms = ranks, known_ms, ms
        self._room = (math.inf, math.inf)
        self._left: Iterator[list[ShardingOption]] = iter(())
        self._next: list[ShardingOption] | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take the options of all tables, with their estimates."""
        by_table: dict[str, dict[int, ShardingOption]] = {}
        for number, option in enumerate(search_space):
            by_table.setdefault(option.fqn, {})[number] = option
        self._left = self._may_win(list(by_table.values()))
        self._next = next(self._left, None)

    def propose(self) -> list[ShardingOption] | None:
        """Return an option of each table; None when there is nothing left to try."""
        return self._next

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Take the outcome of a proposal."""
        if perf_rating is not None:
            self._best = min(self._best, perf_rating)
        if storage_constraint is not None:
            held = [device.storage for device in storage_constraint.devices]
            self._room = (sum(each.hbm for each in held), sum(each.ddr for each in held))
        self._next = next(self._left, None)

    def _may_win(self, options: Options) -> Iterator[list[ShardingOption]]:
        loads = {number: self._load(option) for each in options for number, option in each.items()}
        for choice in dict.fromkeys(torchrec_proposals(options)):
            added = [loads[number] for number in choice]
            sums = [sum(each) for each in zip(*added, strict=True)]
            fits = sums[3] <= self._room[0] and sums[4] <= self._room[1]
            bound = max(sums[0], sums[1] + max(each[2] for each in added))
            if fits and bound < self._best * (1 - _SAME):
                yield [each[number] for each, number in zip(options, choice, strict=True)]

    def _load(self, option: ShardingOption) -> tuple[float, float, float, int, int]:
        """What an option adds to the mean rank, to every rank, to one rank, and to the memory of all ranks."""
        ms = [self._ms(shard.perf) for shard in option.shards if shard.perf is not None]
        held = [shard.storage for shard in option.shards if shard.storage is not None]
        everywhere = option.partition_by == PartitionByType.UNIFORM.value
        return (
            sum(ms) / self._ranks,
            min(ms) if everywhere else 0.0,
            0.0 if everywhere else max(ms),
            sum(each.hbm for each in held),
            sum(each.ddr for each in held),
        )


def _perf_totals(option: ShardingOption) -> list[float]:
    return [float(shard.perf.total) for shard in option.shards if shard.perf is not None]


def _negated(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-each for each in size)


def _memory(option: ShardingOption) -> tuple[int, int, int, int]:
    held = [shard.storage for shard in option.shards if shard.storage is not None]
    hbm, ddr = [each.hbm for each in held], [each.ddr for each in held]
    return max(hbm), sum(hbm), max(ddr), sum(ddr)

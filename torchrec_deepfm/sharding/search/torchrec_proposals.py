"""What TorchRec's planner would propose, without the proposals that can't win.

TorchRec's planner places every proposal of its proposers, which takes minutes on a thousand ranks. Most of them can't
be better than a plan that is known: their mean rank, or what they put on every rank plus their most expensive shard, is
already slower, or their memory exceeds that of all ranks. Such proposals are skipped, so the rest is placed in seconds
and the best of all is still found.
"""

import copy
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import MAX_PROPOSALS
from torchrec.distributed.planner.types import PartitionByType, Perf, PlannerError, Shard, ShardingOption, Topology

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
    rates = [{number: _largest_and_sum(option) for number, option in each.items()} for each in options]
    for place in (0, 1):
        ranked = [sorted(each, key=lambda number, each=each: each[number][place]) for each in rates]  # type: ignore[misc]
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
                min(numbers, key=lambda n, each=each: _largest_and_sum(each[n])[0])  # type: ignore[misc]
                for numbers, each in zip(fitting, options, strict=True)
            )


def best_proposal(
    options: Options,
    ranks: Topology,
    known_ms: float,
    *,
    shard_ms: Callable[[Perf], float],
    plan_ms: Callable[[list[ShardingOption]], float],
) -> list[ShardingOption] | None:
    """Return the best plan that TorchRec's planner would find: its proposals, placed by its partitioner.

    ``shard_ms`` is a lower bound on what a shard adds to its rank, ``plan_ms`` the slowest rank of a plan. None where
    no proposal fits and is faster than ``known_ms``.
    """
    hbm, ddr = (sum(getattr(rank.storage, tier) for rank in ranks.devices) for tier in ("hbm", "ddr"))
    most = max(max(each, default=0) for each in options) + 1
    times = np.full((len(options), most, 3), np.inf)  # added to the mean rank, to every rank, to one rank
    memory = np.zeros((len(options), most, 2))  # added to the memory of all ranks
    for table, each in enumerate(options):
        for number, option in each.items():
            times[table, number], memory[table, number] = _load(option, ranks, shard_ms)
    tables = np.arange(len(options))
    partitioner, best, best_ms = GreedyPerfPartitioner(), None, known_ms
    for choice in dict.fromkeys(torchrec_proposals(options)):
        mean, every, one = times[tables, choice].T
        needed = memory[tables, choice].sum(axis=0)
        bound = max(mean.sum(), every.sum() + one.max())
        if needed[0] > hbm or needed[1] > ddr or bound >= best_ms * (1 - _SAME):
            continue
        proposal = [own_shards(each[number]) for each, number in zip(options, choice, strict=True)]
        try:
            plan = partitioner.partition(proposal, ranks)
        except PlannerError:
            continue
        if (ms := plan_ms(plan)) < best_ms:
            best, best_ms = plan, ms
    return best


def own_shards(option: ShardingOption) -> ShardingOption:
    """The option with shards of its own, to be given ranks; estimates are shared."""
    copied = copy.copy(option)
    copied.shards = [Shard(each.size, each.offset, each.storage, each.perf) for each in option.shards]
    return copied


def _load(
    option: ShardingOption, ranks: Topology, shard_ms: Callable[[Perf], float]
) -> tuple[tuple[float, float, float], tuple[int, int]]:
    """What an option adds to the mean rank, to every rank, to one rank; and to the memory of all ranks."""
    ms = _per_shard(option, shard_ms)
    everywhere = option.partition_by == PartitionByType.UNIFORM.value
    times = (sum(ms) / ranks.world_size, min(ms) if everywhere else 0.0, 0.0 if everywhere else max(ms))
    _, hbm, _, ddr = _memory(option)
    return times, (hbm, ddr)


def _per_shard(option: ShardingOption, figure: Callable[[Perf], float]) -> list[float]:
    """A figure of each shard; it is computed once for shards of a size, which share their estimate."""
    perfs = [shard.perf for shard in option.shards if shard.perf is not None]
    found = {key: figure(perf) for key, perf in {id(perf): perf for perf in perfs}.items()}
    return [found[id(perf)] for perf in perfs]


def _largest_and_sum(option: ShardingOption) -> tuple[float, float]:
    totals = _per_shard(option, lambda perf: float(perf.total))
    return max(totals), sum(totals)


def _negated(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-each for each in size)


def _memory(option: ShardingOption) -> tuple[int, int, int, int]:
    held = [shard.storage for shard in option.shards if shard.storage is not None]
    hbm, ddr = [each.hbm for each in held], [each.ddr for each in held]
    return max(hbm), sum(hbm), max(ddr), sum(ddr)

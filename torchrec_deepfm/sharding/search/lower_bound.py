"""The least that any plan may cost under the estimates: what no better one gets below. Numpy only, no TorchRec.

Two bounds, both from the estimates of single pieces (``balance.PlacementOption``), memory left aside:

1. The slowest rank T is no faster than the mean rank, and no piece may cost more than T. So T is at least the sum of
   the least shares among the ways whose pieces cost at most T.
2. Say n tables are sharded and the others are on every rank; the cheapest n to leave out save the most, so every rank
   carries at least U(n). Pieces of a table hold equal parts of it, so some rank holds n / W tables or more in pieces,
   and the cheapest set of pieces that hold so much, C(n / W), is a covering knapsack. T is at least the least over n
   of U(n) + C(n / W). This one knows that pieces are not divisible, which the first does not.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from torchrec_deepfm.sharding.search.placement import PlacementOption

_MOST_UNITS = 1 << 14


def lower_bound(ranks: int, ranks_per_host: int, ways: Sequence[Sequence[PlacementOption]]) -> float:
    """Return milliseconds that the slowest rank of no choice and no placement can go below.

    Example:
        >>> halves = PlacementOption(where="any rank", count=2, ms=3.0, hbm=0, ddr=0)
        >>> lower_bound(2, 2, [[halves], [halves], [halves]])
        9.0
    """
    return max(_by_shares(ranks, ranks_per_host, ways), _by_pieces(ranks, ranks_per_host, ways))


def _copies(way: PlacementOption, ranks: int, ranks_per_host: int) -> int:
    return {"every rank": ranks, "any host": ranks_per_host, "any rank": 1}[way.where]


def _by_shares(ranks: int, ranks_per_host: int, ways: Sequence[Sequence[PlacementOption]]) -> float:
    """The first bound: the least T whose usable ways share out to at most T."""
    prices = np.unique([way.ms for options in ways for way in options])
    # With a bound on pieces T is at least both that and the shares; a larger bound may do with smaller shares.
    mean = np.zeros(len(prices))
    for options in ways:
        least = np.full(len(prices), np.inf)
        for way in options:
            first = int(np.searchsorted(prices, way.ms))
            share = way.ms * way.count * _copies(way, ranks, ranks_per_host) / ranks
            least[first] = min(least[first], share)
        mean += np.minimum.accumulate(least)
    # Between two prices of pieces nothing changes, so T may lie below the price that made it usable only by the shares.
    return float(np.where(np.isfinite(mean), np.maximum(prices, mean), np.inf).min(initial=np.inf))


def _by_pieces(ranks: int, ranks_per_host: int, ways: Sequence[Sequence[PlacementOption]]) -> float:
    """The second bound."""
    everywhere = sorted(
        min((way.ms for way in options if way.where == "every rank"), default=math.inf) for options in ways
    )
    least = sum(math.isinf(each) for each in everywhere)  # tables that must be sharded
    shardable = sum(any(way.where != "every rank" for way in options) for options in ways)
    parts: dict[int, float] = {}
    for way in (way for options in ways for way in options if way.where != "every rank"):
        of_table = way.count * _copies(way, ranks, ranks_per_host)
        parts[of_table] = min(parts.get(of_table, math.inf), way.ms)
    units = math.lcm(*parts) if parts else 1
    units = min(units, _MOST_UNITS)
    items = [(math.ceil(units / of_table), ms) for of_table, ms in parts.items()]  # rounded up: the bound holds
    covered = _cover(items, max(math.ceil(units * shardable / ranks), 1))
    return min(
        sum(everywhere[: len(ways) - count]) + (covered[_needed(units, count, ranks)] if count else 0.0)
        for count in range(least, shardable + 1)
    )


def _needed(units: int, count: int, ranks: int) -> int:
    return -(-units * count // ranks)


def _cover(items: Iterable[tuple[int, float]], most: int) -> list[float]:
    """The least cost of pieces that hold at least 0, 1, ... units, each piece as often as wanted."""
    listed = list(items)
    cost = [0.0]
    for units in range(1, most + 1):
        cost.append(min((ms + cost[max(units - each, 0)] for each, ms in listed), default=math.inf))
    return cost

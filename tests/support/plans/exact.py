"""The best of all plans of a small task, by integer programming: scipy's HiGHS, nothing of the search."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

# (where a piece lies: "every rank", "any host" or "any rank"; pieces; ms of a piece on each rank it lies on)
Way = tuple[str, int, float]


def best_slowest_rank(
    ranks: int, per_host: int, tables: Sequence[Sequence[Way]], *, known: float, seconds: float = 60.0
) -> float:
    """Return milliseconds of the slowest rank of the best plan, one way per table; memory is not limited.

    Plans slower than a ``known`` one are left out, which halves the time; that no plan is as fast is an error.

    Variables: the slowest rank; for each way whether it is taken; for each way that is placed, how many of its pieces
    each host, or each rank, gets. A solution is accepted only if HiGHS proved it optimal within 1e-7.
    """
    hosts = ranks // per_host
    ways = [(table, way) for table, options in enumerate(tables) for way in options]
    slots = [{"every rank": 0, "any host": hosts, "any rank": ranks}[where] for _, (where, _, _) in ways]
    first = 1 + len(ways) + np.concatenate([[0], np.cumsum(slots)[:-1]]).astype(int)
    width = 1 + len(ways) + sum(slots)
    rows, low, high = [], [], []

    def add(entries: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(width)
        for at, value in entries.items():
            row[at] = value
        rows.append(row)
        low.append(least)
        high.append(most)

    for table in range(len(tables)):
        add({1 + n: 1.0 for n, (owner, _) in enumerate(ways) if owner == table}, 1, 1)
    for n, (_, (_, pieces, _)) in enumerate(ways):
        if slots[n]:
            add({first[n] + slot: 1.0 for slot in range(slots[n])} | {1 + n: -float(pieces)}, 0, 0)
    for rank in range(ranks):
        load = {0: -1.0}
        for n, (_, (where, _, ms)) in enumerate(ways):
            at = {"every rank": 1 + n, "any host": first[n] + rank // per_host, "any rank": first[n] + rank}[where]
            load[int(at)] = ms
        add(load, -math.inf, 0)
    most = np.repeat([float(way[1]) for _, way in ways], slots) if sum(slots) else []
    upper = np.concatenate([[known * (1 + 1e-6)], np.ones(len(ways)), most])
    cost = np.zeros(width)
    cost[0] = 1.0
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        bounds=Bounds(np.zeros(width), upper),
        integrality=np.concatenate([[0], np.ones(width - 1)]),
        options={"mip_rel_gap": 1e-7, "time_limit": seconds},
    )
    assert found.status == 0, found.message
    return float(found.fun)

"""Spreading pieces of tables over ranks so that the slowest rank is as fast as it can be. Numpy only, no TorchRec.

A way to shard a table comes as equal **pieces**. One of them lies

- on **every** rank: data_parallel, row_wise;
- on all ranks of **any host**: a table_row_wise table, a column block of a grid_shard table;
- on **any rank**: a table_wise table, a column shard.

Letters: W ranks, L ranks on a host, H = W / L hosts.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Where = Literal["every rank", "any host", "any rank"]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_MOST_CANDIDATES = 1 << 22  # starts of pieces that are looked at together, to bound memory
_PIECES_PER_GROUP = 150  # equal pieces from which they are faster placed at once


@dataclass(frozen=True, kw_only=True)
class PlacementOption:
    """A way to shard a table.

    Args:
        where: Where a piece may lie.
        count: How many pieces there are; 1 where one lies on every rank.
        ms: What a piece costs each rank on which it lies, in milliseconds per step.
        hbm: Bytes of GPU memory that it takes there.
        ddr: Bytes of host memory that it takes there.
    """

    where: Where
    count: int
    ms: float
    hbm: int
    ddr: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """W ranks, L per host, with the bytes of GPU and of host memory that tables may take on each [W]."""

    ranks: int
    ranks_per_host: int
    hbm: Floats
    ddr: Floats

    @property
    def hosts(self) -> int:
        """H."""
        return self.ranks // self.ranks_per_host

    def copies(self, where: Where) -> int:
        """Return on how many ranks a piece lies."""
        return {"every rank": self.ranks, "any host": self.ranks_per_host, "any rank": 1}[where]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where pieces went.

    Args:
        ms: Milliseconds of each rank [W].
        short: Bytes for which there was no room; 0 if the placement is possible.
        slots: For each way given, the rank (or host) of each piece; empty where it lies on every rank.
    """

    ms: Floats
    short: float
    slots: tuple[Counts, ...]

    @property
    def critical_path(self) -> float:
        """Milliseconds of the slowest rank."""
        return float(self.ms.max())


def place(machine: Machine, ways: Sequence[PlacementOption], *, where: bool = True) -> Placement:
    """Place the pieces, the most expensive first, each where the load is smallest and memory is left.

    What lies on every rank comes first, then what takes whole hosts, then what takes single ranks and so fills gaps.
    This is the "longest processing time first" rule of scheduling (R. L. Graham, SIAM J. Appl. Math. 17, 1969), for
    groups of equal pieces at once. A placement with ``short > 0`` does not fit. Without ``where`` its ``slots`` are
    empty.

    Example:
        >>> machine = Machine(ranks=2, ranks_per_host=2, hbm=np.full(2, 9.0), ddr=np.full(2, 9.0))
        >>> ways = [PlacementOption(where="any rank", count=1, ms=ms, hbm=1, ddr=0) for ms in (2.0, 3.0, 4.0)]
        >>> place(machine, ways).ms.tolist()
        [4.0, 5.0]
    """
    everywhere = [way for way in ways if way.where == "every rank"]
    ms = np.full(machine.ranks, sum(way.ms for way in everywhere), float)
    hbm = machine.hbm - sum(way.hbm for way in everywhere)
    ddr = machine.ddr - sum(way.ddr for way in everywhere)
    short = float(np.maximum(-hbm, 0).sum() + np.maximum(-ddr, 0).sum())
    found: list[Counts] = [np.zeros(0, np.int64)] * len(ways)
    hosts = (machine.hosts, machine.ranks_per_host)
    load = ms.reshape(hosts).max(axis=1)
    room = (hbm.reshape(hosts).min(axis=1), ddr.reshape(hosts).min(axis=1))
    single = machine.ranks_per_host == 1  # a host is a rank: all pieces in one order
    if not single:
        short += _fill(ways, ("any host",), load, room, found if where else None)
    # Ranks of a host differ so far only where the machine's own memory does.
    ms = np.repeat(load, machine.ranks_per_host)
    hbm += np.repeat(room[0] - hbm.reshape(hosts).min(axis=1), machine.ranks_per_host)
    ddr += np.repeat(room[1] - ddr.reshape(hosts).min(axis=1), machine.ranks_per_host)
    kinds: tuple[Where, ...] = ("any host", "any rank") if single else ("any rank",)
    short += _fill(ways, kinds, ms, (hbm, ddr), found if where else None)
    return Placement(ms=ms, short=short, slots=tuple(found) if where else ())


def _fill(
    ways: Sequence[PlacementOption],
    where: tuple[Where, ...],
    load: Floats,
    room: tuple[Floats, Floats],
    found: list[Counts] | None,
) -> float:
    """Place all pieces of some kinds; changes load and room, and returns the bytes for which there was no room."""
    groups: dict[tuple[float, int, int], int] = {}
    for way in ways:
        if way.where in where:
            piece = (way.ms, way.hbm, way.ddr)
            groups[piece] = groups.get(piece, 0) + way.count
    if not groups:
        return 0.0
    ordered = sorted(groups.items(), reverse=True)
    if sum(groups.values()) < _PIECES_PER_GROUP * len(groups):
        short, slots = _fill_by_piece(ordered, load, room)
        taken = [] if found is None else [np.bincount(each, minlength=len(load)) for each in slots]
    else:
        short, taken = _fill_by_group(ordered, load, room)
    if found is not None:
        members: dict[tuple[float, int, int], list[int]] = {piece: [] for piece in groups}
        for number, way in enumerate(ways):
            if way.where in where:
                members[way.ms, way.hbm, way.ddr].append(number)
        for (piece, _), each in zip(ordered, taken, strict=True):
            _deal(ways, members[piece], each, found)
    return short


def _fill_by_group(
    groups: Iterable[tuple[tuple[float, int, int], int]], load: Floats, room: tuple[Floats, Floats]
) -> tuple[float, list[Counts]]:
    """Place all equal pieces at once; return the bytes without room, and how many each slot takes of each kind."""
    hbm, ddr = room
    short, found = 0.0, []
    for (ms, piece_hbm, piece_ddr), count in groups:
        most = np.full(len(load), count, np.int64)
        for piece, left in ((piece_hbm, hbm), (piece_ddr, ddr)):
            if piece:
                np.minimum(most, np.maximum(left // piece, 0).astype(np.int64), out=most)
        missing = count - int(most.sum())
        if missing > 0:  # so that the search sees how far it is from a plan that fits
            short += float(missing) * (piece_hbm + piece_ddr)
            most += -(-missing // len(most))
        taken = fill(load, most, count, ms)
        load += taken * ms
        hbm -= taken * piece_hbm
        ddr -= taken * piece_ddr
        found.append(taken)
    return short, found


def _fill_by_piece(
    groups: Iterable[tuple[tuple[float, int, int], int]], load: Floats, room: tuple[Floats, Floats]
) -> tuple[float, list[list[int]]]:
    """The same one piece at a time, which is faster where few are equal; returns the slots of the pieces."""
    loads, hbm, ddr = load.tolist(), room[0].tolist(), room[1].tolist()
    heap = [(ms, slot) for slot, ms in enumerate(loads)]
    heapq.heapify(heap)
    short, found = 0.0, []
    full: list[tuple[float, int]] = []  # too full for the pieces so far: back on the heap when one would fit
    for (ms, piece_hbm, piece_ddr), count in groups:
        least_hbm: float = piece_hbm
        least_ddr: float = piece_ddr
        slots: list[int] = []
        aside, full = full, []
        for each in aside:
            if least_hbm > hbm[each[1]] or least_ddr > ddr[each[1]]:
                full.append(each)
            else:
                heapq.heappush(heap, each)
        while len(slots) < count:
            if not heap:
                short += float(count - len(slots)) * (piece_hbm + piece_ddr)
                heap, full = full, []
                heapq.heapify(heap)
                least_hbm = least_ddr = -math.inf  # taken without room
                continue
            before, slot = heap[0]
            if least_hbm > hbm[slot] or least_ddr > ddr[slot]:
                full.append(heapq.heappop(heap))
                continue
            heapq.heapreplace(heap, (before + ms, slot))
            hbm[slot] -= piece_hbm
            ddr[slot] -= piece_ddr
            slots.append(slot)
        if least_hbm < 0:  # no slot had room, and the next piece will find few
            heap, full = full, heap
        found.append(slots)
    for ms, slot in (*heap, *full):
        load[slot] = ms
    room[0][:], room[1][:] = hbm, ddr
    return short, found


def fill(load: Floats, most: Counts, count: int, ms: float) -> Counts:
    """Put ``count`` equal pieces on the least loaded slots with room; return how many each takes [slots].

    Example:
        >>> fill(np.array([0.0, 1.5, 9.0]), np.array([5, 5, 5]), 4, 1.0).tolist()
        [3, 1, 0]
    """
    # A slot takes its j-th piece when it has come to load + j ms: the `count` smallest of these starts are taken.
    spread = float(load.max() - load.min())
    deep = min(count, int(spread / ms if ms > 0 else 0) + -(-count // len(load)) + 1)
    while int(np.minimum(most, deep).sum()) < count or _too_shallow(load, most, count, ms, deep):
        deep = min(count, 2 * deep)
        if deep == count:
            break
    levels = np.arange(deep)
    starts = load[:, None] + levels[None, :] * ms
    starts[levels[None, :] >= most[:, None]] = np.inf
    last = np.partition(starts.ravel(), count - 1)[count - 1]
    taken: Counts = (starts < last).sum(axis=1)
    rest = count - int(taken.sum())
    # Of equal starts the earlier pieces go first, and of those the earlier slots.
    for level in levels:
        if not rest:
            break
        ready = np.flatnonzero(starts[:, level] == last)[:rest]
        taken[ready] += 1
        rest -= len(ready)
    return taken


def _too_shallow(load: Floats, most: Counts, count: int, ms: float, deep: int) -> bool:
    """Whether a slot might take more than ``deep`` pieces, since others are full."""
    return deep < count and bool((most < deep).any()) and len(load) * deep < _MOST_CANDIDATES


def _deal(ways: Sequence[PlacementOption], members: Iterable[int], taken: Counts, found: list[Counts]) -> None:
    """Distribute the slots of a group over its tables, so that a table gets a slot twice only where it must."""
    levels = [np.flatnonzero(taken > level) for level in range(int(taken.max()))]
    order = np.concatenate(levels)
    start = 0
    for number in members:
        found[number] = order[start : start + ways[number].count]
        start += ways[number].count

"""Choosing a way to shard each table: a search over pieces. Numpy only, no TorchRec.

The slowest rank is never faster than the mean rank, nor than what is on every rank plus the most expensive piece. A
table's **share** is what a way adds to the mean. So for every bound on the price of a piece, the ways with the least
shares below it give a start; the best starts are then improved table by table, each step really placed
(``placement.place``). Where memory is short, shares are priced with the memory that they take (a Lagrange multiplier),
from little to much.

Everything is deterministic, and bounded by the number of placements, not by time.

Letters: T tables, O ways of a table (padded), W ranks.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.sharding.search.placement import Floats, Machine, PlacementOption, Where, place

_FAMILIES: Final[tuple[tuple[Where, ...], ...]] = (
    ("every rank", "any host", "any rank"),
    ("every rank", "any rank"),
    ("every rank", "any host"),
)
_LUMPS: Final = (1.0, 1.2, 1.5)  # factors on the shares of pieces, since pieces fill no gaps
_MULTIPLIERS: Final = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
_MOST_PRICES: Final = 64
_SAME: Final = 1e-9  # relative: what is left of equal sums in another order


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long the search runs.

    Args:
        starts: Starts to improve, of all that were placed.
        placed_starts: Starts to place, of all that were made.
        placements: Placements in all.
        placed_tables: Tables of these placements in all, which bounds the time for long lists; fewer above 256 ranks.
        single_moves: Changes of one table to place, for pairs of them.
        paired_moves: Of those, how many to pair.
    """

    starts: int = 12
    placed_starts: int = 400
    placements: int = 4000
    placed_tables: int = 300_000
    single_moves: int = 60
    paired_moves: int = 12


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way for each table.

    Args:
        ways: Index of each table's way [T].
        critical_path: Milliseconds of the slowest rank.
        short: Bytes for which there is no room; 0 if the choice is possible.
        lacked_memory: Whether the search met a choice that might be faster, if there were more memory.
    """

    ways: tuple[int, ...]
    critical_path: float
    short: float
    lacked_memory: bool = False

    def better_than(self, other: "Choice") -> bool:
        """Whether it fits better, or fits as well and is faster."""
        if self.short != other.short:
            return self.short < other.short
        return self.critical_path < other.critical_path * (1 - _SAME)


def choose(
    machine: Machine,
    ways: Sequence[Sequence[PlacementOption]],
    effort: Effort | None = None,
    *,
    starts: Iterable[tuple[int, ...]] = (),
) -> Choice:
    """Find a way for each table so that the slowest rank is fast, at least as good as any of ``starts``.

    Where nothing fits the memory, only the starts that lack the least are tried; one, where nothing can fit.

    Example:
        >>> machine = Machine(ranks=2, ranks_per_host=2, hbm=np.full(2, 9.0), ddr=np.full(2, 9.0))
        >>> whole = PlacementOption(where="any rank", count=1, ms=4.0, hbm=1, ddr=0)
        >>> halves = PlacementOption(where="any rank", count=2, ms=2.5, hbm=1, ddr=0)
        >>> choose(machine, [[whole, halves]]).ways
        (1,)
    """
    effort = effort or Effort()
    tables = len(ways) * max(machine.ranks // 256, 1)  # each takes so much longer to place
    placements = max(min(effort.placements, effort.placed_tables // tables), effort.starts)
    placed_starts = min(effort.placed_starts, placements // 3 + 1)
    effort = replace(effort, placements=placements, placed_starts=placed_starts)
    if _cannot_fit(machine, ways):
        effort = replace(effort, starts=1, placed_starts=1, placements=1)
    possible = [
        [number for number, way in enumerate(options) if _fits(machine, way)] or list(range(len(options)))
        for options in ways
    ]
    # More pieces than ranks rarely pay and crowd out other starts: first without them.
    few = [
        [number for number in numbers if _has_room(machine, options[number])]
        for numbers, options in zip(possible, ways, strict=True)
    ]
    if all(few) and few != possible:
        starts = (_search(machine, ways, effort, few).ways, *starts)
    return _search(machine, ways, effort, possible, starts)


def _search(
    machine: Machine,
    ways: Sequence[Sequence[PlacementOption]],
    effort: Effort,
    allowed: Sequence[Sequence[int]],
    starts: Iterable[tuple[int, ...]] = (),
) -> Choice:
    """Search among the allowed ways of each table, by their numbers."""
    kept = [[options[number] for number in numbers] for numbers, options in zip(allowed, ways, strict=True)]
    at = [{number: index for index, number in enumerate(numbers)} for numbers in allowed]
    given = [
        tuple(index[number] for index, number in zip(at, start, strict=True))
        for start in starts
        if all(number in index for index, number in zip(at, start, strict=True))
    ]
    found = _Search(machine, kept, effort).run(given)
    return replace(found, ways=tuple(numbers[way] for numbers, way in zip(allowed, found.ways, strict=True)))


def _fits(machine: Machine, way: PlacementOption) -> bool:
    """Whether a rank has the memory for a piece, if nothing else is there."""
    return bool(way.hbm <= machine.hbm.max() and way.ddr <= machine.ddr.max())


def _cannot_fit(machine: Machine, ways: Sequence[Sequence[PlacementOption]]) -> bool:
    """Whether a table has no piece that fits, or the least of all tables exceeds all memory."""
    hbm, ddr = (max(float(each.sum()), 1.0) for each in (machine.hbm, machine.ddr))
    total_hbm = total_ddr = total = 0.0  # shares of the GPU memory, of the host memory, and both
    for options in ways:
        if not any(_fits(machine, way) for way in options):
            return True
        shards = [way.count * machine.copies(way.where) for way in options]
        shares = [(way.hbm * count / hbm, way.ddr * count / ddr) for way, count in zip(options, shards, strict=True)]
        total_hbm += min(share for share, _ in shares)
        total_ddr += min(share for _, share in shares)
        total += min(map(sum, shares))
    return total_hbm > 1.0 or total_ddr > 1.0 or total > 2.0


def _has_room(machine: Machine, way: PlacementOption) -> bool:
    """Whether each piece can have a slot of its own."""
    return way.count <= {"every rank": 1, "any host": machine.hosts, "any rank": machine.ranks}[way.where]


@dataclass(frozen=True)
class _Search:
    machine: Machine
    ways: Sequence[Sequence[PlacementOption]]
    effort: Effort
    placed: dict[tuple[int, ...], Choice] = field(default_factory=dict)

    def run(self, given: Iterable[tuple[int, ...]] = ()) -> Choice:
        arrays = _Arrays.of(self.machine, self.ways)
        starts = sorted(
            dict.fromkeys(arrays.starts()), key=lambda start: (arrays.lack(start), arrays.bound(start), start)
        )
        placed = [self._place(start) for start in starts[: self.effort.placed_starts]]
        best = min(placed, key=lambda choice: (choice.short, choice.critical_path, choice.ways))
        rated = ((arrays.lack(start), arrays.bound(start), start) for start in dict.fromkeys(given))
        may_win = sorted(each for each in rated if best.short or (not each[0] and each[1] < best.critical_path))
        for count, (lack, bound, ways) in enumerate(may_win):
            if count >= self.effort.placed_starts if best.short else (lack or bound >= best.critical_path):
                break
            placed.append(self._place(ways))
            best = placed[-1] if placed[-1].better_than(best) else best
        placed.sort(key=lambda choice: (choice.short, choice.critical_path, choice.ways))
        best = placed[0]
        for start in placed[: self.effort.starts]:
            improved = self._improve(arrays, start)
            if improved.better_than(best):
                best = improved
        best = self._simplify(best)
        return replace(best, lacked_memory=self._lacked_memory(arrays, starts, best))

    def _lacked_memory(self, arrays: "_Arrays", starts: Iterable[tuple[int, ...]], best: Choice) -> bool:
        without_room = itertools.chain(
            (ways for ways in starts if arrays.lack(ways)), (each.ways for each in self.placed.values() if each.short)
        )
        if best.short or any(arrays.bound(ways) < best.critical_path * (1 - _SAME) for ways in without_room):
            return True
        endless = np.full(self.machine.ranks, 2.0**62)
        roomy = replace(self.machine, hbm=endless, ddr=endless)
        chosen = [options[number] for options, number in zip(self.ways, best.ways, strict=True)]
        return place(roomy, chosen, where=False).critical_path < best.critical_path * (1 - _SAME)

    def _place(self, ways: tuple[int, ...]) -> Choice:
        if ways not in self.placed:
            chosen = [options[number] for options, number in zip(self.ways, ways, strict=True)]
            found = place(self.machine, chosen, where=False)
            self.placed[ways] = Choice(ways=ways, critical_path=found.critical_path, short=found.short)
        return self.placed[ways]

    def _improve(self, arrays: "_Arrays", choice: Choice) -> Choice:
        """Change one table at a time as long as that helps, then two."""
        while len(self.placed) < self.effort.placements:
            better = self._first_better(arrays.moves(choice), choice)
            if better is None:
                better = self._first_better(self._pairs(arrays, choice), choice)
            if better is None:
                return choice
            choice = better
        return choice

    def _first_better(self, moves: Iterable[tuple[int, ...]], choice: Choice) -> Choice | None:
        for ways in moves:
            if len(self.placed) >= self.effort.placements:
                return None
            found = self._place(ways)
            if found.better_than(choice):
                return found
        return None

    def _pairs(self, arrays: "_Arrays", choice: Choice) -> Iterable[tuple[int, ...]]:
        """Make two of the best changes of one table at once: where pieces are few, one change leaves a gap."""
        single = [self._place(ways) for ways in itertools.islice(arrays.moves(choice), self.effort.single_moves)]
        single.sort(key=lambda move: (move.short, move.critical_path, move.ways))
        changes = [
            next(
                (table, new) for table, (old, new) in enumerate(zip(choice.ways, move.ways, strict=True)) if old != new
            )
            for move in single[: self.effort.paired_moves]
        ]
        for (one, way), (other, other_way) in itertools.combinations(changes, 2):
            if one != other:
                ways = list(choice.ways)
                ways[one], ways[other] = way, other_way
                yield tuple(ways)

    def _simplify(self, choice: Choice) -> Choice:
        """Take fewer shards wherever that costs the slowest rank nothing."""
        budget = len(self.placed) + self.effort.placements // 4
        for table, options in enumerate(self.ways):
            now = self.ways[table][choice.ways[table]]
            fewer = [
                (self._shards(way), number)
                for number, way in enumerate(options)
                if self._shards(way) < self._shards(now) and max(way.hbm, 1) <= 2 * max(now.hbm, 1)
            ]
            for _, number in sorted(fewer):
                if len(self.placed) >= budget:
                    return choice
                found = self._place((*choice.ways[:table], number, *choice.ways[table + 1 :]))
                if found.short <= choice.short and found.critical_path <= choice.critical_path * (1 + _SAME):
                    choice = found
                    break
        return choice

    def _shards(self, way: PlacementOption) -> int:
        return way.count * self.machine.copies(way.where)


@dataclass(frozen=True)
class _Arrays:
    """The ways as arrays [T, O], for bounds on many choices at once."""

    ms: Floats  # of a piece
    share: Floats  # added to the mean rank
    every: Floats  # added to every rank: ms or 0
    piece: Floats  # of a piece that does not lie on every rank: ms or 0
    memory: Floats  # share of all memory that tables may take
    lump: Floats  # the same of a single piece
    family: NDArray[np.int64]

    @classmethod
    def of(cls, machine: Machine, ways: Sequence[Sequence[PlacementOption]]) -> "_Arrays":
        most = max(len(options) for options in ways)
        shape = (len(ways), most)
        ms, share, every, piece, memory, lump = (np.full(shape, np.inf) for _ in range(6))
        family = np.full(shape, -1, np.int64)
        kinds: tuple[Where, ...] = _FAMILIES[0]
        capacities = (float(machine.hbm.sum()), float(machine.ddr.sum()))
        for table, options in enumerate(ways):
            for number, way in enumerate(options):
                at = (table, number)
                shards = way.count * machine.copies(way.where)
                ms[at] = way.ms
                share[at] = way.ms * shards / machine.ranks
                every[at] = way.ms if way.where == "every rank" else 0.0
                piece[at] = 0.0 if way.where == "every rank" else way.ms
                memory[at] = sum(
                    each * shards / capacity if capacity > 0 else (np.inf if each else 0.0)
                    for each, capacity in zip((way.hbm, way.ddr), capacities, strict=True)
                )
                lump[at] = memory[at] / shards
                family[at] = kinds.index(way.where)
        return cls(ms, share, every, piece, memory, lump, family)

    def starts(self) -> Iterable[tuple[int, ...]]:
        """For each bound on a piece's price, each family of ways and each price of memory: the least shares."""
        prices = _few_prices(self.piece[np.isfinite(self.piece)])
        scale = float(self.share[np.isfinite(self.share)].mean())
        memory = np.where(np.isfinite(self.memory), self.memory, 1e12)
        for kinds, lumps, multiplier in itertools.product(_FAMILIES, _LUMPS, _MULTIPLIERS):
            allowed = np.isin(self.family, [_FAMILIES[0].index(kind) for kind in kinds])
            lumpy = np.where(self.piece > 0, lumps, 1.0) * self.share
            price = lumpy + multiplier * scale * len(self.ms) * memory
            for bound in prices:
                usable = np.where(allowed & (self.piece <= bound * (1 + _SAME)), price, np.inf)
                # A table without a way below the bound takes the one that is least above it.
                rows = np.where(np.isfinite(usable).any(axis=1, keepdims=True), usable, self.ms)
                start = rows.argmin(axis=1)
                yield tuple(start.tolist())
                if lumps == 1.0 and multiplier == 0.0:
                    yield from self._fewer_everywhere(start, rows)

    def _fewer_everywhere(self, start: NDArray[np.int64], price: Floats) -> Iterable[tuple[int, ...]]:
        """A start with more and more of the tables on every rank, those first that lose the least by it."""
        replicated = np.where(self.family == 0, price, np.inf)
        cut = np.where(self.family > 0, price, np.inf)
        loss = replicated.min(axis=1) - cut.min(axis=1)
        order = [int(table) for table in np.argsort(loss, kind="stable") if np.isfinite(loss[table])]
        free = start.copy()
        free[order] = cut.argmin(axis=1)[order]
        step = max(len(order) // 32, 1)
        for count, table in enumerate(order):
            free[table] = replicated[table].argmin()
            if count % step == 0:
                yield tuple(free.tolist())

    def bound(self, ways: tuple[int, ...]) -> float:
        """The least that the slowest rank may take."""
        at = (np.arange(len(ways)), np.array(ways))
        return float(self._bound(self.every[at].sum(), self.share[at].sum(), self.piece[at].max()))

    def lack(self, ways: tuple[int, ...]) -> float:
        """How far the tables exceed all memory together, at least."""
        at = (np.arange(len(ways)), np.array(ways))
        return max(float(self.memory[at].sum()) - 1.0, 0.0)

    @staticmethod
    def _bound(every: Floats, share: Floats, piece: Floats) -> Floats:
        return np.maximum(share, every + piece)

    def moves(self, choice: Choice) -> Iterable[tuple[int, ...]]:
        """All choices that differ in one table and may be better, the most promising first."""
        tables = np.arange(len(choice.ways))
        now = np.array(choice.ways)
        at = (tables, now)
        largest = int(self.piece[at].argmax())
        others = np.full((len(tables), 1), self.piece[at][largest])
        others[largest] = np.delete(self.piece[at], largest).max(initial=0.0)
        every = self.every[at].sum() - self.every[at][:, None] + self.every
        share = self.share[at].sum() - self.share[at][:, None] + self.share
        bound = self._bound(every, share, np.maximum(others, self.piece))
        if choice.short:
            # Less memory in all, or the same in smaller pieces, which find gaps: by what it costs the mean rank.
            gain = np.maximum(self.memory[at][:, None] - self.memory, 0.0)
            gain += np.maximum(self.lump[at][:, None] - self.lump, 0.0)
            lighter = (gain > 0) & np.isfinite(self.share)
            bound = np.where(lighter, (share - self.share[at].sum()) / np.where(lighter, gain, 1.0), np.inf)
        else:
            bound = np.where(bound < choice.critical_path * (1 - _SAME), bound, np.inf)
        bound[at] = np.inf
        order = np.argsort(bound, axis=None, kind="stable")
        for flat in order:
            table, number = divmod(int(flat), bound.shape[1])
            if not np.isfinite(bound[table, number]):
                return
            yield (*choice.ways[:table], number, *choice.ways[table + 1 :])


def _few_prices(prices: Floats) -> Floats:
    """Distinct prices, at most 64: of those that are nearly equal the highest, since all of them are below it.

    Shards of uneven rows have a hundred prices that differ in the fourth digit; they must not crowd out the others.
    """
    found = np.unique(prices)
    scale = np.log(np.maximum(found, np.finfo(float).tiny))
    near = _SAME
    while True:
        highest = np.append(np.diff(np.floor(scale / near)) > 0, True)
        if highest.sum() <= _MOST_PRICES:
            few: Floats = found[highest]
            return few
        near *= 2

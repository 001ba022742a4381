"""Choosing a way for each table, on pieces with made-up prices."""

import random

import numpy as np
import pytest

from torchrec_deepfm.sharding.search.choice import choose
from torchrec_deepfm.sharding.search.placement import Machine, PlacementOption, place


@pytest.mark.parametrize("seed", [7, 23, 101, 4242])
def test_prices_that_hardly_differ_change_nothing(seed: int) -> None:
    """Rows that hosts do not divide give every table prices of its own, a ten-thousandth apart."""
    draw = random.Random(seed)
    rows = [10 ** min(1.5 + draw.paretovariate(1.1), 8.0) for _ in range(40)]
    everywhere = [0.002 + 8e-7 * each for each in rows]
    wide, narrow = draw.uniform(0.5, 0.7), draw.uniform(0.3, 0.35)
    uneven = [1 + 1e-4 * draw.random() for _ in everywhere]

    def ways(factors: list[float]) -> list[list[PlacementOption]]:
        return [
            [
                PlacementOption(where=where, count=count, ms=ms, hbm=0, ddr=0)
                for where, count, ms in (
                    ("every rank", 1, ms_everywhere),
                    ("any rank", 1, wide),
                    ("any rank", 2, narrow),
                    ("any host", 1, 0.145 * factor),
                    ("any host", 2, 0.0745 * factor),
                )
            ]
            for ms_everywhere, factor in zip(everywhere, factors, strict=True)
        ]

    memory = np.full(24, 1e9)
    machine = Machine(ranks=24, ranks_per_host=8, hbm=memory, ddr=memory)
    even = choose(machine, ways([1.0] * len(everywhere)))
    assert choose(machine, ways(uneven)).critical_path <= even.critical_path * (1 + 1e-4)


@pytest.mark.parametrize("seed", [5, 31, 77])
def test_pieces_larger_than_a_rank_lead_nowhere(seed: int) -> None:
    """Three tables with rows in host memory and caches of any size, as good as if only those that fit were offered."""
    draw = random.Random(seed)

    def ways(size: float, *, fit: bool) -> list[PlacementOption]:
        cached = [(count, share) for count in (1, 2, 4, 8) for share in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)]
        found = [
            PlacementOption(where="any rank", count=n, ms=1.4 * (1 + n / 100) / share, hbm=int(share * size / n), ddr=1)
            for n, share in cached
        ]
        return [way for way in found if way.hbm <= 700 or not fit]

    small = [PlacementOption(where="any rank", count=1, ms=1.0, hbm=150, ddr=0)]
    sizes = [draw.randint(18_000, 24_000) for _ in range(3)]
    machine = Machine(ranks=72, ranks_per_host=72, hbm=np.full(72, 700.0), ddr=np.full(72, 1e9))
    offered, fitting = ([ways(size, fit=fit) for size in sizes] + [small] * 37 for fit in (False, True))
    assert choose(machine, fitting).short == 0
    found = choose(machine, offered)
    assert found.short == 0
    assert found.critical_path <= choose(machine, fitting).critical_path * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_a_piece_lies_where_the_load_is_least_and_memory_is_left(seed: int) -> None:
    """Against the rule written down, over all ranks for each piece; what fits nowhere goes to the least load."""
    draw = random.Random(seed)
    ways = [
        PlacementOption(
            where="any rank", count=draw.randint(1, 9), ms=ms, hbm=draw.randint(1, 60), ddr=draw.randint(0, 3)
        )
        for ms in draw.sample(range(1, 99), 12)
    ]
    load, hbm, ddr, short = (
        [0.0] * 6,
        [draw.randint(150, 400) for _ in range(6)],
        [draw.randint(9, 30) for _ in range(6)],
        0,
    )
    machine = Machine(ranks=6, ranks_per_host=3, hbm=np.array(hbm, float), ddr=np.array(ddr, float))
    for way in sorted(ways, key=lambda way: -way.ms):
        for _ in range(way.count):
            with_room = [rank for rank in range(6) if way.hbm <= hbm[rank] and way.ddr <= ddr[rank]]
            short += 0 if with_room else way.hbm + way.ddr
            rank = min(with_room or range(6), key=lambda rank: load[rank])
            load[rank] += way.ms
            hbm[rank] -= way.hbm
            ddr[rank] -= way.ddr
    found = place(machine, ways)
    assert (found.ms.tolist(), found.short) == (load, short)

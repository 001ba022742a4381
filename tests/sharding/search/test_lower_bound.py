"""The lower bound and the search against the exact optimum, which integer programming finds (tests/support)."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.support.plans.exact import best_slowest_rank
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.search.choice import choose
from torchrec_deepfm.sharding.search.lower_bound import lower_bound
from torchrec_deepfm.sharding.search.placement import Machine, PlacementOption
from torchrec_deepfm.sharding.search.plan_tables import Planning


def drawn_ways(draw: random.Random, tables: int, hosts: int) -> list[list[PlacementOption]]:
    """Ways such as the estimates give them: more pieces cost more in sum; more pieces than ranks, too."""
    found = []
    for _ in range(tables):
        work = draw.uniform(1, 10)
        ways = [
            PlacementOption(where="any rank", count=n, ms=work / n + draw.uniform(0, 1), hbm=0, ddr=0)
            for n in draw.sample([1, 2, 3, 4, 8], 3)
        ]
        if hosts > 1:
            n = draw.randint(1, hosts + 1)
            ways.append(PlacementOption(where="any host", count=n, ms=work / n / 2 + 0.5, hbm=0, ddr=0))
        ways.append(PlacementOption(where="every rank", count=1, ms=draw.uniform(0.2, work), hbm=0, ddr=0))
        found.append(ways)
    return found


def test_nothing_is_below_the_bound_and_the_search_is_near_the_optimum() -> None:
    draw = random.Random(17)
    gaps = []
    for _ in range(200):
        ranks, per_host = draw.choice([(2, 2), (3, 3), (3, 1), (4, 2)])
        ways = drawn_ways(draw, draw.randint(2, 4), ranks // per_host)
        memory = np.full(ranks, 1e9)
        found = choose(Machine(ranks=ranks, ranks_per_host=per_host, hbm=memory, ddr=memory), ways)
        listed = [[(way.where, way.count, way.ms) for way in options] for options in ways]
        best = best_slowest_rank(ranks, per_host, listed, known=found.critical_path)
        assert lower_bound(ranks, per_host, ways) <= best * (1 + 1e-6)
        assert found.critical_path >= best * (1 - 1e-6)
        gaps.append(found.critical_path / best - 1)
    assert np.mean(np.array(gaps) < 1e-6) >= 0.85  # measured 0.895
    assert np.quantile(gaps, 0.9) <= 0.01  # measured 0.0005
    assert np.quantile(gaps, 0.95) <= 0.02  # measured 0.0198
    assert max(gaps) <= 0.1  # measured 0.078


@pytest.mark.parametrize(("ranks", "count", "dim"), [(3, 2, 128), (6, 7, 256), (12, 13, 256)])
def test_more_column_shards_than_ranks_fill_them_evenly(ranks: int, count: int, dim: int) -> None:
    """Where the bound of an earlier version, for at most a column shard per rank, was too high."""
    tables = [Table(name=f"t{n}", num_embeddings=10**6, embedding_dim=dim) for n in range(count)]
    hardware = replace(PRESETS["torchrec"], ranks_per_host=ranks)
    planning = Planning(tables, hardware, ranks, 8192)
    plan, bound = planning.plan(), planning.lower_bound_ms
    assert plan.predicted is not None
    assert bound * (1 - 1e-9) <= plan.predicted.critical_path_ms <= bound * 1.02
    torchrec = planning.plan("torchrec")
    assert torchrec.predicted is not None
    assert plan.predicted.critical_path_ms < torchrec.predicted.critical_path_ms * 0.95

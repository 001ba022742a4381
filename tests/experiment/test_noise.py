"""What keeps ranks steady while they are measured: cores, memory, garbage."""

import gc
import os
import resource
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import CPU, run_ranks
from torchrec_deepfm.experiment.noise import _core, reduce_noise, release_memory, share, without_garbage_collection

LINUX = sys.platform == "linux"
BLOCK = 12 * 2**20  # numbers: 48 MiB in float32, above the 32 MiB up to which glibc learns to keep blocks
ROUNDS = 20


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("ranks", range(1, 9))
def test_shares_are_even_and_apart(count: int, ranks: int) -> None:
    cores = [3 * core + 1 for core in range(count)]
    shares = [share(cores, number, ranks) for number in range(ranks)]
    times = Counter(core for one in shares for core in one)
    assert set(times) == set(cores)
    assert max(times.values()) - min(times.values()) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ranks > count or max(times.values()) == 1


def page_faults() -> int:
    """Pages that come from the system while a large block is taken and dropped a few times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(BLOCK)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def affinities() -> list[set[int]]:
    return [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]


def program(bound: bool) -> dict[str, object]:
    rank, all_cores = dist.get_rank(), sorted(os.sched_getaffinity(0))
    if bound:
        os.sched_setaffinity(0, {all_cores[rank % len(all_cores)]})
    found: dict[str, object] = {"cores": all_cores, "before": affinities()}
    reduce_noise(CPU)
    found["after"] = affinities()
    page_faults()  # the first block is new in any case
    kept = resident()
    found["faults"] = page_faults()
    release_memory()
    found["given_back"] = kept - resident()
    return found


@pytest.mark.skipif(not LINUX, reason="other systems bind no threads and have another malloc")
def test_ranks_share_the_cores_and_keep_their_memory() -> None:
    ranks = run_ranks(program, 2, False)
    for number, found in enumerate(ranks):
        assert all(one == set(share(sorted(found["cores"], key=_core), number, 2)) for one in found["after"])
        # Without it every round gets its 48 MiB from the system. With it none does, but for one whose block could not
        # lie where the last one was, as something small had come to lie there.
        assert found["faults"] < ROUNDS * BLOCK * 4 // os.sysconf("SC_PAGE_SIZE") // 2
        assert found["given_back"] > BLOCK * 4 / 2


@pytest.mark.skipif(not LINUX, reason="other systems bind no threads")
def test_ranks_that_somebody_bound_stay_where_they_are() -> None:
    ranks = run_ranks(program, 2, True)
    if len(ranks[0]["cores"]) == 1:
        pytest.skip("on a single core there is nothing to choose")
    assert all(found["after"] == found["before"] for found in ranks)


def test_no_garbage_is_collected_meanwhile() -> None:
    assert gc.isenabled()
    with without_garbage_collection():
        assert not gc.isenabled()
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()

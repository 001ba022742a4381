"""Whether freed memory is used again, counted in page faults by the kernel."""

import os
import subprocess
import sys

import pytest

KEEP = """
from torchrec_deepfm.distributed.cpu_memory import keep_freed_memory
keep_freed_memory()
"""
# A rank of ``prepare`` or ``predict``, whose memory is limited.
DATA_RANK = """
from torchrec_deepfm.cli.data_ranks import data_ranks
with data_ranks():
    pass
"""
# 20 times eight blocks of 10 MiB, as a step's activations; prints the page faults of the last 19.
STEPS = """
import resource
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    blocks = [np.ones(10 << 20, np.uint8) for _ in range(8)]
    del blocks
    if step == 0:
        before = faults()
print(faults() - before)
"""


PAGES_OF_A_STEP = 8 * (10 << 20) // os.sysconf("SC_PAGE_SIZE")


def page_faults(before: str, **environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", before + STEPS], env=clean | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_blocks_are_used_again_unless_the_user_has_set_malloc() -> None:
    assert page_faults(KEEP) < PAGES_OF_A_STEP  # in 19 steps together
    assert page_faults(KEEP, MALLOC_TRIM_THRESHOLD_="131072") > PAGES_OF_A_STEP


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_rank_that_reads_data_hands_freed_blocks_back() -> None:
    """Or it grows beyond ``--memory``: by 0.6 GiB after 40 million rows."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    assert page_faults(DATA_RANK, **alone) > PAGES_OF_A_STEP

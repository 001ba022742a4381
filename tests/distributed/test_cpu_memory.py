"""Whether freed memory is used again, counted in page faults by the kernel."""

import os
import subprocess
import sys

import pytest

# 20 times three blocks of 10 MiB, as a step's activations; prints the page faults of the last 19.
PROGRAM = """
import resource
import numpy as np
from torchrec_deepfm.distributed.cpu_memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    blocks = [np.ones(10 << 20, np.uint8) for _ in range(8)]
    del blocks
    if step == 0:
        before = faults()
print(faults() - before)
"""


def page_faults(**environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_blocks_are_used_again_unless_the_user_has_set_malloc() -> None:
    pages_of_a_step = 8 * (10 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert page_faults() < pages_of_a_step  # in 19 steps together
    assert page_faults(MALLOC_TRIM_THRESHOLD_="131072") > pages_of_a_step

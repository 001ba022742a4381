"""Whether large tensors have huge pages, as the kernel counts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A tensor of 64 MiB; prints how much of this process's memory is in huge pages.
TENSOR = """
import re
from pathlib import Path
from torchrec_deepfm.launch.huge_pages import use_huge_pages
use_huge_pages()
import torch
tensor = torch.ones(16 << 20)
print(re.search(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""


@pytest.mark.skipif(
    not THP.exists() or "[madvise]" not in THP.read_text(), reason="huge pages are not given to those who ask for them"
)
def test_a_large_tensor_has_huge_pages_unless_the_user_forbids_it() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}

    def huge_kib(**environment: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", TENSOR], env=clean | environment, capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert huge_kib() >= 60 << 10
    assert huge_kib(THP_MEM_ALLOC_ENABLE="0") < 30 << 10

"""Memory of a training on CPUs: huge pages for large tensors, and freed memory that is kept. Loads no torch."""

import ctypes
import os
from collections.abc import Mapping, MutableMapping

# Of mallopt(3), in bytes. glibc's own are at most 32 and 64 MiB, which the activations of a large batch exceed.
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 1 << 30
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -3, 256 << 20


def use_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch ask Linux for huge pages for tensors of 2 MiB and more, unless a user has set its variable.

    A look-up touches a page per row: in tables far larger than a processor's caches most of its time goes into finding
    the pages (docs/performance.md). torch reads the variable once, when it is loaded.

    Args:
        environment: where the variable is set.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Let glibc reuse freed blocks of up to 256 MiB.

    A training step frees tens of megabytes of activations, and takes as many in the next one. By default glibc returns
    them to the kernel, which zeroes each page when it is touched again: a fifth of a step in bfloat16 on a CPU
    (docs/performance.md). Does nothing where a user has set malloc's variables, or with another C library.

    Args:
        environment: where malloc's variables would be.
    """
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in environment
    ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)

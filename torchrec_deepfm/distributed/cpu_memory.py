"""Memory that the C library keeps for the next step instead of handing it back to the kernel. Loads no torch."""

import ctypes
import os

# Of mallopt(3), in bytes. glibc's own are at most 32 and 64 MiB, which the activations of a large batch exceed.
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 1 << 30
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -3, 256 << 20


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 256 MiB.

    A training step frees tens of megabytes of activations, and takes as many in the next one. By default glibc returns
    them to the kernel, which zeroes each page when it is touched again: a fifth of a step in bfloat16 on a CPU
    (docs/performance.md). Does nothing where a user has set malloc's variables, or with another C library.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)

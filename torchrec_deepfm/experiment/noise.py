"""Keeps CPU ranks steady while they are measured: cores of their own, and memory that stays with the process."""

import ctypes
import gc
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from torchrec_deepfm.distributed.process_group import gather

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 2**30


def reduce_noise(device: torch.device) -> None:
    """Take two sources of noise out of a CPU rank's times; a collective.

    - A rank that moves between cores finds cold caches, and meets the others' threads at random. All threads that it
      has and will have are bound to its share of the machine's cores; not where ranks of a machine may use different
      ones: somebody else has bound them already.
    - glibc gives large blocks back to the system and gets them again, page by page, in each step. Now it keeps them
      (``release_memory`` does not); other libraries for memory, and systems without glibc, stay as they are.

    Args:
        device: where the rank computes; nothing happens on a GPU.
    """
    if device.type != "cpu":
        return
    _pin()
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        # Both: with one of them alone the other threshold no longer grows by itself, which is worse than none.
        allocator.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        allocator.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def release_memory() -> None:
    """Return unused memory to the system, so that a peak measured from here on is not hidden by earlier use."""
    gc.collect()
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Let Python collect no garbage meanwhile, as ``timeit`` does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def share(cores: Sequence[int], number: int, ranks: int) -> list[int]:
    """Choose neighbouring cores for one of several ranks; with more ranks than cores, one core for several ranks."""
    if ranks >= len(cores):
        return [cores[number % len(cores)]]
    return list(cores[number * len(cores) // ranks : (number + 1) * len(cores) // ranks])


def _core(cpu: int) -> tuple[int, int]:
    """Sort the threads of a core side by side; Linux often numbers them apart."""
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
        return int(re.split("[,-]", siblings, maxsplit=1)[0]), cpu
    except (OSError, ValueError):  # not available here
        return cpu, cpu


def _pin() -> None:
    if not hasattr(os, "sched_setaffinity"):  # macOS has none
        return
    own = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    everyone: list[tuple[str, list[int]]] = gather(own)
    mates = [rank for rank, (host, _) in enumerate(everyone) if host == own[0]]
    if any(everyone[rank][1] != own[1] for rank in mates):
        return
    cores = share(sorted(own[1], key=_core), mates.index(dist.get_rank()), len(mates))
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # it has ended in the meantime
            continue

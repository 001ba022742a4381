"""Threads of the CPU kernels: how many, and how they wait for each other. Loads no torch.

OpenMP reads its environment once, when torch is loaded, so the choice is made before. Two of its defaults suit only an
idle machine that belongs to one process:

- As many threads as cores. A container with a quota of one core on a host of 64 then has 64 threads, which use up its
  time slice together and stop until the next one.
- Threads that wait at a barrier spin for milliseconds. On a machine with other work they burn the time that the thread
  they wait for needs. ``benchmarks/training/busy_machine.py`` measures it; docs/results.md has the figures.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

# Turns of libgomp's waiting loop before a thread sleeps; its default is 300,000 (some ten milliseconds).
SPIN_COUNT = 1000

_PROC, _SYS = Path("/proc"), Path("/sys")


def choose_threads(local_ranks: int = 1, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OpenMP's variables for this process and those that it starts, except those that a user has set.

    ``local_ranks`` processes share this host's cores.
    """
    by_hand = {name for name in environment if name.startswith("KMP_")}
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & environment.keys():
        # Rounded down: a thread more than there is time for makes all others wait.
        environment["OMP_NUM_THREADS"] = str(max(1, math.floor(usable_cores() / local_ranks)))
    if not by_hand and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def usable_cores() -> float:
    """Return how many cores this process may use: those it may run on, or what its control groups' quota leaves.

    Hardware threads of one core count once, as in MKL and therefore in torch: they share its arithmetic units.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    return min([len({_siblings(cpu) for cpu in os.sched_getaffinity(0)}), *_quotas()])


def _siblings(cpu: int) -> str:
    try:
        return (_SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quotas() -> Iterator[float]:
    """The quotas in cores of this process's control group and of all above it, of version 1 and 2."""
    for folder, mount in _groups():
        while True:
            quota = _quota(folder)
            if quota is not None:
                yield quota
            if folder in (mount, folder.parent):
                break
            folder = folder.parent


def _groups() -> Iterator[tuple[Path, Path]]:
    """The folders that hold this process's CPU quota, each with the mount point that it lies below."""
    try:
        paths = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (_PROC / "self/mountinfo").read_text().splitlines()]
    except OSError:  # not Linux, or no /proc
        return
    for _, controllers, path in paths:
        for mount in mounts:
            # mountinfo(5): ... root, mount point, options, [fields,] "-", type, source, options of the file system
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            if not controllers:
                found = kind == "cgroup2"
            else:
                found = kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options
            if found:
                root, point, group = PurePosixPath(mount[3]), Path(mount[4]), PurePosixPath(path)
                # In a container the path may be that of the host, and the mount's root the container's own group.
                yield point / (group.relative_to(root) if group.is_relative_to(root) else ""), point


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)

"""Runs one command on chosen cores and measures wall time, peak memory of its process tree and peak disk use.

Linux only: everything is read from /proc.

Memory is sampled ``HERTZ`` times per second and summed over the tree: RSS, which counts a page once per process and
includes mapped files, and its anonymous part, which a process has allocated. PSS (shared pages divided among their
users) requires a walk of the page tables, so it is sampled less often. A spike between two samples shows in
``largest``: the kernel keeps the peak of every process.
"""

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._lib import commands

HERTZ = 20
# PSS and the size of the folder are read at every tenth sample.
RARELY = 10
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(kw_only=True)
class ResourceUsage:
    """Time, memory and disk use of a command. Sizes are in bytes.

    ``seconds`` are on the clock. ``cpu`` is processor time in seconds, including children that a parent waited for;
    other work on the machine hardly changes it. ``rss``, ``anonymous`` and ``pss`` are peaks of sums over the tree,
    ``largest`` is the highest peak of a single process as recorded by the kernel, ``disk`` the peak size of the watched
    folder. ``over``: the command was killed because it exceeded the ceiling.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    rss: int = 0
    anonymous: int = 0
    pss: int = 0
    largest: int = 0
    disk: int = 0
    code: int = 0
    over: bool = False
    output: str = ""
    errors: str = ""

    @property
    def peak(self) -> int:
        """Peak memory: RSS of the tree, or of one process if sampling missed its spike."""
        return max(self.rss, self.largest)

    @property
    def last_error(self) -> str:
        """The last line on standard error, or the exit code if there is none."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.code}"


def measure(
    command: Sequence[object],
    *,
    cores: Iterable[int],
    environment: Mapping[str, str] | None = None,
    watch: Path | None = None,
    ceiling: int | None = None,
) -> ResourceUsage:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        cores: The cores that it and its children may use.
        environment: Variables in addition to those of this process.
        watch: Folder whose size is sampled.
        ceiling: Bytes of anonymous memory at which the command is killed.

    Returns:
        Its resource usage. A failure does not raise: check ``code``.
    """
    allowed = set(cores)
    found = ResourceUsage()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**commands.environment(len(allowed)), **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        ended = threading.Event()

        def wait() -> None:
            _, status, usage = os.wait4(process.pid, 0)
            found.seconds = time.perf_counter() - started
            found.cpu = usage.ru_utime + usage.ru_stime
            found.code = process.returncode = os.waitstatus_to_exitcode(status)
            # A forked process inherits this process's peak, so a lower one is meaningless.
            if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
                found.largest = max(found.largest, usage.ru_maxrss * 1024)
            ended.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        tree = _Tree(process.pid)
        sample = 0
        try:
            while not ended.is_set():
                tree.sample(found, thoroughly=sample % RARELY == 0)
                if watch is not None and sample % RARELY == 0:
                    found.disk = max(found.disk, disk_bytes(watch))
                if ceiling is not None and found.anonymous > ceiling:
                    found.over = True
                    break
                sample += 1
                ended.wait(1 / HERTZ)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with children that it may have left running
            waiter.join()
        if watch is not None:
            found.disk = max(found.disk, disk_bytes(watch))
        for file, name in ((output, "output"), (errors, "errors")):
            file.seek(0)
            setattr(found, name, file.read())
    return found


def disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder's files take on disk, without files that are unlinked but open."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118 (called often)
    return total


def pick_cores(count: int) -> tuple[int, ...]:
    """Return the first ``count`` cores that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise SystemExit(f"--cores: {count} is out of range; this process may use 1 to {len(allowed)}")
    return tuple(allowed[:count])


class _Tree:
    """A process and its descendants, including those whose parent has ended."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: set[tuple[int, str]] = set()  # process id and start time: ids are reused

    def members(self) -> list[int]:
        parents: dict[int, int] = {}
        found: set[int] = set()
        starts: dict[int, str] = {}
        for name in os.listdir("/proc"):  # noqa: PTH208 (20 times a second)
            if not name.isdigit():
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b") ")[2].split()
            except OSError:
                continue
            pid = int(name)
            parents[pid], starts[pid] = int(fields[1]), fields[19].decode()
            if pid == self._root or int(fields[3]) == self._root or (pid, starts[pid]) in self._seen:
                found.add(pid)
        grown = True
        while grown:
            children = {pid for pid, parent in parents.items() if parent in found} - found
            found |= children
            grown = bool(children)
        self._seen |= {(pid, starts[pid]) for pid in found}
        return sorted(found)

    def sample(self, into: ResourceUsage, *, thoroughly: bool) -> None:
        rss = anonymous = pss = 0
        for pid in self.members():
            with contextlib.suppress(OSError, IndexError, ValueError):  # it ended meanwhile
                _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
                rss += int(resident) * _PAGE
                anonymous += (int(resident) - int(shared)) * _PAGE
            into.largest = max(into.largest, _kib(f"/proc/{pid}/status", "VmHWM:"))
            if thoroughly:
                pss += _kib(f"/proc/{pid}/smaps_rollup", "Pss:")
        into.rss = max(into.rss, rss)
        into.anonymous = max(into.anonymous, anonymous)
        into.pss = max(into.pss, pss)


def _kib(path: str, key: str) -> int:
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0

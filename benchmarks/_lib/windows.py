"""Timed windows of work in several processes by turns, thrown away where something else used the machine.

A worker calls ``serve``: it prepares its work, then does it for as long as the controller says, and waits. The
controller's ``Worker`` starts it and asks for windows. Standard library only: workers run in environments of peers.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._lib.commands import ROOT, environment

FOREIGN = 0.05  # CPU seconds of anything else per second, above which a window is spoilt


def serve(step: Callable[[], int], about: dict[str, Any], wait: Callable[[], object] | None = None) -> None:
    """Answer a controller until it closes the pipe.

    Args:
        step: Does a piece of work and returns the samples in it.
        about: What the controller is to know, such as versions.
        wait: Waits for a GPU that still has work of the steps before it; None without one.
    """
    work = windows(about, wait)
    next(work)
    with contextlib.suppress(StopIteration):
        while True:
            work.send(step())


def windows(
    about: dict[str, Any],
    wait: Callable[[], object] | None = None,
    cpu: Callable[[], float] = time.process_time,
    warm_up: int = 3,
) -> Generator[None, int]:
    """Answer a controller from inside a loop of steps that is not ``serve``'s, until it closes the pipe.

    Args:
        about: As for ``serve``.
        wait: As for ``serve``.
        cpu: Returns the CPU seconds of the work so far.
        warm_up: Steps before the controller is answered.

    Yields:
        Nothing; do a step and send its samples. Between two windows ``send`` waits for the controller.
    """
    for _ in range(warm_up):  # compiles, among others
        yield
    if wait is not None:
        wait()
    _say(about)
    for line in sys.stdin:
        wanted = float(line)
        samples, used, start = 0, cpu(), time.perf_counter()
        while time.perf_counter() - start < wanted:
            samples += yield
        if wait is not None:
            wait()
        _say({"samples": samples, "seconds": time.perf_counter() - start, "cpu": cpu() - used})


def _say(what: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(what) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Window:
    """A window of work.

    Attributes:
        rate: Samples per second.
        cpu: CPU seconds of the worker per wall second.
        foreign: CPU seconds of everything else on the machine per wall second.
    """

    rate: float
    cpu: float
    foreign: float


class Worker:
    """A process that does its work in windows.

    Args:
        command: Its command line; the module in it calls ``serve``.
        threads: Size of its thread pools.
    """

    def __init__(self, command: list[str], threads: int) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(threads)
        )
        self.about = self._read()

    def window(self, seconds: float) -> Window:
        """Let the worker work for some seconds, and return what it did."""
        assert self._process.stdin is not None
        before = _busy_seconds()
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        found = self._read()
        others = _busy_seconds() - before - found["cpu"]
        wall = found["seconds"]
        return Window(found["samples"] / wall, found["cpu"] / wall, max(0.0, others) / wall)

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # peers print lines of their own
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self._process.args}: ended with exit code {self._process.wait()}; its output is above")


@dataclass(frozen=True)
class Turns:
    """What sides did by turns.

    Attributes:
        good: The windows that count, by side.
        spoilt: Those in which something else used the machine.
        noisy: Sides without enough good windows; the least spoilt ones count too.
    """

    good: dict[str, list[Window]]
    spoilt: dict[str, list[Window]]
    noisy: set[str]


def by_turns(sides: Mapping[str, Callable[[float], Window]], *, count: int, seconds: float, retries: int) -> Turns:
    """Let sides work one at a time until each has its good windows.

    Args:
        sides: Each works for some seconds.
        count: Good windows of each side.
        seconds: Length of a window.
        retries: How many spoilt windows of a side to repeat before the least spoilt ones count.
    """
    good: dict[str, list[Window]] = {name: [] for name in sides}
    spoilt: dict[str, list[Window]] = {name: [] for name in sides}
    while short := [name for name in sides if len(good[name]) < count]:
        for name in short:
            window = sides[name](seconds)
            (good if window.foreign <= FOREIGN else spoilt)[name].append(window)
            if window.foreign > FOREIGN:
                time.sleep(1)
        if all(len(spoilt[name]) > retries for name in short):
            break
    noisy = {name for name in sides if len(good[name]) < count}
    for name in noisy:
        least = sorted(spoilt[name], key=lambda window: window.foreign)
        good[name] += least[: count - len(good[name])]
    return Turns(good, spoilt, noisy)


def _busy_seconds() -> float:
    """Return the CPU seconds that the machine has worked since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

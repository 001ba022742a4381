"""Timed windows of work in several processes by turns, thrown away where something else used the machine.

A worker calls ``serve``: it prepares its work, then does it for as long as the controller says, and waits. The
controller's ``Worker`` starts it and asks for windows. Standard library only: workers run in environments of peers.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._lib.commands import ROOT, environment


def serve(step: Callable[[], int], about: dict[str, Any], wait: Callable[[], object] | None = None) -> None:
    """Answer a controller until it closes the pipe.

    Args:
        step: Does a piece of work and returns the samples in it.
        about: What the controller is to know, such as versions.
        wait: Waits for a GPU that still has work of the steps before it; None without one.
    """
    for _ in range(3):  # warms up, compiles
        step()
    if wait is not None:
        wait()
    _say(about)
    for line in sys.stdin:
        wanted = float(line)
        samples, cpu, start = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - start < wanted:
            samples += step()
        if wait is not None:
            wait()
        _say({"samples": samples, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu})


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


def _busy_seconds() -> float:
    """Return the CPU seconds that the machine has worked since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

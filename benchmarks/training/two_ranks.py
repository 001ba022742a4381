"""Two gloo ranks on a core each beside one rank on one core, and what is lost between them.

    python -m benchmarks.training.two_ranks
    python -m benchmarks.training.two_ranks --precision medium

All have the step and rows of ``speed.py`` and one thread, and work by turns: one rank; two that know nothing of each
other, which share only memory and cache; two ranks; two ranks without the all-reduce of the dense gradients.
"""

import os
import socket
import statistics
import subprocess
import threading
from dataclasses import dataclass
from typing import Literal

import tyro

from benchmarks._lib.commands import environment, module_command
from benchmarks._lib.formatting import markdown, spread
from benchmarks._lib.windows import Turns, Window, Worker, by_turns, cpu_seconds


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    precision: Literal["float32", "medium", "bf16"] = "bf16"
    """Of the matrix products."""
    rows: int = 1_000_000
    """Rows of all tables together."""
    batch_size: int = 4096
    """Samples per rank and step."""
    windows: int = 5
    """Good windows of each side."""
    seconds: float = 2.0
    """Length of a window."""
    retries: int = 10
    """How many spoilt windows of a side to repeat before the least spoilt ones count, marked."""


class Side:
    """Processes that work at the same time, a core each.

    Args:
        options: What they do.
        ranks: Process groups, each of the cores of its ranks.
        words: More options of the ranks.
    """

    def __init__(self, options: Options, groups: tuple[tuple[int, ...], ...], *words: str) -> None:
        self._others: list[subprocess.Popen[bytes]] = []
        self._workers: list[Worker] = []
        for cores in groups:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            for rank, core in reversed(list(enumerate(cores))):
                command = module_command(
                    "benchmarks.training.steps.step_ranks",
                    *("--core", core, "--precision", options.precision, "--rows", options.rows),
                    *("--batch-size", options.batch_size, *words),
                )
                variables = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}"]
                variables += [f"{name}RANK={rank}" for name in ("", "LOCAL_")]
                variables += [f"{name}WORLD_SIZE={len(cores)}" for name in ("", "LOCAL_")]
                command = ["env", *variables, *command]
                if rank:
                    self._others.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(1)))
                else:
                    self._workers.append(Worker(command, 1))
        self.about = self._workers[0].about

    def window(self, seconds: float) -> Window:
        """Let all work; the sum of their rates, the CPU time of the first, and that of everything else."""
        before = [cpu_seconds(process.pid) for process in self._others]
        found: list[Window] = []
        threads = [threading.Thread(target=lambda w=w: found.append(w.window(seconds))) for w in self._workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        others = sum(cpu_seconds(process.pid) for process in self._others) - sum(before)
        others += seconds * sum(one.cpu for one in found[1:])
        return Window(sum(one.rate for one in found), found[0].cpu, max(0.0, found[0].foreign - others / seconds))

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        for process in self._others:
            process.wait(timeout=60)


def main(options: Options) -> None:
    first, second = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    sides = {
        "one rank": Side(options, ((first,),)),
        "two without each other": Side(options, ((first,), (second,))),
        "two ranks": Side(options, ((first, second),)),
        "two ranks, no all-reduce": Side(options, ((first, second),), "--no-all-reduce"),
    }
    turns = by_turns(
        {name: side.window for name, side in sides.items()},
        count=options.windows,
        seconds=options.seconds,
        retries=options.retries,
    )
    for side in sides.values():
        side.close()
    print(report(options, turns, sides["two ranks"].about))


def report(options: Options, turns: Turns, about: dict[str, float]) -> str:
    """Lay out the rates, and where a step of two ranks spends what one rank does not."""
    good = turns.good
    rate = {name: statistics.median(one.rate for one in windows) for name, windows in good.items()}
    processes = {name: 1 if name == "one rank" else 2 for name in good}
    step = {name: 1e3 * processes[name] * options.batch_size / rate[name] for name in good}
    busy = {name: step[name] * statistics.median(one.cpu for one in windows) for name, windows in good.items()}
    lines = [
        [
            name + (" (spoilt windows)" if name in turns.noisy else ""),
            spread([one.rate for one in windows]),
            f"{rate[name] / rate['one rank']:.2f}",
            f"{step[name]:.1f}",
            f"{busy[name]:.1f}",
            len(turns.spoilt[name]),
        ]
        for name, windows in good.items()
    ]
    head = ["side", "samples/s", "of one rank", "ms per step", "CPU ms of the first core", "windows repeated"]
    one, pair, both, without = good
    waits = step[without] - busy[without] - (step[pair] - busy[pair])
    parts = {
        "a step of one rank": step[one],
        "memory and cache are shared": step[pair] - step[one],
        "all-to-all, CPU time": busy[without] - busy[pair],
        "waiting in it, imbalance": waits,
        "all-reduce": step[both] - step[without],
        "a step of two ranks": step[both],
    }
    shares = [[part, f"{ms:.1f}", f"{ms / step[both]:.1%}"] for part, ms in parts.items()]
    parts_table = markdown(["part", "ms", "share"], shares)
    alone = ", ".join(f"{name}: {value:.2f}" for name, value in about.items() if "alone" in name)
    what = f"{options.precision}, batch {options.batch_size} per rank, {options.rows:,} rows, one thread"
    return f"{what}\n{markdown(head, lines)}\n\n{parts_table}\n{alone}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

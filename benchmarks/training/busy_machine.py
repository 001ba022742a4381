"""Samples per second on CPUs beside other work, for several settings of the threads.

    python -m benchmarks.training.busy_machine                     # one process, beside 0, 2, 4 and 6 spinning
    python -m benchmarks.training.busy_machine --ranks 2
    python -m benchmarks.training.busy_machine --ways torch product 0 5000  # counts of GOMP_SPINCOUNT too

The step is that of ``speed.py``. ``torch`` is torch's default; with ``--ranks``, an equal share of the cores per
process. ``product`` is the choice of ``python -m torchrec_deepfm`` (``cpu_threads.py``); a number is the same with
another ``GOMP_SPINCOUNT``. Each setting has its own processes, which start once and then wait without using a core.
Settings alternate in windows of some seconds; medians over the rounds are printed. The fair share beside n spinning
processes is cores / (cores + n) of the idle machine's rate. To measure a quota, run it in a control group.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import tyro

from benchmarks.training.random_criteo import make_pipeline
from torchrec_deepfm.launch.cpu_threads import choose_threads, usable_cores

WARM_UP = 3  # steps


def worker(ranks: int, batch_size: int) -> None:
    """Train for the seconds on each line of standard input, and print samples per second."""
    from torchrec_deepfm import console

    console.quiet()
    import torch
    import torch.distributed as dist

    from torchrec_deepfm.distributed.process_group import process_group

    with process_group(cpu=True) as device:
        pipeline, batches = make_pipeline(device, lambda: "bf16", batch_size=batch_size)
        for _ in range(WARM_UP):
            pipeline.progress(batches)
        print(torch.get_num_threads(), flush=True)
        for line in sys.stdin:
            started, steps, stop = time.perf_counter(), 0, torch.zeros(1)
            while not stop:
                pipeline.progress(batches)
                steps += 1
                stop[0] = time.perf_counter() - started >= float(line)
                if ranks > 1:
                    dist.broadcast(stop, 0)
            print(steps * batch_size * ranks / (time.perf_counter() - started), flush=True)


def start(way: str, ranks: int, batch_size: int, port: int) -> list["subprocess.Popen[str]"]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if way != "torch":
        choose_threads(ranks, environment)
        if way != "product":
            environment["GOMP_SPINCOUNT"] = way
    elif ranks > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    found = []
    for rank in range(ranks):
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.training.busy_machine",
            "worker",
            str(ranks),
            str(batch_size),
        ]
        found.append(
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment))
        )
    return found


def measure(processes: list["subprocess.Popen[str]"], seconds: float) -> float:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return statistics.mean(float(answer(process)) for process in processes)


def answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "a worker failed; its error is above"
    return line


def main(
    ranks: int = 1,
    beside: tuple[int, ...] = (0, 2, 4, 6),
    ways: tuple[str, ...] = ("torch", "product"),
    seconds: float = 3.0,
    rounds: int = 3,
    batch_size: int = 4096,
    output: Path | None = None,
) -> None:
    """Measure and print the table.

    Args:
        ranks: Processes that train together.
        beside: Numbers of spinning processes.
        ways: torch, product, or a count of GOMP_SPINCOUNT.
        seconds: Length of a window.
        rounds: Windows per setting and number of spinning processes.
        batch_size: Samples per step over all ranks.
        output: JSON file of all windows.
    """
    with ExitStack() as stack:
        workers = {}
        for number, way in enumerate(ways):
            workers[way] = start(way, ranks, batch_size // ranks, 29_700 + number)
            for process in workers[way]:
                stack.callback(process.kill)
        threads = {way: answer(processes[0]).strip() for way, processes in workers.items()}
        for way in ways:
            for process in workers[way][1:]:
                answer(process)
        rates: dict[str, list[float]] = {}
        for count in beside:
            spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            try:
                for _ in range(rounds):
                    for way in ways:
                        rate = measure(workers[way], seconds)
                        rates.setdefault(f"{way} {count}", []).append(rate)
                        print(f"beside {count}: {way} {rate:,.0f}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            finally:
                for each in spinning:
                    each.kill()
                    each.wait()
    cores = usable_cores()
    print(f"{ranks} process(es), {cores:g} core(s), batch {batch_size}, bf16; {rounds} windows of {seconds:g} s each")
    print(f"| beside | {' | '.join(f'{way} ({threads[way]} threads)' for way in ways)} |")
    print("| --- " * (len(ways) + 1) + "|")
    for count in beside:
        cells = []
        for way in ways:
            rate = statistics.median(rates[f"{way} {count}"])
            share = rate / (
                max(statistics.median(rates[f"{other} {beside[0]}"]) for other in ways) * cores / (cores + count)
            )
            cells.append(f"{rate:,.0f} ({share:.0%})")
        print(f"| {count} | {' | '.join(cells)} |")
    if output is not None:
        output.write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(int(sys.argv[2]), int(sys.argv[3]))
    else:
        tyro.cli(main, description=__doc__)

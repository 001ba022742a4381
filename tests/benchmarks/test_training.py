"""The benchmarks of a training step, at tiny sizes."""

import os

from benchmarks._lib import windows
from benchmarks._lib.commands import module_command
from benchmarks._lib.windows import Turns, Window, Worker
from benchmarks.training import two_ranks
from tests.benchmarks.scripts import forked
from tests.support.ranks import run_module


def test_ema_cost() -> None:
    """In a process of its own: it sets the number of torch's threads and makes a process group."""
    words = ("--rows", "5200", "--batch-size", "8", "--repeats", "2", "--threads", "1")
    done = run_module(["benchmarks.training.ema_cost", *words], timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line.split("rows")[1].split()[:1] for line in done.stdout.splitlines()[1:]]
    assert lines == [["float32"], ["bf16"], ["update"]]


def test_the_train_command_works_in_windows() -> None:
    words = ("--rows", "5200", "--batch-size", "32")
    with forked(windows):
        worker = Worker(module_command("benchmarks.training.steps.step_command", *words), threads=1)
    found = [worker.window(0.1) for _ in range(2)]
    worker.close()
    assert all(window.rate > 0 for window in found)


def test_two_ranks_work_in_windows() -> None:
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    with forked(windows, two_ranks):
        side = two_ranks.Side(two_ranks.Options(rows=5200, batch_size=8), (tuple(cores),), "--no-all-reduce")
    window = side.window(0.1)
    side.close()
    assert window.rate > 0
    assert set(side.about) >= {"all-to-all alone, ms", "all-reduce alone, ms"}


def test_the_split_of_two_ranks_adds_up() -> None:
    """Steps of 100, 110, 140 and 130 ms, the last with 125 ms of CPU time: 15 ms more than without communication."""
    seconds = {"one rank": (0.1, 1.0), "two": (0.11, 1.0), "ranks": (0.14, 0.9), "no all-reduce": (0.13, 125 / 130)}
    good = {
        name: [Window((1 if name == "one rank" else 2) * 1000 / each, cpu, 0.0)]
        for name, (each, cpu) in seconds.items()
    }
    turns = Turns(good, {name: [] for name in good}, set())
    lines = two_ranks.report(two_ranks.Options(batch_size=1000), turns, {}).splitlines()
    parts = dict(line.strip("| ").split(" | ")[:2] for line in lines if line.endswith("% |"))
    assert [float(value) for value in parts.values()] == [100.0, 10.0, 15.0, 5.0, 10.0, 140.0]
    rates = [line.split(" | ")[2] for line in lines if line.startswith(("| one", "| two", "| ranks", "| no"))]
    assert rates == ["1.00", "1.82", "1.43", "1.54"]

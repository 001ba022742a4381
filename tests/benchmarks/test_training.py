"""The benchmarks of a training step, at tiny sizes."""

from tests.support.ranks import run_module


def test_ema_cost() -> None:
    """In a process of its own: it sets the number of torch's threads and makes a process group."""
    words = ("--rows", "5200", "--batch-size", "8", "--repeats", "2", "--threads", "1")
    done = run_module(["benchmarks.training.ema_cost", *words], timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line.split("rows")[1].split()[:1] for line in done.stdout.splitlines()[1:]]
    assert lines == [["float32"], ["bf16"], ["update"]]

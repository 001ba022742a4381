"""Cost of the moving average of the weights beside a training step, by the size of the tables.

    python -m benchmarks.training.ema_cost
    python -m benchmarks.training.ema_cost --rows 10000000 --device cuda

The model is that of ``random_criteo.py``. Steps of each precision and updates of the average alternate; printed are
medians, with the lowest and the highest.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from benchmarks._lib.formatting import spread
from benchmarks.training.random_criteo import build, random_batches, seconds, training_rank

WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    rows: tuple[int, ...] = (1_000_000, 10_000_000)
    """Rows of all tables together, one number for each measurement."""
    batch_size: int = 4096
    """Samples per step."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 15
    """Steps of each precision, and updates."""


def main(options: Options) -> None:
    with training_rank(options.device, options.threads) as device:
        import torch

        print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), batch {options.batch_size}")
        for rows in options.rows:
            measure(options, rows, device)


def measure(options: Options, rows: int, device: Any) -> None:
    """Measure and print one size of the tables."""
    from torchrec_deepfm.training.optim.ema import MovingAverage
    from torchrec_deepfm.training.scoring.evaluation import autocast

    model, optimizer, _ = build(rows, options.batch_size, device)
    average = MovingAverage(model, 0.99)
    batches = [batch.to(device) for batch in random_batches(4, options.batch_size, rows)]

    def step(precision: str, repeat: int) -> None:
        optimizer.zero_grad()
        with autocast(precision, device):
            loss, _ = model(batches[repeat % len(batches)])
        loss.backward()
        optimizer.step()

    works: dict[str, Callable[[int], None]] = {
        "float32 step": lambda repeat: step("float32", repeat),
        "bf16 step": lambda repeat: step("bf16", repeat),
        "update": lambda repeat: average.update(repeat + 1),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(options.repeats + WARM_UP):
        for name, work in works.items():
            taken = seconds(device, lambda: work(repeat))  # noqa: B023 (called at once)
            if repeat >= WARM_UP:
                times[name].append(1e3 * taken)
    update = statistics.median(times["update"])
    for name, values in times.items():
        share = update / statistics.median(values)
        shares = "" if name == "update" else f"  update {share:.1%} of it, every 16th step {share / 16:.1%}"
        print(f"{rows:>12,} rows  {name:<12} {spread(values, '.2f')} ms{shares}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""What the moving average of the weights costs beside a training step, by the size of the tables.

The step is the trainer's: DistributedModelParallel, row-wise Adagrad fused into the tables' backward pass, Adam for the
rest, 13 numeric and 26 categorical fields, factor_dim 15 (rows of 16 columns), MLP 400-400-400, random data in memory.

    python -m benchmarks.training.ema_cost
    python -m benchmarks.training.ema_cost --rows 10000000 --device cuda

Steps of each precision and updates of the average take turns; medians are printed, with the lowest and the highest.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro


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
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    from torchrec_deepfm import terminal

    terminal.quiet()
    import torch

    from torchrec_deepfm.training import ranks

    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), batch {options.batch_size}")
    with ranks.process_group() as device:
        for rows in options.rows:
            measure(options, rows, device)


def measure(options: Options, rows: int, device: "torch.device") -> None:  # noqa: F821
    """One size of the tables."""
    import torch
    from torchrec.datasets.utils import Batch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from torchrec_deepfm.training.averaging import MovingAverage
    from torchrec_deepfm.training.build import build_model
    from torchrec_deepfm.training.config import TrainConfig
    from torchrec_deepfm.training.evaluation import autocast
    from torchrec_deepfm.training.optimizers import make_optimizer

    config = TrainConfig(factor_dim=15, dropout=0.0, batch_size=options.batch_size)
    keys = [f"C{i}" for i in range(1, 27)]
    model = build_model(config, dict.fromkeys(keys, rows // len(keys)), 13, device).model
    optimizer, average = make_optimizer(model, config), MovingAverage(model, 0.99)
    count = len(keys) * options.batch_size
    batches = [
        Batch(
            dense_features=torch.rand(options.batch_size, 13),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys, torch.randint(rows // len(keys), (count,), dtype=torch.int32), torch.ones(count).int()
            ),
            labels=torch.randint(2, (options.batch_size,), dtype=torch.int32),
        ).to(device)
        for _ in range(4)
    ]

    def step(precision: str, batch: Batch) -> None:
        optimizer.zero_grad()
        with autocast(precision, device):
            loss, _ = model(batch)
        loss.backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {"float32 step": [], "bf16 step": [], "update": []}
    for repeat in range(options.repeats + 3):
        batch = batches[repeat % len(batches)]
        works: list[Callable[[], None]] = [
            lambda batch=batch: step("float32", batch),  # type: ignore[misc]
            lambda batch=batch: step("bf16", batch),  # type: ignore[misc]
            lambda repeat=repeat: average.update(repeat + 1),  # type: ignore[misc]
        ]
        for name, work in zip(seconds, works, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds[name].append(1e3 * (time.perf_counter() - started))
    update = statistics.median(seconds["update"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        shares = "" if name == "update" else f"  update {update / middle:.1%} of it, of 16 {update / 16 / middle:.1%}"
        print(f"{rows:>12,} rows  {name:<12} {middle:8.2f} ms ({min(values):.2f} to {max(values):.2f}){shares}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

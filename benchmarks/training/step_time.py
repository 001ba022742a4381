"""Samples per second of a training step, for each precision, alternating in one run.

    python -m benchmarks.training.step_time
    torchrun --standalone --nproc-per-node 2 -m benchmarks.training.step_time --threads 1 --batch-size 2048
    python -m benchmarks.training.step_time --device cuda

The step is the trainer's, through TrainPipelineSparseDist, with the model and the random data of ``random_criteo.py``.
Blocks of steps of each precision alternate; the medians over the blocks are printed, and written as JSON with
``--output``. CPU milliseconds are those of all threads of this process: with ``--threads 1`` they can be compared on a
machine with other load too. The last lines compare the FM term of float32 (sums in float64) with that of the others.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks._lib.formatting import versions, versions_line
from benchmarks.training.random_criteo import Precision, make_pipeline, seconds, training_rank

PRECISIONS: tuple[Precision, ...] = ("float32", "medium", "bf16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    batch_size: int = 4096
    """Samples per rank and step."""
    threads: int = 2
    """CPU threads of each rank."""
    rows: int = 1_000_000
    """Rows of all tables together."""
    factor_dim: int = 15
    """K."""
    dropout: float = 0.0
    """Dropout of the MLP; drawing the masks takes time too."""
    steps: int = 8
    """Steps of a block."""
    repeats: int = 7
    """Blocks of each precision."""
    fm_repeats: int = 50
    """Runs of the FM term alone, per precision."""
    output: Path | None = None
    """JSON file to write."""


def main(options: Options) -> None:
    with training_rank(options.device, options.threads) as device:
        import torch.distributed as dist

        rates, cpu = step_rates(options, device)
        fm = fm_milliseconds(options, device)
        if dist.get_rank() == 0:
            report(options, dist.get_world_size(), rates, cpu, fm)


def step_rates(options: Options, device: Any) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return samples per second over all ranks and CPU milliseconds of this rank per step, block by block."""
    import torch
    import torch.distributed as dist

    precision = PRECISIONS[0]
    pipeline, batches = make_pipeline(
        device,
        lambda: precision,
        rows=options.rows,
        batch_size=options.batch_size,
        factor_dim=options.factor_dim,
        dropout=options.dropout,
    )
    rates: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    cpu: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for repeat in range(options.repeats + 1):  # the first warms up
        for precision in PRECISIONS:  # the lambda reads it
            torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
            started = time.process_time()
            taken = seconds(device, lambda: [pipeline.progress(batches) for _ in range(options.steps)])
            if repeat:
                cpu[precision].append(1e3 * (time.process_time() - started) / options.steps)
                rates[precision].append(options.steps * options.batch_size * dist.get_world_size() / taken)
    assert pipeline._pipelined_modules, "the sparse arch is not pipelined"
    torch.set_float32_matmul_precision("highest")
    return rates, cpu


def fm_milliseconds(options: Options, device: Any) -> dict[str, list[float]]:
    """Time forward and backward of the FM term alone in both of its forms."""
    import torch

    from torchrec_deepfm import FactorizationMachine

    # As in the model: the factors are a view of the packed rows.
    rows = torch.randn(options.batch_size, 39, options.factor_dim + 1, device=device).mul_(0.1).requires_grad_()
    modes = {"float64": "highest", "float32": "medium"}
    fm = FactorizationMachine()
    milliseconds: dict[str, list[float]] = {name: [] for name in modes}
    for repeat in range(options.fm_repeats + 3):
        for name, mode in modes.items():
            torch.set_float32_matmul_precision(mode)
            rows.grad = None
            taken = seconds(device, lambda: fm(rows[:, :, : options.factor_dim]).sum().backward())
            if repeat >= 3:
                milliseconds[name].append(1e3 * taken)
    torch.set_float32_matmul_precision("highest")
    return milliseconds


def report(
    options: Options,
    world_size: int,
    rates: dict[str, list[float]],
    cpu: dict[str, list[float]],
    fm: dict[str, list[float]],
) -> None:
    """Print the medians, and write all figures as JSON."""
    print(versions_line(versions("torch", "torchrec")))
    print(
        f"{world_size} rank(s) x {options.threads} thread(s) on {options.device}, batch {options.batch_size} per rank, "
        f"factor_dim {options.factor_dim}, MLP 400-400-400, dropout {options.dropout}"
    )
    print(
        f"{'precision':<10} {'samples/s':>10} {'lowest':>10} {'highest':>10} {'ms per step':>11} {'CPU ms':>8} "
        f"{'x float32':>10}"
    )
    base = statistics.median(rates["float32"])
    for name, values in rates.items():
        middle = statistics.median(values)
        step = 1e3 * options.batch_size * world_size / middle
        print(
            f"{name:<10} {middle:>10,.0f} {min(values):>10,.0f} {max(values):>10,.0f} {step:>11.1f} "
            f"{statistics.median(cpu[name]):>8.1f} {middle / base:>10.2f}"
        )
    exact, short = statistics.median(fm["float64"]), statistics.median(fm["float32"])
    print(f"FM alone, forward and backward: {exact:.2f} ms in float64, {short:.2f} ms in float32")
    if options.output is not None:
        settings = {name: value for name, value in asdict(options).items() if name != "output"}
        found: dict[str, Any] = {
            "options": settings,
            "world_size": world_size,
            "samples_per_second": rates,
            "cpu_milliseconds": cpu,
        }
        found["fm_milliseconds"] = fm
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

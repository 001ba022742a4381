"""Samples per second of a training step, for each precision, interleaved in one run.

The step is the trainer's: DistributedModelParallel, row-wise Adagrad fused into the tables' backward pass, Adam for the
rest, TrainPipelineSparseDist. The data are random and lie in memory. The set-up is Criteo's: 13 numeric and 26
categorical fields, a million rows of tables, factor_dim 15 (rows of 16 columns), MLP 400-400-400.

    python -m benchmarks.training.step_time
    torchrun --standalone --nproc-per-node 2 -m benchmarks.training.step_time --threads 1 --batch-size 2048
    python -m benchmarks.training.step_time --device cuda

Blocks of steps of each precision take turns; the medians over the blocks are printed, and written as JSON with
``--output``. The last lines compare the FM term in float64, as it is, with the same term in float32.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

Precision = Literal["float32", "medium", "bf16"]
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
    """Dropout of the MLP; drawing the masks costs time too."""
    steps: int = 8
    """Steps of a block."""
    repeats: int = 7
    """Blocks of each precision."""
    fm_repeats: int = 50
    """Runs of the FM term alone, per precision."""
    output: Path | None = None
    """JSON file to write."""


def main(options: Options) -> None:
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    from torchrec_deepfm import terminal

    terminal.quiet()
    import torch
    import torch.distributed as dist

    from torchrec_deepfm.training import ranks

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here")
    torch.set_num_threads(options.threads)
    with ranks.process_group() as device:
        rates = step_rates(options, device)
        fm = fm_milliseconds(options, device)
        if ranks.is_main():
            report(options, dist.get_world_size(), rates, fm)


def make_pipeline(
    options: Options,
    device: "torch.device",  # noqa: F821
    precision: Callable[[], Precision],
) -> tuple["TrainPipelineSparseDist", Iterator["Batch"]]:  # noqa: F821
    """The trainer's step, and random batches without end."""
    import torch
    import torch.distributed as dist
    from torchrec.datasets.utils import Batch
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from torchrec_deepfm.training.build import build_model
    from torchrec_deepfm.training.config import TrainConfig
    from torchrec_deepfm.training.evaluation import autocast
    from torchrec_deepfm.training.optimizers import make_optimizer

    config = TrainConfig(factor_dim=options.factor_dim, dropout=options.dropout, batch_size=options.batch_size)
    keys = [f"C{i}" for i in range(1, 27)]
    num_embeddings = dict.fromkeys(keys, options.rows // len(keys))
    model = build_model(config, num_embeddings, 13, device).model
    torch.manual_seed(dist.get_rank())

    def batch() -> Batch:
        made = Batch(
            dense_features=torch.rand(options.batch_size, 13),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys,
                torch.randint(options.rows // len(keys), (len(keys) * options.batch_size,), dtype=torch.int32),
                torch.ones(len(keys) * options.batch_size, dtype=torch.int32),
            ),
            labels=torch.randint(2, (options.batch_size,), dtype=torch.int32),
        )
        return made.pin_memory() if device.type == "cuda" else made

    kept = [batch() for _ in range(16)]

    def forward(data: Batch) -> object:
        with autocast(precision(), device):
            return model(data)

    def endless() -> Iterator[Batch]:
        while True:
            yield from kept

    return TrainPipelineSparseDist(model, make_optimizer(model, config), device, custom_model_fwd=forward), endless()


def step_rates(options: Options, device: "torch.device") -> dict[str, list[float]]:  # noqa: F821
    """Samples per second over all ranks, block by block."""
    import torch
    import torch.distributed as dist

    precision = PRECISIONS[0]
    pipeline, batches = make_pipeline(options, device, lambda: precision)
    rates: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for repeat in range(options.repeats + 1):  # the first warms up
        for precision in PRECISIONS:  # forward reads it
            torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
            seconds = timed(device, lambda: [pipeline.progress(batches) for _ in range(options.steps)])
            if repeat:
                rates[precision].append(options.steps * options.batch_size * dist.get_world_size() / seconds)
    assert pipeline._pipelined_modules, "the sparse arch is not pipelined"
    torch.set_float32_matmul_precision("highest")
    return rates


def fm_milliseconds(options: Options, device: "torch.device") -> dict[str, list[float]]:  # noqa: F821
    """Forward and backward of the FM term alone, as it is and in float32."""
    import torch
    from torch import Tensor

    from torchrec_deepfm import FactorizationMachine

    def float32(factors: Tensor) -> Tensor:
        total = factors.sum(dim=1)
        return 0.5 * ((total * total).sum(dim=1) - (factors * factors).sum(dim=(1, 2))).unsqueeze(1)

    # As in the model: the factors are a view of the packed rows.
    rows = torch.randn(options.batch_size, 39, options.factor_dim + 1, device=device).mul_(0.1).requires_grad_()
    runs: dict[str, Callable[[Tensor], Tensor]] = {"float64": FactorizationMachine(), "float32": float32}
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.fm_repeats + 3):
        for name, run in runs.items():
            rows.grad = None
            seconds = timed(device, lambda: run(rows[:, :, : options.factor_dim]).sum().backward())  # noqa: B023
            if repeat >= 3:
                milliseconds[name].append(1e3 * seconds)
    return milliseconds


def timed(device: "torch.device", work: Callable[[], object]) -> float:  # noqa: F821
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def report(options: Options, world_size: int, rates: dict[str, list[float]], fm: dict[str, list[float]]) -> None:
    import torch
    import torchrec

    print(f"torch {torch.__version__}, torchrec {torchrec.__version__}, Python {platform.python_version()}")
    print(
        f"{world_size} rank(s) x {options.threads} thread(s) on {options.device}, batch {options.batch_size} a rank, "
        f"factor_dim {options.factor_dim}, MLP 400-400-400, dropout {options.dropout}"
    )
    print(f"{'precision':<10} {'samples/s':>10} {'lowest':>10} {'highest':>10} {'ms a step':>10} {'x float32':>10}")
    base = statistics.median(rates["float32"])
    for name, values in rates.items():
        middle = statistics.median(values)
        step = 1e3 * options.batch_size * world_size / middle
        print(
            f"{name:<10} {middle:>10,.0f} {min(values):>10,.0f} {max(values):>10,.0f} {step:>10.1f} "
            f"{middle / base:>10.2f}"
        )
    exact, short = statistics.median(fm["float64"]), statistics.median(fm["float32"])
    print(f"FM alone, forward and backward: {exact:.2f} ms in float64, {short:.2f} ms in float32")
    for name, values in rates.items():
        step = 1e3 * options.batch_size * world_size / statistics.median(values)
        print(f"  of a {name} step: {exact / step:.1%}; float32 would save {(exact - short) / step:.1%}")
    if options.output is not None:
        settings = {name: value for name, value in asdict(options).items() if name != "output"}
        found = {"options": settings, "world_size": world_size, "samples_per_second": rates, "fm_milliseconds": fm}
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""FBGEMM's look-up and update of one table on the machine at hand, fitted, beside TorchRec's model of them.

    python -m benchmarks.planner.kernels                   # on one core of the CPU, 3 minutes
    python -m benchmarks.planner.kernels --device cuda

Each kernel is a table of rows x width, a batch, ids per bag, and ids that are uniform or skewed (the n-th row as
likely as 1 / n). The look-up is the forward pass, the update the backward pass with row-wise Adagrad inside. Each
repetition has ids of its own. On a CPU one thread works, and its CPU time counts, which other processes disturb less
than the clock. A quarter of the kernels, drawn at random, is held out of both fits:

- ours: a sum of what a kernel does (``FEATURES``), each with a cost of zero or more, by least squares of relative
  errors;
- TorchRec's: its estimate, with its own bandwidth, and with the bandwidth that suits the fitted kernels best. Its
  formula knows neither rows nor skew, and has constants: rows below 32 columns cost as 32; shards below 64 columns
  1.75 times, below 128 1.15 times; the update twice the look-up.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from torchrec_deepfm import console

console.quiet()

import torch  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from benchmarks._lib.formatting import markdown, versions, versions_line  # noqa: E402
from benchmarks.training.floors import make_tables  # noqa: E402
from torchrec_deepfm.sharding.estimate import predict_plan  # noqa: E402
from torchrec_deepfm.sharding.inputs.presets import PRESETS  # noqa: E402
from torchrec_deepfm.sharding.inputs.tables import Table  # noqa: E402
from torchrec_deepfm.sharding.plan.plan import PlanFile, PlannedShard, PlannedTable  # noqa: E402

Floats = NDArray[np.float64]
WORK: Final = ("look-up", "update")
FEATURES: Final = {
    "call": "us per call",
    "bag": "ns per bag",
    "id": "ns per id",
    "row": "ns per distinct row",
    "id byte": "ns per KiB of looked-up rows",
    "row byte": "ns per KiB of distinct rows",
    "bag byte": "ns per KiB of pooled rows",
}
"""What the fit charges, and the unit in which it is printed."""
PULL_2365: Final = {16: 0.588, 32: 0.723, 64: 1.294, 128: 2.735}
"""ms by width in torchrec#2365: SplitTBE on a GPU, 16 tables of 100,000 rows, batch 131,072, 10 ids per bag."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    rows: tuple[int, ...] = (10_000, 1_000_000)
    """Rows of a table."""
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Columns."""
    pooling: tuple[int, ...] = (1, 5, 20)
    """Ids per bag."""
    batch_sizes: tuple[int, ...] = (1024, 8192)
    """Bags of a batch."""
    repetitions: int = 5
    """Runs of each kernel, after one that warms up; the median counts."""
    seed: int = 0
    """Of ids, and of the choice of what is held out."""
    output: Path | None = None
    """File for the measured times, a line of JSON per kernel."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel and its times.

    Attributes:
        distinct: Distinct rows among the ids of a batch, mean of the repetitions.
        ms: Milliseconds of each kind of ``WORK``.
    """

    rows: int
    width: int
    pooling: int
    batch_size: int
    skewed: bool
    distinct: float
    ms: Mapping[str, float] = field(default_factory=dict)

    def amounts(self) -> list[float]:
        """How much it has of each of ``FEATURES``, so that a cost of 1 is the unit printed."""
        ids, kib = self.batch_size * self.pooling, self.width * 4 / 1024
        amounts = [self.batch_size, ids, self.distinct, ids * kib, self.distinct * kib, self.batch_size * kib]
        return [1e-3, *(amount * 1e-6 for amount in amounts)]


def draw_ids(kernel: Kernel, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the ids of a batch."""
    uniform = rng.random(kernel.batch_size * kernel.pooling)
    ids = (kernel.rows + 1) ** uniform - 1 if kernel.skewed else kernel.rows * uniform
    return np.minimum(ids.astype(np.int64), kernel.rows - 1)


def measure(options: Options) -> Iterator[Kernel]:
    """Measure every kernel; those of a table share it."""
    rng = np.random.default_rng(options.seed)
    device = torch.device(options.device)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    for rows, width in itertools.product(options.rows, options.widths):
        table = make_tables(rows, width, options.device, count=1)
        for pooling, batch_size, skewed in itertools.product(options.pooling, options.batch_sizes, (False, True)):
            kernel = Kernel(rows=rows, width=width, pooling=pooling, batch_size=batch_size, skewed=skewed, distinct=0.0)
            offsets = torch.arange(batch_size + 1, device=device) * pooling
            gradient = torch.randn(batch_size, width, device=device)
            distinct, times = [], []
            for _ in range(options.repetitions + 1):
                ids = draw_ids(kernel, rng)
                distinct.append(len(np.unique(ids)))
                pooled: list[torch.Tensor] = []
                on_device = torch.from_numpy(ids).to(device)
                look_up = _seconds(device, clock, lambda: pooled.append(table(on_device, offsets)))  # noqa: B023 (called here)
                times.append((look_up, _seconds(device, clock, lambda: pooled[0].backward(gradient))))  # noqa: B023
            ms = {
                name: statistics.median(each) * 1e3
                for name, each in zip(WORK, zip(*times[1:], strict=True), strict=True)
            }
            yield replace(kernel, distinct=statistics.fmean(distinct[1:]), ms=ms)


def _seconds(device: torch.device, clock: Callable[[], float], work: Callable[[], object]) -> float:
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def fit(kernels: Sequence[Kernel], work: str) -> Floats:
    """Return the cost of each of ``FEATURES`` that suits the times of the kernels best.

    Least squares of relative errors: a kernel of 10 us counts as much as one of 10 ms.
    """
    ms = np.array([kernel.ms[work] for kernel in kernels])
    return np.asarray(nnls(amounts(kernels) / ms[:, None], np.ones(len(ms)))[0])


def amounts(kernels: Sequence[Kernel]) -> Floats:
    """``Kernel.amounts`` of all [kernels, features]."""
    return np.array([kernel.amounts() for kernel in kernels])


def torchrecs_ms(kernel: Kernel, device: str) -> dict[str, float]:
    """TorchRec's estimate for the table on one rank, at its default bandwidth."""
    hardware = replace(PRESETS["torchrec"], compute_device=device, ranks_per_host=1)
    table = Table(
        name="t", num_embeddings=kernel.rows, embedding_dim=kernel.width, pooling_factor=float(kernel.pooling)
    )
    whole = PlannedTable(
        name="t",
        num_embeddings=kernel.rows,
        embedding_dim=kernel.width,
        sharding_type="table_wise",
        compute_kernel="fused",
        shards=(PlannedShard(rank=0, offsets=(0, 0), sizes=(kernel.rows, kernel.width)),),
    )
    plan = PlanFile(world_size=1, local_world_size=1, batch_size=kernel.batch_size, search="by hand", tables=(whole,))
    cost = predict_plan(plan, [table], hardware).per_rank[0]
    return dict(zip(WORK, (cost.fwd_compute_ms, cost.bwd_compute_ms), strict=True))


def best_scale(predicted: Floats, ms: Floats) -> float:
    """Return the factor on predictions with the least squares of relative errors."""
    ratio = predicted / ms
    return float(ratio.sum() / (ratio**2).sum())


def by_width(kernels: Sequence[Kernel], ms: Sequence[float] | Floats) -> dict[int, float]:
    """Times by width as a share of those 128 wide: the median over kernels that differ in nothing else."""
    at: dict[tuple[object, ...], dict[int, float]] = {}
    for kernel, each in zip(kernels, ms, strict=True):
        others = (kernel.rows, kernel.pooling, kernel.batch_size, kernel.skewed)
        at.setdefault(others, {})[kernel.width] = float(each)
    widths = sorted({kernel.width for kernel in kernels})
    return {width: statistics.median(each[width] / each[128] for each in at.values()) for width in widths}


def report(kernels: Sequence[Kernel], options: Options) -> dict[str, dict[str, Floats]]:
    """Fit and print; returns the relative errors of the held-out kernels, by work and by who predicts."""
    held = np.zeros(len(kernels), bool)
    held[np.random.default_rng(options.seed).permutation(len(kernels))[: len(kernels) // 4]] = True
    fitted = [kernel for kernel, out in zip(kernels, held, strict=True) if not out]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "one core of the CPU"
    print(f"{len(kernels)} kernels on {name}; {held.sum()} held out")
    theirs = [torchrecs_ms(kernel, options.device) for kernel in kernels]
    costs, errors, shares = [], {}, []
    for work in WORK:
        ms = np.array([kernel.ms[work] for kernel in kernels])
        cost = fit(fitted, work)
        torchrecs = np.array([each[work] for each in theirs])
        scale = best_scale(torchrecs[~held], ms[~held])
        predicted = {
            "fitted": amounts(kernels) @ cost,
            "TorchRec, its bandwidth": torchrecs,
            "TorchRec, bandwidth fitted": torchrecs * scale,
        }
        costs.append(cost)
        errors[work] = {name: np.abs(each / ms - 1)[held] for name, each in predicted.items()}
        for name, each in {"measured": ms, "fitted": predicted["fitted"], "TorchRec": torchrecs}.items():
            shares.append((f"{work}, {name}", by_width(kernels, each) if 128 in options.widths else {}))
        print(f"{work}: {ms.min():.3f} to {ms.max():.2f} ms; TorchRec's bandwidth fitted is {1 / scale:.4f} of its own")
    print(
        "\n"
        + markdown(
            ["cost", *WORK], [(what, *(f"{cost[n]:.3g}" for cost in costs)) for n, what in enumerate(FEATURES.values())]
        )
    )
    rows = [
        (work, name, *(f"{each:.0%}" for each in (np.median(found), found.mean(), found.max())))
        for work in WORK
        for name, found in errors[work].items()
    ]
    print("\n" + markdown(["error of held-out kernels", "by", "median", "mean", "most"], rows))
    most = max(kernel.batch_size * kernel.pooling for kernel in kernels)
    large = [kernel for kernel in kernels if kernel.batch_size * kernel.pooling == most]
    for work in WORK if 128 in options.widths else ():
        ms = [kernel.ms[work] for kernel in large]
        shares.append((f"{work}, measured, {most:,} ids", by_width(large, ms)))
    shares.append(("look-up, torchrec#2365", {width: ms / PULL_2365[128] for width, ms in PULL_2365.items()}))
    rows = [
        (name, *(f"{share[width]:.2f}" if width in share else "" for width in options.widths)) for name, share in shares
    ]
    print("\n" + markdown(["time by width, of 128", *options.widths], rows))
    ratio = statistics.median(each.ms["update"] / each.ms["look-up"] for each in kernels)
    print(f"\nupdate : look-up, median {ratio:.2f} (TorchRec: 2)")
    print(f"skewed : uniform, median {_ratio(kernels, 'skewed')}")
    print(f"{max(options.rows):,} : {min(options.rows):,} rows, median {_ratio(kernels, 'rows')} (TorchRec: 1)")
    print(versions_line(versions("torch", "torchrec", "numpy")))
    return errors


def _ratio(kernels: Sequence[Kernel], what: str) -> str:
    """The times of kernels with the most of something over those with the least, all else equal."""
    at: dict[tuple[Any, ...], list[Kernel]] = {}
    for kernel in kernels:
        at.setdefault(tuple(v for k, v in asdict(kernel).items() if k not in (what, "distinct", "ms")), []).append(
            kernel
        )
    found = []
    for work in WORK:
        ordered = [sorted(each, key=lambda kernel: getattr(kernel, what)) for each in at.values()]
        found.append(f"{work} {statistics.median(each[-1].ms[work] / each[0].ms[work] for each in ordered):.2f}")
    return ", ".join(found)


def main(options: Options) -> None:
    """Measure, fit and print."""
    kernels = list(measure(options))
    if options.output is not None:
        options.output.write_text("".join(f"{json.dumps(asdict(each))}\n" for each in kernels), encoding="utf-8")
    report(kernels, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
    sys.exit(0)

"""Samples per second of a training step or a forward pass, beside DLRM, bare FBGEMM, plain PyTorch and peers, by turns.

    python -m benchmarks.training.speed
    python -m benchmarks.training.speed --work forward --batch-size 8192
    python -m benchmarks.training.speed --rows 10_000_000 --sides bf16 bare-bf16
    python -m benchmarks.training.speed --device cuda

Every side is a process with the same rows in memory (``criteo_rows.py``); one works at a time, in windows. Windows in
which anything else used more than a twentieth of a core are repeated. Printed are each side's median and ratio; how
fast it moves the bytes of the tables, beside the memory's rate, and multiplies, beside the matrix products alone; and
those floors themselves (``floors.py``). DLRM has DeepFM's width and hidden layers.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks._lib.commands import module_command
from benchmarks._lib.formatting import markdown, spread, versions_line
from benchmarks._lib.peer_environments import peer_python
from benchmarks._lib.windows import Turns, Worker, by_turns
from benchmarks.training import floors

SIDES = {
    "bf16": ("step_ours", "bf16"),
    "medium": ("step_ours", "medium"),
    "float32": ("step_ours", "float32"),
    "compiled-bf16": ("step_compiled", "bf16"),
    "compiled-medium": ("step_compiled", "medium"),
    "command-bf16": ("step_command", "bf16"),
    "command-medium": ("step_command", "medium"),
    "command-float32": ("step_command", "float32"),
    "bare-bf16": ("step_bare", "bf16"),
    "bare-medium": ("step_bare", "medium"),
    "dlrm-float32": ("step_dlrm", "float32"),
    "dlrm-bf16": ("step_dlrm", "bf16"),
    "plain-float32": ("step_plain", "float32"),
    "plain-bf16": ("step_plain", "bf16"),
    "deepctr": ("step_deepctr", "float32"),
    "fuxictr": ("step_fuxictr", "float32"),
}
PEER = {"step_deepctr": "deepctr", "step_fuxictr": "fuxictr-models"}
CPU_SIDES = ("bf16", "medium", "float32", "bare-bf16", "bare-medium", "deepctr", "fuxictr")
CUDA_SIDES = ("bf16", "float32", "bare-bf16", "dlrm-bf16", "plain-bf16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    work: Literal["train", "forward"] = "train"
    """A whole training step, or the forward pass of inference."""
    sides: tuple[str, ...] = ()
    """Which sides, the first as the reference. Default: the peers and this DeepFM; on cuda this one, bare FBGEMM, DLRM
    and plain PyTorch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; the peers run on the CPU only."""
    rows: int | None = None
    """Rows of all tables together. Default: a million; on cuda 20 million, so that no cache holds them."""
    batch_size: tuple[int, ...] = ()
    """Samples per step, each measured. Default: 4096; on cuda 4096 16384 65536 131072."""
    factor_dim: tuple[int, ...] = ()
    """K, each measured. Default: 15; on cuda 15 127."""
    threads: int = 2
    """CPU threads of a side."""
    windows: int = 5
    """Good windows of each side."""
    seconds: float = 2.0
    """Length of a window."""
    retries: int = 20
    """How many spoilt windows of a side to repeat before the least spoilt ones count, marked."""
    output: Path | None = None
    """JSON file to write."""


def main(options: Options) -> None:
    """Measure each width and batch size."""
    cuda = options.device == "cuda"
    sides = options.sides or (CUDA_SIDES if cuda else CPU_SIDES)
    sizes = options.batch_size or ((4096, 16384, 65536, 131072) if cuda else (4096,))
    found = []
    for factor_dim, batch_size in itertools.product(options.factor_dim or ((15, 127) if cuda else (15,)), sizes):
        case = floors.Case(
            device=options.device,
            rows=options.rows or (20_000_000 if cuda else 1_000_000),
            batch_size=batch_size,
            factor_dim=factor_dim,
            train=options.work == "train",
        )
        found.append(measure(case, sides, options))
    if options.output is not None:
        options.output.write_text(
            json.dumps({"options": asdict(replace(options, output=None)), "cases": found}, indent=2) + "\n",
            encoding="utf-8",
        )


def measure(case: floors.Case, sides: Sequence[str], options: Options) -> dict[str, Any]:
    """Start the sides, let them work by turns, and print what they did; return it too."""
    workers = {name: start(name, case, options) for name in sides}
    turns = by_turns(
        {name: worker.window for name, worker in workers.items()},
        count=options.windows,
        seconds=options.seconds,
        retries=options.retries,
    )
    for worker in workers.values():
        worker.close()
    import torch

    torch.set_num_threads(options.threads)
    floor = floors.measure(case)
    print(versions_line({name: version for worker in workers.values() for name, version in worker.about.items()}))
    print(report(case, options, turns, floor))
    return {
        "case": asdict(case),
        "about": {name: worker.about for name, worker in workers.items()},
        "floors": floor,
        "windows": {name: [asdict(one) for one in windows] for name, windows in turns.good.items()},
        "spoilt": {name: [asdict(one) for one in windows] for name, windows in turns.spoilt.items()},
    }


def start(name: str, case: floors.Case, options: Options) -> Worker:
    """Start a side; its environment is installed where it is missing."""
    module, precision = SIDES[name]
    python = peer_python(PEER[module]) if module in PEER else sys.executable
    words = {
        "work": options.work,
        "precision": precision,
        "rows": case.rows,
        "batch-size": case.batch_size,
        "factor-dim": case.factor_dim,
        "device": case.device,
    }
    flags = [word for key, value in words.items() for word in (f"--{key}", value)]
    return Worker(module_command(f"benchmarks.training.steps.{module}", *flags, python=python), options.threads)


def report(
    case: floors.Case,
    options: Options,
    turns: Turns,
    floor: Mapping[str, float],
) -> str:
    """Lay out the table of the sides, and the floors under it."""
    good = turns.good
    first = next(iter(good))
    reference = statistics.median(window.rate for window in good[first])
    memory = floor.get("memory, GB/s", floor["copy, GB/s"])
    lines = []
    for name, windows in good.items():
        rates = [window.rate for window in windows]
        middle = statistics.median(rates)
        module, precision = SIDES[name]
        multiplied = middle * case.flops(dlrm=module == "step_dlrm") / 1e12
        products = floor[f"products in {'bf16' if precision == 'bf16' else 'float32'}, TFLOP/s"]
        moved = middle * case.table_bytes / 1e9
        lines.append(
            [
                name + (" (spoilt windows)" if name in turns.noisy else ""),
                spread(rates),
                f"{reference / middle:.2f}",
                f"{statistics.median(1e3 * case.batch_size * one.cpu / one.rate for one in windows):.1f}",
                f"{multiplied:.3g} ({multiplied / products:.0%})",
                f"{moved:.3g} ({moved / memory:.0%})",
                len(turns.spoilt[name]),
            ]
        )
    head = [
        "side",
        "samples/s",
        f"{first} / side",
        "CPU ms per step",
        "TFLOP/s (of products alone)",
        f"GB/s of the tables (of the memory's {memory:,.0f})",
        "windows repeated",
    ]
    about = (
        f"{options.work}, batch {case.batch_size}, {case.rows:,} rows, K {case.factor_dim}, MLP 400-400-400, "
        f"{options.threads} threads, {case.device}"
    )
    marks = ", ".join(
        f"{which} {floor[f'tables {which}, GB/s'] / memory:.0%} (FBGEMM's own mark on a GPU: {mark})"
        for which, mark in floors.MARKS.items()
    )
    alone = ", ".join(f"{name}: {value:,.4g}" for name, value in floor.items())
    return f"{about}\n{markdown(head, lines)}\n{alone}\ntables alone, of the memory: {marks}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Samples per second of a training step or a forward pass, beside bare FBGEMM, DeepCTR-Torch and FuxiCTR, by turns.

    python -m benchmarks.training.speed
    python -m benchmarks.training.speed --work forward --batch-size 8192
    python -m benchmarks.training.speed --rows 10_000_000 --sides bf16 bare-bf16
    python -m benchmarks.training.speed --device cuda --sides bf16 bare-bf16 --batch-size 65536

Every side is a process with the same rows in memory (``criteo_rows.py``); one works at a time, in windows. Windows in
which anything else used more than a twentieth of a core are repeated. Printed are each side's median and ratio, and the
floors: the rate of the MLP's matrix products alone, and that of copying memory.
"""

import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks._lib.commands import module_command
from benchmarks._lib.formatting import markdown, spread, versions_line
from benchmarks._lib.peer_environments import peer_python
from benchmarks._lib.windows import Window, Worker
from benchmarks.training.criteo_rows import CATEGORICAL, HIDDEN, NUMERIC
from benchmarks.training.random_criteo import seconds

SIDES = {
    "bf16": ("step_ours", "bf16"),
    "medium": ("step_ours", "medium"),
    "float32": ("step_ours", "float32"),
    "bare-bf16": ("step_bare", "bf16"),
    "bare-medium": ("step_bare", "medium"),
    "deepctr": ("step_deepctr", "float32"),
    "fuxictr": ("step_fuxictr", "float32"),
}
PEER = {"step_deepctr": "deepctr", "step_fuxictr": "fuxictr-models"}
FOREIGN = 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    work: Literal["train", "forward"] = "train"
    """A whole training step, or the forward pass of inference."""
    sides: tuple[str, ...] = tuple(SIDES)
    """Which sides, the first as the reference."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; the peers run on the CPU only."""
    rows: int = 1_000_000
    """Rows of all tables together."""
    batch_size: int = 4096
    """Samples per step."""
    factor_dim: int = 15
    """K."""
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
    """Start the sides, let them work by turns, and print what they did."""
    workers = {name: start(name, options) for name in options.sides}
    good: dict[str, list[Window]] = {name: [] for name in workers}
    spoilt: dict[str, list[Window]] = {name: [] for name in workers}
    while short := [name for name in workers if len(good[name]) < options.windows]:
        for name in short:
            window = workers[name].window(options.seconds)
            (good if window.foreign <= FOREIGN else spoilt)[name].append(window)
            if window.foreign > FOREIGN:
                time.sleep(1)
        if all(len(spoilt[name]) > options.retries for name in short):
            break
    for worker in workers.values():
        worker.close()
    noisy = {name for name in workers if len(good[name]) < options.windows}
    for name in noisy:
        least = sorted(spoilt[name], key=lambda window: window.foreign)
        good[name] += least[: options.windows - len(good[name])]
    report(options, {name: worker.about for name, worker in workers.items()}, good, spoilt, noisy, floors(options))


def start(name: str, options: Options) -> Worker:
    """Start a side; its environment is installed where it is missing."""
    module, precision = SIDES[name]
    python = peer_python(PEER[module]) if module in PEER else sys.executable
    words = {
        "work": options.work,
        "precision": precision,
        "rows": options.rows,
        "batch-size": options.batch_size,
        "factor-dim": options.factor_dim,
        "device": options.device,
    }
    flags = [word for key, value in words.items() for word in (f"--{key}", value)]
    return Worker(module_command(f"benchmarks.training.{module}", *flags, python=python), options.threads)


def floors(options: Options) -> dict[str, float]:
    """Measure the rates that bound a step: matrix products of the MLP's shapes, and copies of memory.

    Returns:
        Samples per second of the products alone, by precision, and GB/s of a copy (read and written bytes).
    """
    import torch

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sizes = ((NUMERIC + CATEGORICAL) * options.factor_dim, *HIDDEN)
    found = {}
    for precision, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        layers = [
            (torch.randn(options.batch_size, n).to(options.device, kind), torch.randn(n, m).to(options.device, kind))
            for n, m in itertools.pairwise(sizes)
        ]
        products = 3 if options.work == "train" else 1  # backward: the gradients of input and weight
        best = min(seconds(device, lambda: [a @ b for a, b in layers]) for _ in range(20))  # noqa: B023
        found[f"products in {precision}, samples/s"] = options.batch_size / (products * best)
    source = torch.empty(64 << 20, device=options.device)
    target = torch.empty_like(source)
    best = min(seconds(device, lambda: target.copy_(source)) for _ in range(10))
    found["copy, GB/s"] = 2 * source.nbytes / best / 1e9
    return found


def report(
    options: Options,
    about: dict[str, dict[str, Any]],
    good: dict[str, list[Window]],
    spoilt: dict[str, list[Window]],
    noisy: set[str],
    floor: dict[str, float],
) -> None:
    """Print the table, and write all windows as JSON."""
    merged = {package: version for one in about.values() for package, version in one.items()}
    print(versions_line(merged))
    print(
        f"{options.work}, batch {options.batch_size}, {options.rows:,} rows, K {options.factor_dim}, MLP 400-400-400, "
        f"{options.threads} threads, {options.device}"
    )
    reference = statistics.median(window.rate for window in good[options.sides[0]])
    lines = []
    for name, windows in good.items():
        rates = [window.rate for window in windows]
        middle = statistics.median(rates)
        products = floor["products in bf16, samples/s" if "bf16" in name else "products in float32, samples/s"]
        mark = " (spoilt windows)" if name in noisy else ""
        lines.append(
            [
                name + mark,
                spread(rates),
                f"{reference / middle:.2f}",
                f"{statistics.median(1e3 * options.batch_size * one.cpu / one.rate for one in windows):.1f}",
                f"{middle / products:.0%}",
                len(spoilt[name]),
            ]
        )
    head = [
        "side",
        "samples/s",
        f"{options.sides[0]} / side",
        "CPU ms per step",
        "of products alone",
        "windows repeated",
    ]
    print(markdown(head, lines))
    print(", ".join(f"{name}: {value:,.0f}" for name, value in floor.items()))
    if options.output is not None:
        found = {
            "options": asdict(replace(options, output=None)),
            "about": about,
            "floors": floor,
            "windows": {name: [asdict(one) for one in windows] for name, windows in good.items()},
            "spoilt": {name: [asdict(one) for one in windows] for name, windows in spoilt.items()},
        }
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

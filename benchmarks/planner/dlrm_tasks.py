"""Sharding tasks of tables like those of the public DLRM data sets: the balanced search against TorchRec's planner.

    python -m benchmarks.planner.dlrm_tasks --data fbgemm_t856_bs65536.pt   # the file of dlrm_datasets/embedding_bag
    python -m benchmarks.planner.dlrm_tasks                                 # one of the same form, drawn here

As in NeuroShard (arXiv 2305.01868), a task is 10 to 60 of the tables, of a width of 4 to 128 each, whose weights take
at most 15 GB, for 4 GPUs. Both plans are rated by TorchRec's estimators with every term.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from torchrec_deepfm import console

console.quiet()

from torchrec_deepfm.errors import UserError  # noqa: E402
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware  # noqa: E402
from torchrec_deepfm.sharding.inputs.tables import Table, read_tables  # noqa: E402
from torchrec_deepfm.sharding.search.plan_tables import plan_tables  # noqa: E402

WIDTHS = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to plan."""

    data: Path | None = None
    """A .pt file of ids, offsets and lengths, or a JSON file of DreamShard or NeuroShard. Default: one is drawn."""
    tasks: int = 100
    """How many tasks."""
    smallest: int = 10
    """Tables of a task at least."""
    largest: int = 60
    """Tables of a task at most."""
    gigabytes: float = 15.0
    """Weights of a task at most."""
    ranks: int = 4
    """GPUs of one host."""
    batch_size: int = 65536
    """Samples of all ranks together."""
    hardware: str = "torchrec"
    """A preset or a TOML file."""
    seed: int = 0
    """Seed of the tasks, and of the drawn tables."""


def draw_data(path: Path, *, tables: int = 200, samples: int = 512, seed: int = 0) -> None:
    """Write a file of the form of dlrm_datasets: rows and bag lengths are log-normal, ids of a bag are Zipf-like.

    Args:
        path: the file.
        tables: T.
        samples: B, bags per table.
        seed: seed of all draws.
    """
    rng = np.random.default_rng(seed)
    rows = np.clip(rng.lognormal(11.0, 2.5, tables), 1, 2e7).astype(np.int64)
    means = rng.lognormal(1.0, 1.3, tables).clip(0.0, 200.0) * (rng.random(tables) > 0.05)  # some have no ids at all
    lengths = rng.poisson(means[:, None], (tables, samples))
    ids = [
        (rows[number] * rng.random(int(count)) ** 4).astype(np.int64)
        for number, count in enumerate(lengths.sum(axis=1))
    ]
    offsets = np.concatenate([[0], lengths.ravel().cumsum()])
    torch.save((torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets), torch.from_numpy(lengths)), path)


def draw_task(tables: tuple[Table, ...], options: Options, rng: np.random.Generator) -> list[Table]:
    """Draw the tables of a task, until they are small enough."""
    while True:
        count = int(rng.integers(options.smallest, options.largest + 1))
        chosen = [
            replace(tables[number], name=f"t{position}", embedding_dim=int(rng.choice(WIDTHS)))
            for position, number in enumerate(rng.integers(len(tables), size=count))
        ]
        if sum(table.gib for table in chosen) * 2**30 <= options.gigabytes * 1e9:
            return chosen


def main(options: Options) -> None:
    """Plan every task by both searches and print how they compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.data or Path(folder) / "drawn.pt"
        if options.data is None:
            draw_data(path, seed=options.seed)
        tables = read_tables(str(path))
    hardware = replace(read_hardware(options.hardware), ranks_per_host=options.ranks)
    rng = np.random.default_rng(options.seed)
    ratios, unplanned = [], 0
    for number in range(options.tasks):
        task = draw_task(tables, options, rng)
        found = {}
        for search in ("balanced", "torchrec"):
            try:
                plan = plan_tables(
                    task, hardware, options.ranks, batch_size=options.batch_size // options.ranks, search=search
                )
                assert plan.predicted is not None
                found[search] = plan.predicted.critical_path_ms
            except UserError as error:
                print(f"task {number}, {search}: {error}", flush=True)
        if len(found) == 2:
            ratios.append(found["torchrec"] / found["balanced"])
        else:
            unplanned += 1
    worse = sum(ratio < 1 - 1e-9 for ratio in ratios)
    source = "drawn" if options.data is None else str(options.data)
    print(f"{len(tables)} tables ({source}), {options.tasks} tasks of {options.smallest} to {options.largest} on "
          f"{options.ranks} ranks of {hardware.name}")  # fmt: skip
    if ratios:
        print(f"torchrec : balanced, ms per step: least {min(ratios):.3f}, median {statistics.median(ratios):.3f}, "
              f"most {max(ratios):.3f}")  # fmt: skip
    print(f"balanced worse in {worse} of {len(ratios)}; without a plan by one of them: {unplanned}")
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(str(error))

"""How long a checkpoint delays training: saved in the background, against saved synchronously.

    python -m benchmarks.training.checkpoint_stall --output FOLDER
    python -m benchmarks.training.checkpoint_stall --output FOLDER --rows 8000000

Every few steps the state is saved, alternately with and without waiting for the disk. The stall is the time that a save
takes between two steps. The first background save is listed separately, because it also allocates the memory of the
copy. The model is that of ``random_criteo.py``.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._lib.formatting import spread
from benchmarks.training.random_criteo import build, random_batches, training_rank

STEPS_BETWEEN, SAVES = 10, 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    output: Path
    """Folder on the disk to measure; the checkpoints in it are removed at the end."""
    rows: int = 4_000_000
    """Rows of all tables together."""
    batch_size: int = 2048
    """Samples per step."""
    threads: int = 2
    """CPU threads."""


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    with training_rank("cpu", options.threads) as device, tempfile.TemporaryDirectory(dir=options.output) as folder:
        measure(options, device, Path(folder))


def measure(options: Options, device: object, folder: Path) -> None:
    """Train, save and print."""
    from torchrec_deepfm.training.checkpoint.manager import Checkpoints
    from torchrec_deepfm.training.checkpoint.tensors import TrainingTensors

    model, optimizer, config = build(options.rows, options.batch_size, device)
    tensors = TrainingTensors(model, optimizer, config.sparse_optimizer)
    pool = random_batches(4, options.batch_size, options.rows, ids_per_field=2)
    checkpoints = Checkpoints(str(folder), keep_last=2)
    number = 0

    def steps() -> float:
        nonlocal number
        started = time.perf_counter()
        for _ in range(STEPS_BETWEEN):
            optimizer.zero_grad()
            loss, _ = model(pool[number % len(pool)])
            loss.backward()
            optimizer.step()
            number += 1
        return (time.perf_counter() - started) / STEPS_BETWEEN

    def save(*, wait: bool) -> float:
        started = time.perf_counter()
        checkpoints.save(number, tensors.to_save(), {"columns": tensors.columns})
        if wait:
            checkpoints.wait()
        return time.perf_counter() - started

    steps()
    undisturbed, stalls, beside, waits = [], [], [], []
    for _ in range(SAVES + 1):
        undisturbed.append(steps())
        stalls.append(save(wait=False))
        beside.append(steps())
        checkpoints.wait()
        undisturbed.append(steps())
        waits.append(save(wait=True))
    size = sum(path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file())
    print(f"{size / len(checkpoints.store.steps()) / 1e6:.0f} MB per checkpoint")

    def line(name: str, seconds: list[float]) -> None:
        print(f"{name:<36} {spread([1e3 * one for one in seconds], '.1f')} ms")

    line("step, no save", undisturbed)
    line("step during a background save", beside)
    line("synchronous save", waits[1:])
    line("stall of a background save", stalls[1:])
    line("  the first background save", stalls[:1])
    print(f"stall / synchronous save {statistics.median(stalls[1:]) / statistics.median(waits[1:]):.1%}")
    checkpoints.close()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The whole ``train`` command in ``speed.py``: loader, checks, metrics, progress and checkpoints around its steps.

    python -m benchmarks.training.steps.step_command --precision bf16

It trains on shuffled rows of ``criteo_rows.py``, written as day files, and saves a checkpoint every 128 steps.
``speed.py`` starts it and says when to work.
"""

import signal
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._lib.windows import windows
from benchmarks.training.criteo_rows import HIDDEN, arguments, draw
from torchrec_deepfm.launch.cpu_threads import choose_threads
from torchrec_deepfm.launch.huge_pages import use_huge_pages

BATCHES = 256
CHECKPOINT_EVERY = 128


def write_days(folder: Path, rows: int, batch_size: int) -> None:
    """Write a day to train on and one to validate on, as TorchRec's ``tsv_to_npys`` would."""
    drawn = draw(rows, batch_size, BATCHES + 2)
    for day, part in enumerate((slice(None, BATCHES), slice(BATCHES, None))):
        dense, ids, labels = (np.concatenate(each[part]) for each in (drawn.dense, drawn.ids, drawn.labels))
        np.save(folder / f"day_{day}_dense.npy", dense)
        np.save(folder / f"day_{day}_sparse.npy", ids.astype(np.int32))
        np.save(folder / f"day_{day}_labels.npy", labels.astype(np.int32)[:, None])


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="step_command") as name:
        folder = Path(name)
        write_days(folder, options.rows, options.batch_size)
        choose_threads()  # as ``python -m torchrec_deepfm`` does
        use_huge_pages()
        from torchrec_deepfm.cli.main import main as command
        from torchrec_deepfm.training.monitoring.step_profile import StepProfiler

        work = windows({"torchrec": version("torchrec")})
        next(work)

        def after_step(profiler: StepProfiler) -> None:
            try:
                work.send(options.batch_size)
            except StopIteration:  # the controller has all it wants
                signal.raise_signal(signal.SIGTERM)

        StepProfiler.after_step = after_step  # type: ignore[method-assign]
        given: dict[str, Any] = {
            "data": folder,
            "output": folder / "run",
            "recipe": "paper",
            "factor-dim": options.factor_dim,
            "over-arch-layer-sizes": " ".join(map(str, HIDDEN)),
            "dropout": 0,
            "epochs": 1000,
            "batch-size": options.batch_size,
            "precision": options.precision,
            "checkpoint-every": CHECKPOINT_EVERY,
        }
        command(["train", *(word for key, value in given.items() for word in (f"--{key}", *str(value).split()))])


if __name__ == "__main__":
    main()

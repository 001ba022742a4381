"""Peak memory of ``predict`` over Criteo text of 1 and of 20 million rows: it must not grow with the rows.

    python -m benchmarks.inference.predict_memory

A synthetic log of 39 fields, a small model (factor_dim 3, MLP 16), and files that repeat the log. 5 GB of disk.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    millions: tuple[int, ...] = (1, 20)
    """Rows of each file, in millions."""


def main(options: Options) -> None:
    """Print a line per file."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        log, prepared, run = folder / "raw" / "day_0.tsv", folder / "prepared", folder / "run"
        _command("synthetic", "--output", str(log.parent), "--rows", "50000")
        _command("prepare", "--input", str(log), "--output", str(prepared), "--split", "none", "--min-count", "3")
        _command("train", "--data", str(prepared), "--output", str(run), "--recipe", "synthetic", "--epochs", "1",
                 "--factor-dim", "3", "--over-arch-layer-sizes", "16")  # fmt: skip
        text = log.read_bytes()
        times = 1_000_000 // text.count(b"\n")
        for millions in options.millions:
            rows = folder / "rows.tsv"
            with rows.open("wb") as file:
                for _ in range(millions * times):
                    file.write(text)
            start = time.monotonic()
            peak = _command(
                "predict", "--run", str(run), "--input", str(rows), "--output", str(folder / f"{millions}.parquet")
            )
            size = rows.stat().st_size / 1e9
            seconds = time.monotonic() - start
            print(f"{millions} million rows, {size:.2f} GB: peak {peak / 2**20:,.0f} MiB, {seconds:.0f} s", flush=True)
            rows.unlink()


def _command(*words: str) -> int:
    """Run a command; return the peak of its resident memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "torchrec_deepfm", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words[0]} failed")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main(tyro.cli(Options))

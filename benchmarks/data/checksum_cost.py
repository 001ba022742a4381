"""What the checksums of blocks cost the loader, and a training step.

    python -m benchmarks.data.checksum_cost
    python -m benchmarks.data.checksum_cost --epochs 3

Days of Criteo's shape with random values, in the page cache. Passes with and without comparing take turns in one
process; each has a new loader, which compares every block in its first epoch. The last line is the processor's time
for the comparison alone, as a share of the time that a training takes per sample.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.data import loader_speed
from torchrec_deepfm import console


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    rows: int = 4_000_000
    """Training rows."""
    days: int = 24
    """Training days."""
    batch_size: int = 4096
    """Samples of a batch."""
    repeats: int = 9
    """Passes of each kind."""
    epochs: int = 1
    """Epochs of a pass."""
    threads: int = 2
    """CPU threads."""
    training_rate: float = 87_519.0
    """Samples/s of a training on this machine."""


def add_checksums(folder: Path) -> None:
    """Give a folder without lists the checksums that ``prepare`` would have written."""
    import numpy as np

    from torchrec_deepfm.data.dataset.checksums import CHECKSUMS, HASH, stem_borders
    from torchrec_deepfm.data.dataset.prepared import MANIFEST, PreparedData, read_manifest, stem_files
    from torchrec_deepfm.data.dataset.publish import digest, digest_parts, find_parts
    from torchrec_deepfm.data.loader.epoch_order import BLOCK_ROWS
    from torchrec_deepfm.files import seal

    data = PreparedData.open(folder)
    days = data.days("train")
    parts = []
    for day, rows in zip(days, stem_borders(days, BLOCK_ROWS), strict=True):
        names = stem_files(data.schema, day.stem)
        parts.append(np.stack([digest_parts(find_parts(folder / name, rows))[1] for name in names], 1))
    np.save(folder / CHECKSUMS, np.concatenate(parts))
    manifest = read_manifest(folder)
    manifest["files"][CHECKSUMS] = digest(folder / CHECKSUMS)
    manifest["blocks"] = {"rows": BLOCK_ROWS, "hash": HASH}
    (folder / MANIFEST).write_bytes(seal(manifest))


def main(options: Options) -> None:
    console.quiet()  # before torch and TorchRec are loaded
    import torch
    import xxhash

    from torchrec_deepfm.data.dataset.checksums import BlockCheck
    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.data.loader.loader import Loader
    from torchrec_deepfm.data.loader.row_reader import SplitRows

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        loader_speed.make(folder, loader_speed.Options(rows=options.rows, days=options.days), lists=False)
        add_checksums(folder)
        data = PreparedData.open(folder)
        kinds = {"compared": data, "not compared": replace(data, blocks=None)}

        def rate(kind: str, shuffle: bool) -> float:
            loader = Loader(kinds[kind], "train", batch_size=options.batch_size, shuffle=shuffle, drop_last=True)
            started, batches = time.perf_counter(), 0
            for epoch in range(options.epochs):
                loader.set_epoch(epoch)
                batches += sum(1 for _ in loader)
            return options.batch_size * batches / (time.perf_counter() - started)

        print(
            f"torch {torch.__version__}, xxhash {xxhash.VERSION}; {data.rows('train'):,} rows, batch "
            f"{options.batch_size}, {options.threads} threads, {options.repeats} passes of {options.epochs} epochs"
        )
        for shuffle in (True, False):
            rates: dict[str, list[float]] = {kind: [] for kind in kinds}
            for repeat in range(options.repeats + 1):  # the first warms up
                for kind in list(kinds) if repeat % 2 else reversed(kinds):
                    rates[kind] += [rate(kind, shuffle)] if repeat else []
            compared, without = (statistics.median(rates[kind]) for kind in kinds)
            print(
                f"{'shuffled' if shuffle else 'in order'}: {compared / 1e6:.2f}M samples/s compared, "
                f"{without / 1e6:.2f}M not compared: {compared / without - 1:+.1%}"
            )
        seconds = []
        for _ in range(options.repeats):
            rows = SplitRows(data, "train")
            checksums = data.checksums("train")
            assert checksums is not None
            check = BlockCheck(rows.days, rows.arrays, checksums, data.blocks or 0)
            started = time.process_time()
            check.check([(0, data.rows("train"))])
            seconds.append(time.process_time() - started)
        each = statistics.median(seconds) / data.rows("train")
        print(
            f"{each * 1e9:.1f} ns of processor time per sample: {each * options.training_rate:.2%} of a training at "
            f"{options.training_rate:,.0f} samples/s"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

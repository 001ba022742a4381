"""What the checksums of blocks cost the loader, and a training step.

    python -m benchmarks.data.checksum_cost
    python -m benchmarks.data.checksum_cost --epochs 3

Days of Criteo's shape with random values, in the page cache. Passes with and without comparing take turns in one
process; each has a new loader, which compares every block in its first epoch. Beside the rates: the same in processor
time, which other processes disturb less; and the hash alone, and others that are installed, called on the same blocks
without bookkeeping, which no way of comparing can undercut. The last line is the comparison alone, as a share of the
time that a training takes per sample.
"""

import contextlib
import pkgutil
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.data import loader_speed
from torchrec_deepfm import console

SAMPLE_BYTES = 4 * (13 + 26 + 1)  # numbers, ids and label of Criteo's rows

HASHES = (
    "xxhash.xxh3_64_intdigest",
    "xxhash.xxh3_128_intdigest",
    "isal.isal_zlib.crc32",
    "zlib_ng.zlib_ng.crc32",
    "crc32c.crc32c",
)


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

        def seconds_of(kind: str, shuffle: bool) -> tuple[float, float]:
            """Seconds per sample: by the clock, and of the processor."""
            loader = Loader(kinds[kind], "train", batch_size=options.batch_size, shuffle=shuffle, drop_last=True)
            started, used, batches = time.perf_counter(), time.process_time(), 0
            for epoch in range(options.epochs):
                loader.set_epoch(epoch)
                batches += sum(1 for _ in loader)
            samples = options.batch_size * batches
            return (time.perf_counter() - started) / samples, (time.process_time() - used) / samples

        def hash_alone(digest: Callable[[memoryview], object], blocks: int, passes: int) -> float:
            """Seconds of the processor per sample, of the hash of some blocks in random order."""
            size = data.blocks or 0
            views = [
                file.bytes_of(first, first + size)
                for each in SplitRows(data, "train").arrays
                for first in range(0, len(each.labels) - size, size)
                for file in each.files()
            ]
            random.Random(0).shuffle(views)
            views = views[: blocks * 3 or None]
            started = time.process_time()
            for _ in range(passes):
                for view in views:
                    digest(view)
            return (time.process_time() - started) / (passes * sum(map(len, views)) / SAMPLE_BYTES)

        print(
            f"torch {torch.__version__}, xxhash {xxhash.VERSION}; {data.rows('train'):,} rows, batch "
            f"{options.batch_size}, {options.threads} threads, {options.repeats} passes of {options.epochs} epochs"
        )
        for shuffle in (True, False):
            runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for repeat in range(options.repeats + 1):  # the first warms up
                for kind in list(kinds) if repeat % 2 else reversed(kinds):
                    runs[kind] += [seconds_of(kind, shuffle)] if repeat else []
            for i, of in enumerate(("clock", "processor time")):
                compared, without = (statistics.median(run[i] for run in runs[kind]) for kind in kinds)
                print(
                    f"{'shuffled' if shuffle else 'in order'}, {of}: {1e-6 / compared:.2f}M samples/s compared, "
                    f"{1e-6 / without:.2f}M not compared: {without / compared - 1:+.1%} "
                    f"({(compared - without) * 1e9:+.1f} of {without * 1e9:.1f} ns per sample)"
                )
        for name in HASHES:
            with contextlib.suppress(ImportError):
                digest = pkgutil.resolve_name(name)
                memory, cache = (
                    statistics.median(hash_alone(digest, *how) for _ in range(options.repeats)) * 1e9
                    for how in ((0, 1), (4, 500))
                )
                print(f"{name} alone: {memory:.1f} ns per sample from memory, {cache:.1f} from the cache")
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

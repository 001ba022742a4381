"""Samples per second that the loader feeds, beside TorchRec's in-memory pipe on the same files.

    python -m torchrec_deepfm synthetic --output raw
    python -m torchrec_deepfm prepare --input raw/day_0.tsv --output data
    python benchmarks/loader.py --data data

Passes over the training split take turns; the medians are printed. Both make the same ``Batch``. Ours checks every
value and, shuffled, mixes rows; TorchRec's does neither and holds the whole split in memory. One process, files in the
page cache, nothing trained.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from torchrec_deepfm import terminal


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    data: Path
    """Prepared folder."""
    batch_size: int = 4096
    """Samples of a batch."""
    repeats: int = 5
    """Passes of each kind."""
    threads: int = 2
    """CPU threads."""


def main(options: Options) -> None:
    terminal.quiet()  # before torch and TorchRec are loaded
    import torch
    import torchrec
    from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe

    from torchrec_deepfm.data.loader import Loader
    from torchrec_deepfm.data.prepared import PreparedData

    torch.set_num_threads(options.threads)
    data = PreparedData.open(options.data)
    stems = [day.stem for day in data.days("train")]

    def ours(*, shuffle: bool) -> Loader:
        return Loader(data, "train", batch_size=options.batch_size, shuffle=shuffle, drop_last=True)

    pipe = InMemoryBinaryCriteoIterDataPipe(
        "train",
        *([str(options.data / f"{stem}_{part}.npy") for stem in stems] for part in ("dense", "sparse", "labels")),
        batch_size=options.batch_size,
        rank=0,
        world_size=1,
        drop_last=True,
    )
    kinds: dict[str, Callable[[], Iterable[object]]] = {
        "Loader, in order": lambda: ours(shuffle=False),
        "Loader, shuffled": lambda: ours(shuffle=True),
        "TorchRec, in order": lambda: pipe,
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(options.repeats + 1):  # the first fills the page cache
        for kind, make in kinds.items():
            started = time.perf_counter()
            batches = sum(1 for _ in make())
            seconds = time.perf_counter() - started
            if repeat:
                rates[kind].append(batches * options.batch_size / seconds)
    print(
        f"torch {torch.__version__}, torchrec {torchrec.__version__}; {data.rows('train'):,} rows, "
        f"{options.threads} threads"
    )
    base = statistics.median(rates["TorchRec, in order"])
    for kind, values in rates.items():
        middle = statistics.median(values)
        print(
            f"{kind:<20} {middle:>12,.0f} samples/s  ({min(values):,.0f} to {max(values):,.0f}), x{middle / base:.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

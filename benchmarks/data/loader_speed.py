"""Samples per second of the loader, and its memory, beside TorchRec's in-memory pipe.

    python -m benchmarks.data.loader_speed                # generates 24 days of Criteo's shape
    python -m benchmarks.data.loader_speed --data data    # reads a prepared folder with Criteo's columns

Every kind of pass has a process of its own, so that its memory is its own; the passes alternate. All make the same
``Batch``. ``Loader`` checks every value and, shuffled, mixes rows; TorchRec's pipe does neither and holds the whole
split in memory. Files are in the page cache, nothing is trained. Rates are given per second of the clock and of
processor time, which depends less on other work on the machine. ``RssAnon`` is memory of this process only; ``Rss``
also counts the pages of mapped files, which the system can reclaim at any time.
"""

import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks._lib.commands import environment, module_command
from torchrec_deepfm import console

KINDS = (
    "Loader, in order",
    "Loader, shuffled",
    "Loader, shuffled, no thread",
    "Loader, lists",
    "TorchRec, in order",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    data: Path | None = None
    """Prepared folder. Default: generate one with random values."""
    rows: int = 4_000_000
    """Training rows of the generated folder."""
    days: int = 24
    """Training days of the generated folder."""
    batch_size: int = 4096
    """Samples of a batch."""
    repeats: int = 3
    """Passes of each kind."""
    threads: int = 2
    """CPU threads."""
    one: str | None = None
    """Run this kind in this process and print its figures as JSON."""


def make(folder: Path, options: Options, *, lists: bool) -> None:
    """Write days with Criteo's columns and random values; with ``lists``, 6 of 26 columns hold 0 to 8 ids."""
    import numpy as np

    from torchrec_deepfm.data.schema import Column, Schema
    from torchrec_deepfm.files import seal

    folder.mkdir()
    draw = np.random.default_rng(0)
    names = tuple(f"C{j}" for j in range(1, 27))
    columns = {name: Column(list=True) for name in names[20:]} if lists else {}
    schema = Schema(
        label="label",
        numeric=tuple(f"I{i}" for i in range(1, 14)),
        categorical=names,
        columns=columns,
        layout="table" if lists else "criteo",
    )
    share = options.rows // options.days // (4 if lists else 1)
    stems = [f"day_{day}" for day in range(options.days)]
    for stem in stems:
        np.save(folder / f"{stem}_dense.npy", draw.random((share, 13), np.float32))
        np.save(folder / f"{stem}_sparse.npy", draw.integers(0, 1000, (share, len(schema.one_hot)), np.int32))
        np.save(folder / f"{stem}_labels.npy", draw.integers(0, 2, (share, 1), np.int32))
        for name in schema.multi_hot:
            lengths = draw.integers(0, 9, share)
            ids = draw.integers(0, 1000, int(lengths.sum()), np.int32)
            np.save(folder / f"{stem}_offsets_{names.index(name)}.npy", np.concatenate([[0], np.cumsum(lengths)]))
            np.save(folder / f"{stem}_ids_{names.index(name)}.npy", ids)
    manifest = {
        "format_version": 2,
        "schema": schema.to_json(),
        "num_embeddings": dict.fromkeys(names, 1000),
        "splits": {
            "train": [{"stem": stem, "start": 0, "rows": share, "positives": 0} for stem in stems],
            "validation": [],
            "test": [],
        },
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir()},
        "made": {},
        "optimum": {},
    }
    (folder / "manifest.json").write_bytes(seal(manifest))


def memory() -> dict[str, float]:
    """Return the memory of this process in MB by kind."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) / 1000 for name, key in (("rss", "VmRSS"), ("anon", "RssAnon"))}


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Run passes of one kind: samples/s, and peaks of the memory added since before the first pass."""
    console.quiet()  # before torch and TorchRec are loaded
    import torch
    import torchrec
    from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe

    from torchrec_deepfm.data.dataset.prepared import PreparedData
    from torchrec_deepfm.data.loader.loader import Loader

    torch.set_num_threads(options.threads)
    data = PreparedData.open(folder)
    before = memory()
    peak = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    passes: Callable[[], Iterable[Any]]
    if options.one == "TorchRec, in order":
        stems = [day.stem for day in data.days("train")]
        pipe = InMemoryBinaryCriteoIterDataPipe(
            "train",
            *([str(folder / f"{stem}_{part}.npy") for stem in stems] for part in ("dense", "sparse", "labels")),
            batch_size=options.batch_size,
            rank=0,
            world_size=1,
            drop_last=True,
        )

        def passes() -> Iterable[Any]:
            return pipe
    else:
        assert options.one is not None
        loader = Loader(
            data,
            "train",
            batch_size=options.batch_size,
            shuffle="in order" not in options.one,
            drop_last=True,
            prefetch=0 if "no thread" in options.one else 2,
        )

        def passes() -> Iterable[Any]:
            return loader

    rates, busy = [], []
    for repeat in range(options.repeats + 1):  # the first warms up
        started, worked = time.perf_counter(), time.process_time()
        samples = options.batch_size * sum(1 for _ in passes())
        if repeat:
            rates.append(samples / (time.perf_counter() - started))
            busy.append(samples / (time.process_time() - worked))
    done.set()
    watcher.join()
    return {
        "rates": rates,
        "busy": busy,
        "anon": peak["anon"] - before["anon"],
        "rss": peak["rss"] - before["rss"],
        "rows": data.rows("train"),
        "versions": f"torch {torch.__version__}, torchrec {torchrec.__version__}",
    }


def run(options: Options, kind: str, folder: Path) -> dict[str, Any]:
    """Run ``measure`` in a process of its own."""
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in asdict(options).items() if name not in ("data", "one")
    ]
    words += [f"--data={folder}", f"--one={kind}"]
    command = module_command("benchmarks.data.loader_speed", *words)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment())
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(options: Options) -> None:
    if options.one is not None:
        assert options.data is not None
        print(json.dumps(measure(options, options.data)))
        return
    with tempfile.TemporaryDirectory() as name:
        folders = {kind: options.data for kind in KINDS if kind != "Loader, lists"}
        if options.data is None:
            make(Path(name, "data"), options, lists=False)
            make(Path(name, "lists"), options, lists=True)
            folders = {kind: Path(name, "lists" if kind == "Loader, lists" else "data") for kind in KINDS}
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in folders}
        for _ in range(options.repeats):
            for kind, folder in folders.items():
                assert folder is not None
                results[kind].append(run(replace(options, repeats=1), kind, folder))
    first = results["Loader, in order"][0]
    print(f"{first['versions']}; {first['rows']:,} rows, batch {options.batch_size}, {options.threads} threads")
    for kind, runs in results.items():
        rates = [rate for each in runs for rate in each["rates"]]
        busy = statistics.median(rate for each in runs for rate in each["busy"])
        anon, rss = (max(each[key] for each in runs) for key in ("anon", "rss"))
        print(
            f"{kind:<28} {statistics.median(rates) / 1e6:6.2f}M samples/s ({min(rates) / 1e6:.2f} to "
            f"{max(rates) / 1e6:.2f}), {busy / 1e6:6.2f}M per CPU second; RssAnon {anon:,.0f} MB, Rss {rss:,.0f} MB"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Files and rows at an address beside a local disk; storing takes a prepared folder there first.

python -m benchmarks.data.object_storage PREPARED s3://bucket/prefix
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.remote.objects import Objects

BATCH = 512
FILE_MIB = 64


def rate(data: PreparedData, epoch: int) -> float:
    """Rows per second of an epoch of shuffled batches."""
    loader = Loader(data, "train", batch_size=BATCH, rank=0, world_size=1, shuffle=True)
    loader.set_epoch(epoch)
    start = time.perf_counter()
    return BATCH * sum(1 for _ in loader) / (time.perf_counter() - start)


def main() -> None:
    prepared, address = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "file").write_bytes(os.urandom(FILE_MIB << 20))
        objects = Objects(f"{address}/file")
        for name, work in {
            "store": lambda: objects.store(here, ["file"]),
            "fetch": lambda: objects.fetch(["file"], here / "fetched"),
            "copy on the disk, synced": lambda: (here / "copy").write_bytes((here / "file").read_bytes()) and os.sync(),
        }.items():
            start = time.perf_counter()
            work()
            print(f"{name}: {FILE_MIB / (time.perf_counter() - start):.0f} MiB/s")
        local = PreparedData.open(prepared)
        Objects(f"{address}/prepared").store(local.folder, [path.name for path in local.folder.iterdir()])
        os.environ.setdefault("TORCHREC_DEEPFM_CACHE", str(here / "cache"))
        remote = PreparedData.open(f"{address}/prepared")
        for name, data, epoch in (
            ("folder, first epoch", local, 0), ("folder, second epoch", local, 1),
            ("address, first epoch", remote, 0), ("address, second epoch", remote, 1),
        ):  # fmt: skip
            print(f"{name}: {rate(data, epoch):,.0f} rows/s")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()

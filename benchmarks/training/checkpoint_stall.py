"""How long a checkpoint keeps the training waiting: saved beside it, against saved in front of it.

    python -m benchmarks.training.checkpoint_stall --output FOLDER [--rows 4000000]

Steps run on; every few of them the state is saved, by turns with and without waiting until it is on the disk. The stall
is the time between two steps that the save takes; that of the first save beside the training counts apart, as it also
gets the memory for the copy.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.datasets.random import RandomRecDataset

from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.checkpoint import Checkpoints
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optimizers import make_optimizer
from torchrec_deepfm.training.state import TrainingTensors

FIELDS, NUMERIC, STEPS_BETWEEN, SAVES = 26, 13, 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4_000_000, help="of all tables together")
    parser.add_argument("--batch-size", type=int, default=2048)
    options = parser.parse_args()
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    sizes = {f"C{i}": options.rows // FIELDS for i in range(FIELDS)}
    config = TrainConfig(factor_dim=15, dropout=0.0, batch_size=options.batch_size)
    model = build_model(config, sizes, NUMERIC, torch.device("cpu")).model
    optimizer = make_optimizer(model, config)
    tensors = TrainingTensors(model, optimizer, config.sparse_optimizer)
    batches = iter(
        RandomRecDataset(list(sizes), options.batch_size, hash_sizes=list(sizes.values()), num_dense=NUMERIC)
    )
    pool = [next(batches) for _ in range(4)]
    checkpoints = Checkpoints(str(options.output / "checkpoints"), keep_last=2)
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
    undisturbed, stalls, beside, waits, whole = [], [], [], [], []
    for _ in range(SAVES + 1):
        undisturbed.append(steps())
        stalls.append(save(wait=False))
        started = time.perf_counter()
        beside.append(steps())
        checkpoints.wait()
        whole.append(time.perf_counter() - started)
        undisturbed.append(steps())
        waits.append(save(wait=True))
    size = sum(path.stat().st_size for path in sorted(options.output.rglob("*")) if path.is_file())
    print(f"{size / len(checkpoints.store.steps()) / 1e6:.0f} MB a checkpoint")

    def line(name: str, seconds: list[float]) -> None:
        print(f"{name:<44} median {statistics.median(seconds) * 1e3:9.1f} ms   "
              f"range {min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}")  # fmt: skip

    line("a step, nothing being saved", undisturbed)
    line("a step while a checkpoint is written", beside)
    line("synchronous save", waits[1:])
    line("stall of a save beside the training", stalls[1:])
    line("  the first one", stalls[:1])
    print(f"stall / synchronous save {statistics.median(stalls[1:]) / statistics.median(waits[1:]):.1%}")
    checkpoints.close()
    shutil.rmtree(options.output)


if __name__ == "__main__":
    main()

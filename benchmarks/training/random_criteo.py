"""A sharded DeepFM of Criteo's shape and random batches in memory: what the training benchmarks time.

13 numeric and 26 categorical fields, factor_dim 15 (rows of 16 columns) and MLP 400-400-400, row-wise Adagrad fused
into the tables' backward pass, Adam for the rest.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torchrec_deepfm import console
from torchrec_deepfm.launch.huge_pages import use_huge_pages

Precision = Literal["float32", "medium", "bf16"]
KEYS = [f"C{i}" for i in range(1, 27)]
NUMERIC = 13


@contextmanager
def training_rank(device: str, threads: int) -> Iterator[Any]:
    """Set up torch and the process group of this rank; yield its ``torch.device``.

    Raises:
        SystemExit: torch finds no GPU for ``cuda``.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is loaded
    console.quiet()
    use_huge_pages()
    import torch

    from torchrec_deepfm.distributed import process_group

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here")
    torch.set_num_threads(threads)
    with process_group.process_group() as place:
        yield place


def build(
    rows: int,
    batch_size: int,
    device: Any,
    *,
    factor_dim: int = 15,
    dropout: float = 0.0,
    compile_dense: Literal["off", "default"] = "off",
) -> tuple[Any, ...]:
    """Return (model, optimizer, config).

    Args:
        rows: Of all tables together.
        batch_size: Samples per rank and step.
        device: This rank's device.
        factor_dim: K.
        dropout: Of the MLP.
        compile_dense: How to compile everything after the look-ups.
    """
    from torchrec_deepfm.training.build import build_model
    from torchrec_deepfm.training.config import TrainConfig
    from torchrec_deepfm.training.optim.optimizers import make_optimizer

    config = TrainConfig(factor_dim=factor_dim, dropout=dropout, batch_size=batch_size)
    sizes = dict.fromkeys(KEYS, rows // len(KEYS))
    model = build_model(config, sizes, NUMERIC, device, compile_dense=compile_dense).model
    return model, make_optimizer(model, config), config


def random_batches(count: int, batch_size: int, rows: int, *, ids_per_field: int = 1) -> list[Any]:
    """Draw batches on the CPU.

    Args:
        count: How many.
        batch_size: Samples per batch.
        rows: Of all tables together.
        ids_per_field: Ids per sample in each categorical field.
    """
    import torch
    from torchrec.datasets.utils import Batch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    bags = len(KEYS) * batch_size
    return [
        Batch(
            dense_features=torch.rand(batch_size, NUMERIC),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                KEYS,
                torch.randint(rows // len(KEYS), (bags * ids_per_field,), dtype=torch.int32),
                torch.full((bags,), ids_per_field, dtype=torch.int32),
            ),
            labels=torch.randint(2, (batch_size,), dtype=torch.int32),
        )
        for _ in range(count)
    ]


def make_pipeline(
    device: Any, precision: Callable[[], Precision], *, rows: int = 1_000_000, batch_size: int = 4096, **options: Any
) -> tuple[Any, Iterator[Any]]:
    """Return the trainer's TrainPipelineSparseDist, and an endless iterator over 16 random batches.

    Args:
        device: This rank's device.
        precision: Called at each step.
        rows: Of all tables together.
        batch_size: Samples per rank and step.
        options: Of ``build``.
    """
    import torch
    import torch.distributed as dist
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from torchrec_deepfm.training.scoring.evaluation import autocast

    model, optimizer, _ = build(rows, batch_size, device, **options)
    torch.manual_seed(dist.get_rank())
    batches = random_batches(16, batch_size, rows)
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]

    def forward(batch: Any) -> object:
        with autocast(precision(), device):
            return model(batch)

    return TrainPipelineSparseDist(model, optimizer, device, custom_model_fwd=forward), itertools.cycle(batches)


def seconds(device: Any, work: Callable[[], object]) -> float:
    """Time a piece of work, the device's queue included."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started

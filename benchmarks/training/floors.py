"""What bounds a step: the matrix products of its MLPs, copies of memory, and FBGEMM's kernels for the tables alone."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.training.criteo_rows import CATEGORICAL, HIDDEN, NUMERIC, draw
from benchmarks.training.random_criteo import seconds

FORWARD_PASSES, BACKWARD_PASSES = 2, 3
"""How often the bytes of the looked-up rows move: rows read, pooled rows written; gradients and rows read, rows
written."""
MARKS = {"forward": "63 to 65%", "backward": "26%"}  # meta-pytorch/torchrec#4757, on GPUs


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        device: ``cpu`` or ``cuda``.
        rows: Of all tables together.
        batch_size: Samples per step.
        factor_dim: K; a row has K + 1 columns.
        train: A whole training step, or the forward pass.
    """

    device: str
    rows: int
    batch_size: int
    factor_dim: int
    train: bool

    @property
    def table_bytes(self) -> int:
        """Bytes per sample that the look-ups move."""
        passes = FORWARD_PASSES + BACKWARD_PASSES * self.train
        return passes * CATEGORICAL * (self.factor_dim + 1) * 4

    def flops(self, dlrm: bool) -> int:
        """Floating point operations per sample of the MLPs' products."""
        # Backward: the gradients of input and weight.
        return sum(2 * n * m for n, m in layers(self.factor_dim, dlrm)) * (3 if self.train else 1)


def layers(factor_dim: int, dlrm: bool) -> list[tuple[int, int]]:
    """Inputs and outputs of the hidden layers of DeepFM, or of DLRM with the same MLP."""
    if not dlrm:
        return list(itertools.pairwise(((NUMERIC + CATEGORICAL) * factor_dim, *HIDDEN)))
    width, fields = factor_dim + 1, CATEGORICAL + 1
    bottom, top = (NUMERIC, HIDDEN[0], width), (width + fields * (fields - 1) // 2, *HIDDEN)
    return [*itertools.pairwise(bottom), *itertools.pairwise(top)]


def measure(case: Case) -> dict[str, float]:
    """Measure the floors.

    Returns:
        TFLOP/s of DeepFM's products by precision; GB/s of a copy (bytes read and written), the memory's GB/s by its
        data sheet where the GPU has a preset, and GB/s of FBGEMM's kernels.
    """
    import torch

    device = torch.device(case.device)
    found = {}
    for precision, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        pairs = [
            (torch.randn(case.batch_size, n).to(device, kind), torch.randn(n, m).to(device, kind))
            for n, m in layers(case.factor_dim, dlrm=False)
        ]
        best = _best(device, lambda: [a @ b for a, b in pairs])  # noqa: B023
        flops = sum(2 * case.batch_size * n * m for n, m in layers(case.factor_dim, dlrm=False))
        found[f"products in {precision}, TFLOP/s"] = flops / best / 1e12
    source = torch.empty(64 << 20, device=device)
    target = torch.empty_like(source)
    found["copy, GB/s"] = 2 * source.nbytes / _best(device, lambda: target.copy_(source)) / 1e9
    if device.type == "cuda":
        from torchrec_deepfm.sharding.runtime.local_hardware import describe_hardware

        found["memory, GB/s"] = describe_hardware(None, device).hbm_bandwidth / 1e9
    return found | _table_kernels(case)


def _table_kernels(case: Case) -> dict[str, float]:
    """FBGEMM's look-up and its backward pass with row-wise Adagrad, nothing around them."""
    import torch

    rows, width, device = draw(case.rows, case.batch_size, 1), case.factor_dim + 1, torch.device(case.device)
    tables = make_tables(rows.num_embeddings, width, case.device)
    ids = torch.from_numpy(rows.ids[0]).t().flatten().int().to(device)
    offsets = torch.arange(len(ids) + 1, dtype=torch.int32, device=device)
    gradient = torch.ones(case.batch_size, CATEGORICAL * width, device=device)
    forward = _best(device, lambda: tables(ids, offsets))
    both = _best(device, lambda: tables(ids, offsets).backward(gradient))
    moved = gradient.nbytes / 1e9
    return {
        "tables forward, GB/s": FORWARD_PASSES * moved / forward,
        "tables backward, GB/s": BACKWARD_PASSES * moved / max(both - forward, 1e-9),
    }


def make_tables(num_embeddings: int, width: int, device: str, count: int = CATEGORICAL) -> Any:
    """FBGEMM's fused tables with row-wise Adagrad, by default as many as there are categorical columns."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if device == "cuda":
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(num_embeddings, width, *place)] * count,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
    )
    tables.init_embedding_weights_uniform(-0.01, 0.01)
    return tables


def _best(device: Any, work: Callable[[], object]) -> float:
    """The shortest of twenty runs, which the queue of a GPU has behind it."""
    work()
    return min(seconds(device, work) for _ in range(20))

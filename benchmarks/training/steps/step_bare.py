"""The side of bare FBGEMM in ``speed.py``: a DeepFM of one table-batched look-up and a compiled head, unsharded.

Nothing of TorchRec or of this project's model: what the kernels themselves allow.

    python -m benchmarks.training.steps.step_bare --precision bf16

``speed.py`` starts it and says when to work.
"""

import itertools
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._lib.windows import serve
from benchmarks.training.criteo_rows import CATEGORICAL, HIDDEN, NUMERIC, arguments, draw
from benchmarks.training.floors import make_tables


class Head(nn.Module):
    """First order, FM and MLP over the packed rows [v | w] of all fields."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.numeric = nn.Parameter(torch.randn(NUMERIC, width) * 0.01)
        sizes = ((NUMERIC + CATEGORICAL) * (width - 1), *HIDDEN)
        layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, dense: Tensor, rows: Tensor) -> Tensor:
        """Return logits [B]: ``dense`` [B, 13], ``rows`` [B, 26, width]."""
        fields = torch.cat([dense.unsqueeze(2) * self.numeric, rows], dim=1)
        v, w = fields[:, :, :-1], fields[:, :, -1]
        pairs = 0.5 * (v.sum(1).square().sum(1) - v.square().sum((1, 2)))
        logits: Tensor = self.bias + w.sum(1) + pairs + self.mlp(v.flatten(1)).squeeze(1).float()
        return logits


def main() -> None:
    options = arguments()
    torch.set_float32_matmul_precision("medium" if options.precision == "medium" else "highest")
    rows, width = draw(options.rows, options.batch_size), options.factor_dim + 1
    tables = make_tables(rows.num_embeddings, width, options.device)
    head = Head(width).to(options.device)
    compiled = torch.compile(head)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    batch_size = options.batch_size
    offsets = torch.arange(CATEGORICAL * batch_size + 1, device=options.device)
    batches = itertools.cycle(
        (dense.to(options.device), ids.t().flatten().to(options.device), labels.to(options.device))
        for dense, ids, labels in zip(*map(torch.from_numpy, (rows.dense, rows.ids, rows.labels)), strict=True)
    )

    def logits() -> tuple[Tensor, Any]:
        dense, ids, labels = next(batches)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            return compiled(dense, tables(ids, offsets).view(batch_size, CATEGORICAL, width)), labels

    def train() -> int:
        found, labels = logits()
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(found, labels).backward()
        optimizer.step()
        return int(batch_size)

    def forward() -> int:
        with torch.no_grad():
            logits()
        return int(batch_size)

    about = {"fbgemm-gpu": _version("fbgemm-gpu-cpu", "fbgemm-gpu")}
    wait = torch.cuda.synchronize if options.device == "cuda" else None
    serve(train if options.work == "train" else forward, about, wait)


def _version(*names: str) -> str:
    from importlib.metadata import PackageNotFoundError

    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    main()

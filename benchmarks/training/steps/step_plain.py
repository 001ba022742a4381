"""The side of a DeepFM in plain PyTorch in ``speed.py``: an EmbeddingBag per table with sparse gradients, Adagrad.

Nothing of TorchRec, FBGEMM or this project's model, and nothing compiled.

    python -m benchmarks.training.steps.step_plain --precision bf16

``speed.py`` starts it and says when to work.
"""

import itertools

import torch
from torch import Tensor, nn

from benchmarks._lib.windows import serve
from benchmarks.training.criteo_rows import CATEGORICAL, arguments, draw
from benchmarks.training.steps.step_bare import Head


def main() -> None:
    options = arguments()
    torch.set_float32_matmul_precision("medium" if options.precision == "medium" else "highest")
    rows, width = draw(options.rows, options.batch_size), options.factor_dim + 1
    tables = nn.ModuleList(
        nn.EmbeddingBag(rows.num_embeddings, width, mode="sum", sparse=True, device=options.device)
        for _ in range(CATEGORICAL)
    )
    head = Head(width).to(options.device)
    optimizers = [
        torch.optim.Adagrad(tables.parameters(), lr=0.01),
        torch.optim.Adam(head.parameters(), fused=True),
    ]
    batches = itertools.cycle(
        [
            tuple(torch.from_numpy(part).to(options.device) for part in parts)
            for parts in zip(rows.dense, rows.ids, rows.labels, strict=True)
        ]
    )

    def logits() -> tuple[Tensor, Tensor]:
        dense, ids, labels = next(batches)
        pooled = torch.stack([table(ids[:, i : i + 1]) for i, table in enumerate(tables)], dim=1)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            return head(dense, pooled), labels

    def train() -> int:
        found, labels = logits()
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(found, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        return int(options.batch_size)

    def forward() -> int:
        with torch.no_grad():
            logits()
        return int(options.batch_size)

    wait = torch.cuda.synchronize if options.device == "cuda" else None
    serve(train if options.work == "train" else forward, {"torch": torch.__version__}, wait)


if __name__ == "__main__":
    main()

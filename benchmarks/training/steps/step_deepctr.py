"""The side of DeepCTR-Torch's DeepFM in ``speed.py``, in its own environment: Adam over whole tables.

    .bench/deepctr/bin/python -m benchmarks.training.steps.step_deepctr --precision bf16

``speed.py`` starts it and says when to work.
"""

import itertools
from importlib.metadata import version

import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DeepFM

from benchmarks._lib.windows import serve
from benchmarks.training.criteo_rows import CATEGORICAL, HIDDEN, NUMERIC, arguments, draw


def main() -> None:
    options = arguments()
    rows = draw(options.rows, options.batch_size)
    columns = [
        *(SparseFeat(f"C{i}", rows.num_embeddings, embedding_dim=options.factor_dim) for i in range(CATEGORICAL)),
        *(DenseFeat(f"I{i}", 1) for i in range(NUMERIC)),
    ]
    model = DeepFM(columns, columns, dnn_hidden_units=HIDDEN, l2_reg_linear=0, l2_reg_embedding=0)
    optimizer = torch.optim.Adam(model.parameters())
    inputs = torch.cat([torch.from_numpy(rows.ids).float(), torch.from_numpy(rows.dense)], dim=2)
    batches = itertools.cycle(zip(inputs, torch.from_numpy(rows.labels), strict=True))

    def train() -> int:
        x, y = next(batches)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy(model(x).squeeze(1), y, reduction="sum").backward()
        optimizer.step()
        return len(x)

    def forward() -> int:
        x, _ = next(batches)
        with torch.no_grad():
            model(x)
        return len(x)

    model.train(options.work == "train")
    serve(train if options.work == "train" else forward, {"deepctr-torch": version("deepctr-torch")})


if __name__ == "__main__":
    main()

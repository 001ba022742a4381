"""The side of FuxiCTR's DeepFM in ``speed.py``, in its own environment: Adam over whole tables.

    .bench/fuxictr-models/bin/python -m benchmarks.training.steps.step_fuxictr --precision bf16

``speed.py`` starts it and says when to work.
"""

import itertools
import logging
import tempfile
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import torch
from fuxictr.features import FeatureMap

from benchmarks._lib.windows import serve
from benchmarks.quality.workers.train_fuxictr import DeepFM
from benchmarks.training.criteo_rows import CATEGORICAL, HIDDEN, NUMERIC, arguments, draw


def main() -> None:
    options = arguments()
    logging.disable(logging.INFO)
    rows = draw(options.rows, options.batch_size)
    numeric, categorical = [f"I{i}" for i in range(NUMERIC)], [f"C{i}" for i in range(CATEGORICAL)]
    settings = {
        "patience": 2,
        "embedding_l2": None,
        "embedding_dim": options.factor_dim,
        "init_std": 1e-4,
        "hidden_units": list(HIDDEN),
        "dropout": 0,
        "batch_norm": False,
        "learning_rate": 1e-3,
    }
    with tempfile.TemporaryDirectory() as folder:
        features = FeatureMap("data", folder)
        features.features = OrderedDict(
            [(name, {"source": "", "type": "numeric"}) for name in numeric]
            + [(name, {"source": "", "type": "categorical", "vocab_size": rows.num_embeddings}) for name in categorical]
        )
        features.labels = ["label"]
        features.num_fields = features.get_num_fields()
        features.set_column_index()
        (Path(folder) / "data").mkdir()
        model = DeepFM(features, settings, folder)
    batches = itertools.cycle(
        dict(zip(numeric, dense.unbind(1), strict=True))
        | dict(zip(categorical, ids.unbind(1), strict=True))
        | {"label": y}
        for dense, ids, y in zip(*map(torch.from_numpy, (rows.dense, rows.ids, rows.labels)), strict=True)
    )
    model._max_gradient_norm = 10.0  # which fit() sets

    def train() -> int:
        model.train_step(next(batches))
        return int(options.batch_size)

    def forward() -> int:
        with torch.no_grad():
            model(next(batches))
        return int(options.batch_size)

    model.train(options.work == "train")
    serve(train if options.work == "train" else forward, {"fuxictr": version("fuxictr")})


if __name__ == "__main__":
    main()

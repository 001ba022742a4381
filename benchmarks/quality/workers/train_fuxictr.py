"""Trains FuxiCTR's DeepFM on a prepared folder; ``table.py`` starts this in FuxiCTR's environment.

    .bench/fuxictr-models/bin/python -m benchmarks.quality.workers.train_fuxictr DATA RESULT.json SETTINGS.json SEED

The wheel of FuxiCTR 2.3.10 contains no DeepFM (its model zoo is not packed). Here it is composed of its public layers
on its ``BaseModel``, as their documentation describes: ``FactorizationMachine`` (which includes the first order) plus
``MLP_Block`` over one ``FeatureEmbedding``. ``BaseModel.fit`` trains: Adam, its regulariser, gradients clipped at a
norm of 10, the rate divided by ten when the validation AUC does not rise, a stop after ``patience`` epochs without a
rise. FuxiCTR's readers collate row by row; here the rows come from memory.
"""

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from torch import Tensor

from benchmarks.quality.workers.prepared_arrays import Arrays, Clock, Split, run_worker, score, write


class DeepFM(BaseModel):
    """The sum of FuxiCTR's ``FactorizationMachine`` and ``MLP_Block``."""

    def __init__(self, feature_map: FeatureMap, settings: dict[str, Any], folder: str) -> None:
        super().__init__(
            feature_map,
            model_id="DeepFM",
            monitor="AUC",
            monitor_mode="max",
            early_stop_patience=settings["patience"],
            embedding_regularizer=settings["embedding_l2"],
            reduce_lr_on_plateau=True,
            verbose=0,
            model_root=folder,
            metrics=["AUC", "logloss"],
        )
        self.embedding_layer = FeatureEmbedding(
            feature_map,
            settings["embedding_dim"],
            embedding_initializer=f"partial(nn.init.normal_, std={settings['init_std']})",
        )
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(
            input_dim=settings["embedding_dim"] * feature_map.num_fields,
            hidden_units=settings["hidden_units"],
            output_dim=1,
            dropout_rates=settings["dropout"],
            batch_norm=settings["batch_norm"],
        )
        self.compile("adam", "binary_crossentropy", settings["learning_rate"])
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the click probabilities [B, 1] of a batch."""
        columns = self.get_inputs(inputs)
        embedded = self.embedding_layer(columns)
        logits = self.fm(columns, embedded) + self.mlp(embedded.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logits)}


class Batches:
    """Batches of a split in memory as ``BaseModel.fit`` takes them: a dictionary of columns."""

    def __init__(self, arrays: Arrays, split: Split, batch_size: int, *, shuffle: bool) -> None:
        self._dense, self._sparse = torch.from_numpy(split.dense), torch.from_numpy(split.sparse)
        self._labels = torch.from_numpy(split.labels).float()
        self._numeric, self._categorical = arrays.numeric, list(arrays.num_embeddings)
        self._batch_size, self._shuffle = batch_size, shuffle

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._labels) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches, in a new order each time if they are shuffled."""
        rows = len(self._labels)
        order = torch.randperm(rows) if self._shuffle else torch.arange(rows)
        for chosen in order.split(self._batch_size):
            dense, sparse = self._dense[chosen].unbind(1), self._sparse[chosen].unbind(1)
            columns = dict(zip(self._numeric, dense, strict=True)) | dict(zip(self._categorical, sparse, strict=True))
            yield columns | {"label": self._labels[chosen]}


def main(data: Path, result: Path, settings: dict[str, Any], seed: int) -> None:
    torch.set_num_threads(settings.get("threads", 1))
    torch.set_float32_matmul_precision(settings["precision"])
    logging.disable(logging.INFO)
    seed_everything(seed)
    arrays = Arrays.read(data).with_unit_numbers()
    numeric = [(name, {"source": "", "type": "numeric"}) for name in arrays.numeric]
    categorical = [
        (name, {"source": "", "type": "categorical", "vocab_size": rows})
        for name, rows in arrays.num_embeddings.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        feature_map = FeatureMap("data", folder)
        feature_map.features = OrderedDict(numeric + categorical)
        feature_map.labels = ["label"]
        feature_map.num_fields = feature_map.get_num_fields()
        feature_map.set_column_index()
        (Path(folder) / "data").mkdir()
        model = DeepFM(feature_map, settings, folder)
        train = Batches(arrays, arrays.splits["train"], settings["batch_size"], shuffle=True)
        held_out = partial(Batches, arrays, batch_size=16_384, shuffle=False)
        clock = Clock()
        model.fit(train, epochs=settings["epochs"], validation_data=held_out(arrays.splits["validation"]))
        predicted = {name: model.predict(held_out(split)) for name, split in arrays.splits.items() if name != "train"}
    scores = {name: score(arrays.splits[name].labels, found) for name, found in predicted.items()}
    if "predictions" in settings:
        np.savez(settings["predictions"], **predicted)
    versions = {"fuxictr": version("fuxictr"), "torch": torch.__version__}
    write(result, {**scores, "seconds": clock(), "epochs": model._epoch_index + 1, "versions": versions})


if __name__ == "__main__":
    run_worker(main)

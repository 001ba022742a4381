"""Trains DeepCTR-Torch's DeepFM on a prepared folder; ``table.py`` starts this in DeepCTR-Torch's environment.

    .bench/deepctr/bin/python -m benchmarks.quality.workers.train_deepctr DATA RESULT.json SETTINGS.json SEED

Its ``fit`` trains, its ``EarlyStopping`` restores the best epoch by validation AUC. Its loss is a sum over the batch
plus l2 * ||E||^2 over whole tables: per sample, an ``l2`` of B * lambda / 2 equals this project's lambda.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deepctr_torch.callbacks import EarlyStopping
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DeepFM

from benchmarks.quality.workers.prepared_arrays import Arrays, Clock, Split, run_worker, write


def main(data: Path, result: Path, settings: dict[str, Any], seed: int) -> None:
    torch.set_num_threads(settings.get("threads", 1))
    torch.set_float32_matmul_precision(settings["precision"])
    arrays = Arrays.read(data).with_unit_numbers()
    columns = [
        *(DenseFeat(name, 1) for name in arrays.numeric),
        *(
            SparseFeat(name, rows, embedding_dim=settings["embedding_dim"])
            for name, rows in arrays.num_embeddings.items()
        ),
    ]
    model = DeepFM(
        columns,
        columns,
        dnn_hidden_units=settings["hidden_units"],
        l2_reg_linear=settings["l2"],
        l2_reg_embedding=settings["l2"],
        init_std=settings["init_std"],
        seed=seed,
        dnn_dropout=settings["dropout"],
        dnn_use_bn=settings["batch_norm"],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    model.compile(optimizer, "binary_crossentropy", metrics=["auc"])
    stopping = EarlyStopping("val_auc", patience=settings["patience"], mode="max", verbose=0, restore_best_weights=True)
    train, validation = arrays.splits["train"], arrays.splits["validation"]
    clock = Clock()
    history = model.fit(
        _columns(arrays, train),
        train.labels,
        batch_size=settings["batch_size"],
        epochs=settings["epochs"],
        validation_data=(_columns(arrays, validation), validation.labels),
        callbacks=[stopping],
        verbose=0,
    )
    scores = arrays.held_out_scores(lambda split: model.predict(_columns(arrays, split), 16_384))
    versions = {"deepctr-torch": version("deepctr-torch"), "torch": torch.__version__}
    write(result, {**scores, "seconds": clock(), "epochs": len(history.epoch), "versions": versions})


def _columns(arrays: Arrays, split: Split) -> dict[str, Any]:
    dense = {name: split.dense[:, place] for place, name in enumerate(arrays.numeric)}
    return dense | {name: split.sparse[:, place] for place, name in enumerate(arrays.num_embeddings)}


if __name__ == "__main__":
    run_worker(main)

"""Trains DeepFM or a part of it with the project's trainer; the quality benchmarks start this, a process per training.

    python -m benchmarks.quality.workers.train_deepfm DATA RESULT.json SETTINGS.json SEED

The settings are a JSON object: ``model`` ("DeepFM" or "FM & DNN"), ``recipe``, and ``changes``, options that override
the recipe's. The run folder is made beside the result and removed at the end.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.quality.workers.prepared_arrays import Clock, run_worker, write
from torchrec_deepfm import console
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.distributed import process_group
from torchrec_deepfm.model.arches import OverArch
from torchrec_deepfm.model.deepfm import DeepFM
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe
from torchrec_deepfm.training.run import folder
from torchrec_deepfm.training.trainer import train


class FMAndDNN(DeepFM):
    """The paper's "FM & DNN" (its table 2): a factorization machine and an MLP that share no latent vectors.

        logit = b + <w, x> + sum_{i<j} <V_i x_i, V_j x_j> + MLP([U_1 x_1, ..., U_F x_F])

    A row of its tables is ``[V (K) | U (K) | w | padding]``. Everything else is DeepFM's, so the two differ in the
    sharing alone (and in the parameters that it saves).

    Args:
        embedding_bag_collection: tables of rows of factor_dim 2 K.
        dense_in_features: as in ``DeepFM``.
        over_arch_layer_sizes: as in ``DeepFM``.
        factor_dim: 2 K.
        options: of ``DeepFM``.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        over_arch_layer_sizes: tuple[int, ...],
        factor_dim: int,
        **options: Any,
    ) -> None:
        super().__init__(embedding_bag_collection, dense_in_features, over_arch_layer_sizes, factor_dim, **options)
        fields = dense_in_features + len(self.sparse_arch.sparse_feature_names)
        self.over_arch = OverArch(
            fields * (factor_dim // 2),
            over_arch_layer_sizes,
            activation=options["activation"],
            dropout=options["dropout"],
            batch_norm=options["batch_norm"],
            device=options["dense_device"],
        )

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """As ``DeepFM.forward``: [B, I] numbers and ids to [B, 1] logits."""
        rows_BFR: Tensor = self.sparse_arch(sparse_features)  # noqa: N806 (shape letters, as in the model)
        if self.dense_arch is not None:
            rows_BFR = torch.cat([self.dense_arch(dense_features), rows_BFR], dim=1)  # noqa: N806
        half = self.factor_dim // 2
        wide, deep, first_order = torch.split(rows_BFR, [half, half, 1], dim=2)
        return self.bias + self.inter_arch(wide, first_order.squeeze(2)) + self.over_arch(deep.flatten(1))


def main(data: Path, result: Path, settings: dict[str, Any], seed: int) -> None:
    console.quiet()
    torch.set_num_threads(settings.get("threads", 1))
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in settings["changes"].items()}
    config: TrainConfig = replace(recipe(settings["recipe"]), **changes, seed=seed)
    model: type[DeepFM] = DeepFM
    if settings["model"] == "FM & DNN":
        model, config = FMAndDNN, replace(config, factor_dim=2 * config.factor_dim)
    run = result.with_suffix(".run")
    shutil.rmtree(run, ignore_errors=True)
    clock = Clock()
    with (
        process_group.process_group(cpu=True) as device,
        # The trainer has no option for another model class.
        mock.patch("torchrec_deepfm.training.build.DeepFM", model),
    ):
        summary = train(config, PreparedData.open(data), run, device).summary
    found = {split: summary[split] for split in ("validation", "test") if split in summary}
    write(
        result,
        {
            **found,
            "seconds": clock(),
            "train_seconds": summary["train_seconds"],
            "samples_per_second": summary["samples_per_second"],
            "epochs": summary["steps"] * config.batch_size / max(PreparedData.open(data).rows("train"), 1),
            "versions": folder.versions(),
        },
    )
    shutil.rmtree(run)


if __name__ == "__main__":
    run_worker(main)

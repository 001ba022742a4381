"""What an experiment trains: a model around the tables, sharded by a plan, and batches that can be drawn again.

Tables of one width make a DeepFM, as ``train`` builds it. Tables of several widths cannot interact in it, so their
pooled rows go side by side into the same MLP.

Shapes: B batch, I numeric features, D width of a table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.results import Ids
from torchrec_deepfm.experiment.step_timer import TrainableModel
from torchrec_deepfm.model.arches import OverArch
from torchrec_deepfm.model.deepfm import DeepFMTrain
from torchrec_deepfm.model.fm import init_packed_rows_
from torchrec_deepfm.model.table_name import table_name
from torchrec_deepfm.sharding.inputs.sharding_types import FusedOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.plan.torchrec_plan import find_embedding_bags, to_sharding_plan
from torchrec_deepfm.sharding.runtime.sharder import make_sharder
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import fuse_sparse_optimizer, make_optimizer

DENSE_IN_FEATURES = 13  # Criteo's


class PooledRows(nn.Module):
    """Numeric features [B, I] and the pooled rows of tables of any widths, side by side into an MLP."""

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        over_arch_layer_sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        configs = embedding_bag_collection.embedding_bag_configs()
        self.feature_names = [name for config in configs for name in config.feature_names]
        width = sum(config.embedding_dim * len(config.feature_names) for config in configs)
        self.over_arch = OverArch(dense_in_features + width, over_arch_layer_sizes, dropout=0.0, device=device)

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Compute logits [B, 1] of dense features [B, I] and ids."""
        pooled = self.embedding_bag_collection(sparse_features).to_dict()
        side_by_side = [dense_features, *(pooled[name] for name in self.feature_names)]
        logits: Tensor = self.over_arch(torch.cat(side_by_side, dim=1))
        return logits


def build_workload(
    tables: Sequence[Table],
    plan: PlanFile,
    device: torch.device,
    *,
    optimizer: FusedOptimizer,
    over_arch_layer_sizes: Sequence[int],
) -> TrainableModel:
    """Build the model that an experiment trains, sharded over the current process group; a collective.

    Args:
        tables: the tables.
        plan: where they go; it fits them and the ranks.
        device: this rank's device.
        optimizer: of the tables: fused into the backward pass, for data_parallel ones beside it.
        over_arch_layer_sizes: hidden layers of the dense part.

    Returns:
        The model and its optimizer.
    """
    widths = {table.embedding_dim for table in tables}
    config = TrainConfig(
        factor_dim=min(widths) - 1,  # rows are packed without padding
        over_arch_layer_sizes=tuple(over_arch_layer_sizes),
        dropout=0.0,
        sparse_optimizer=optimizer,
        sparse_lr=0.01,
    )
    if len(widths) == 1:
        # A batch has one feature of each table's name, and training names a table after its feature.
        renamed = replace(plan, tables=tuple(replace(table, name=table_name(table.name)) for table in plan.tables))
        sizes = {table.name: table.num_embeddings for table in tables}
        weighted = _is_weighted(tables)
        sharded = build_model(config, sizes, DENSE_IN_FEATURES, device, is_weighted=weighted, plan=renamed).model
    else:
        sharded = _build_pooled_rows(config, tables, plan, device)
    return TrainableModel(model=sharded, optimizer=make_optimizer(sharded, config), device=device)


def _build_pooled_rows(
    config: TrainConfig, tables: Sequence[Table], plan: PlanFile, device: torch.device
) -> DistributedModelParallel:
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            feature_names=[table.name],
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            init_fn=partial(init_packed_rows_, factor_dim=table.embedding_dim - 1, std=config.init_std),
        )
        for table in tables
    ]
    ebc = EmbeddingBagCollection(tables=configs, is_weighted=_is_weighted(tables), device=torch.device("meta"))
    torch.manual_seed(config.seed)  # the dense part, alike on every rank
    model = DeepFMTrain(PooledRows(ebc, DENSE_IN_FEATURES, config.over_arch_layer_sizes, device))
    fuse_sparse_optimizer(ebc.parameters(), config)
    return DistributedModelParallel(
        model,
        device=device,
        plan=to_sharding_plan(plan, find_embedding_bags(model), device),
        sharders=[make_sharder(device)],  # type: ignore[list-item]
    )


def table_bytes(trained: TrainableModel) -> int:
    """Count this rank's bytes of tables and optimizer state, after a first step: some optimizers make it there."""
    weights = [value for name, value in trained.model.state_dict().items() if ".embedding_bags." in name]
    state = trained.optimizer.state_dict()["state"]
    moments = [value for name, values in state.items() if ".embedding_bags." in name for value in values.values()]
    return sum(_held(value) for value in (*weights, *moments))


def _held(value: Any) -> int:
    pieces = [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
    return sum(piece.numel() * piece.element_size() for piece in pieces if isinstance(piece, Tensor))


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How batches are drawn.

    Attributes:
        batch_size: B, of each rank.
        ids: ``zipf``: the k-th most frequent id is drawn in proportion to 1 / k, which ids of clicks come near;
            ``uniform``: every id alike, for which no cache helps.
        seed: the seed; each rank draws its own.
    """

    batch_size: int
    ids: Ids = "zipf"
    seed: int = 0


def batches(tables: Sequence[Table], options: BatchOptions, rank: int, count: int, device: torch.device) -> list[Batch]:
    """Draw the batches of a rank, the same for every plan.

    A bag of a table with pooling factor p has floor(p) ids and, with the probability of the remainder, one more.
    """
    if options.batch_size < 1 or count < 1:
        raise UserError("both must be at least 1", where=f"batch size {options.batch_size}, {count} batches")
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + rank)
    return [_batch(tables, options, generator).to(device) for _ in range(count)]


def _batch(tables: Sequence[Table], options: BatchOptions, generator: torch.Generator) -> Batch:
    lengths, values = [], []
    for table in tables:
        whole = int(table.pooling_factor)
        more = torch.rand(options.batch_size, generator=generator) < table.pooling_factor - whole
        lengths.append(whole + more.int())
        values.append(_ids(int(lengths[-1].sum()), table.num_embeddings, options.ids, generator))
    ids = torch.cat(values)
    return Batch(
        dense_features=torch.rand(options.batch_size, DENSE_IN_FEATURES, generator=generator),
        sparse_features=KeyedJaggedTensor(
            keys=[table.name for table in tables],
            values=ids,
            weights=torch.rand(len(ids), generator=generator) if _is_weighted(tables) else None,
            lengths=torch.cat(lengths),
        ),
        labels=torch.randint(2, (options.batch_size,), generator=generator),
    )


def _is_weighted(tables: Sequence[Table]) -> bool:
    """TorchRec's collection has weights for all ids or for none."""
    return any(table.weighted for table in tables)


def _ids(count: int, rows: int, how: Ids, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    if how == "uniform":
        ids = (uniform * rows).long()
    else:
        # The inverse of the cumulative weights of 1 / k, with the integral in place of the sum: rows^u - 1. Frequent
        # ids are spread over the table by a step that is prime to its size, as those of a hashed vocabulary are.
        ids = (torch.pow(float(rows + 1), uniform) - 1.0).long().clamp_(max=rows - 1) * _prime_to(rows) % rows
    return ids.clamp_(max=rows - 1).to(torch.int32 if rows <= 2**31 else torch.int64)  # as the loader gives them


def _prime_to(rows: int) -> int:
    step = max(int(rows * 0.618), 1)
    while math.gcd(step, rows) != 1:
        step += 1
    return step

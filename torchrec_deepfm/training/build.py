"""From a configuration to a sharded model, in TorchRec's order: meta tables, fused optimizer, plan, DMP, weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardingPlan

from torchrec_deepfm.model.deepfm import DeepFM, DeepFMTrain
from torchrec_deepfm.model.tables import embedding_tables
from torchrec_deepfm.sharding.initialize import initialize_tables
from torchrec_deepfm.sharding.planner import plan_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optimizers import fuse_sparse_optimizer

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A sharded model and the plan behind it."""

    model: DistributedModelParallel
    plan: ShardingPlan


def build_model(
    config: TrainConfig,
    num_embeddings: Mapping[str, int],
    dense_in_features: int,
    device: torch.device,
    *,
    is_weighted: bool = False,
    constraints: Mapping[str, ParameterConstraints] | None = None,
) -> Sharded:
    """Build ``DeepFMTrain`` sharded over the current process group; a collective.

    The weights depend on the seed and the tables alone, not on the plan or the number of ranks.

    Args:
        config: model, optimizer of the tables, seed.
        num_embeddings: rows of each categorical feature's table, in the order of the fields.
        dense_in_features: I.
        device: this rank's device.
        is_weighted: whether the batches carry weights, for all ids or for none (``bool(data.schema.weighted)``).
        constraints: for the planner, by table.

    Returns:
        The sharded model with its plan.

    Raises:
        UserError: the tables fit no plan, or a model option is bad.
    """
    tables = embedding_tables(num_embeddings, config.factor_dim, init_std=config.init_std)
    ebc = EmbeddingBagCollection(tables=tables, device=torch.device("meta"), is_weighted=is_weighted)
    torch.manual_seed(config.seed)  # the dense part, alike on every rank
    deepfm = DeepFM(
        ebc,
        dense_in_features,
        config.over_arch_layer_sizes,
        config.factor_dim,
        terms=config.terms,
        activation=_ACTIVATIONS[config.activation],
        dropout=config.dropout,
        batch_norm=config.batch_norm,
        init_std=config.init_std,
        dense_device=device,
    )
    replicated = {table.name for table in tables if table.num_embeddings <= config.data_parallel_rows}
    bags = {name: bag for name, bag in ebc.embedding_bags.items() if name not in replicated}
    fuse_sparse_optimizer([weight for bag in bags.values() for weight in bag.parameters()], config)
    train_model = DeepFMTrain(deepfm)
    plan, sharder = plan_model(
        train_model,
        tables,
        replicated=replicated,
        batch_size=config.batch_size,
        device=device,
        constraints=constraints,
    )
    model = DistributedModelParallel(train_model, device=device, plan=plan, sharders=[sharder])  # type: ignore[list-item]
    initialize_tables(model, tables, factor_dim=config.factor_dim, std=config.init_std, seed=config.seed)
    torch.manual_seed(config.seed + 1 + dist.get_rank())  # dropout: another stream on every rank
    return Sharded(model=model, plan=plan)

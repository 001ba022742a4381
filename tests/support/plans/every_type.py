"""A plan with every sharding type in it, made by TorchRec's own functions, on two hosts of two ranks."""

from typing import Any

import torch
from torchrec import EmbeddingBagCollection
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_deepfm import embedding_tables
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.plan.torchrec_plan import planned_tables
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder

PATH = "model.sparse_arch.embedding_bag_collection"
SIZES = {"a": 37, "b": 24, "c": 50, "d": 41, "e": 9, "f": 30, "g": 128}
TABLES: list[EmbeddingBagConfig] = embedding_tables(SIZES, factor_dim=255)  # 256 columns: grid_shard cuts at 128


def sharding_plan(device_type: str = "cpu") -> ShardingPlan:
    """TorchRec's plan; table e is table_column_wise."""
    ebc = EmbeddingBagCollection(tables=TABLES, device=torch.device("meta"))
    by_table: dict[str, Any] = {
        "t_a": data_parallel(),
        "t_b": table_wise(3),
        "t_c": row_wise(),
        "t_d": column_wise(ranks=[3, 0, 1, 0]),
        "t_e": column_wise(ranks=[2, 3]),
        "t_f": table_row_wise(host_index=1),
        "t_g": grid_shard(host_indexes=[1, 0]),
    }
    module: EmbeddingModuleShardingPlan = construct_module_sharding_plan(
        ebc, by_table, AllTypesSharder(), local_size=2, world_size=4, device_type=device_type
    )
    module["t_e"].sharding_type = "table_column_wise"
    for name, sharding in module.items():
        sharding.compute_kernel = "dense" if name == "t_a" else "fused"
    return ShardingPlan(plan={PATH: module})


def plan_file() -> PlanFile:
    """The same for a file."""
    tables = planned_tables(sharding_plan(), {PATH: TABLES}, world_size=4)
    return PlanFile(world_size=4, local_world_size=2, batch_size=512, search="by hand", tables=tables)

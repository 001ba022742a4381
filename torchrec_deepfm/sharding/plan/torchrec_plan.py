"""Plan files and TorchRec's ``ShardingPlan``, from one to the other."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    BoundsCheckMode,
    CacheAlgorithm,
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.types import DataType

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import TableSize
from torchrec_deepfm.sharding.plan.plan import PlanFile, PlannedShard, PlannedTable


def find_embedding_bags(module: nn.Module) -> str:
    """Return the path of the one ``EmbeddingBagCollection`` in a model, as its plan names it."""
    paths = [path for path, each in module.named_modules() if isinstance(each, EmbeddingBagCollection)]
    assert len(paths) == 1, f"{len(paths)} embedding bag collections: {paths}"
    return str(paths[0])


def to_sharding_plan(plan: PlanFile, path: str, device: torch.device) -> ShardingPlan:
    """Convert a plan that fits into what ``DistributedModelParallel`` takes; ``path`` is of ``find_embedding_bags``."""
    return ShardingPlan(plan={path: to_module_plan(plan.tables, plan.local_world_size, device)})


def to_module_plan(
    tables: Iterable[PlannedTable], local_world_size: int, device: torch.device
) -> EmbeddingModuleShardingPlan:
    """Convert the planned tables of one collection."""
    # A rank that sees no GPU but its own calls it cuda:0.
    gpus = 1 if device.type == "cuda" and torch.cuda.device_count() == 1 else local_world_size
    found = EmbeddingModuleShardingPlan()
    for table in tables:
        spec = None
        if table.sharding_type != ShardingType.DATA_PARALLEL.value:  # replicas overlap, which no spec may
            spec = EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_sizes=list(shard.sizes),
                        shard_offsets=list(shard.offsets),
                        placement=placement(device.type, shard.rank, gpus),
                    )
                    for shard in table.shards
                ]
            )
        found[table.name] = ParameterSharding(
            sharding_spec=spec,
            sharding_type=table.sharding_type,
            compute_kernel=table.compute_kernel,
            ranks=list(table.ranks),
            **_options_from_json(table.kernel_options),
        )
    return found


def planned_tables(
    plan: ShardingPlan, tables: Mapping[str, Iterable[TableSize]], world_size: int
) -> tuple[PlannedTable, ...]:
    """Convert TorchRec's plan into tables that can be written; SSD kernels are refused.

    ``tables`` are those of each of its modules, by path. Where there are several, a planned table names its own.
    """
    sizes = {
        path: {table.name: (table.num_embeddings, table.embedding_dim) for table in tables[path]} for path in plan.plan
    }
    return tuple(
        _planned_table(name, sizes[path][name], sharding, world_size, path if len(plan.plan) > 1 else "")
        for path, module in plan.plan.items()
        for name, sharding in module.items()  # type: ignore[attr-defined]
    )


def _planned_table(
    name: str, sizes: tuple[int, int], sharding: ParameterSharding, world_size: int, module: str
) -> PlannedTable:
    if isinstance(sharding.sharding_spec, EnumerableShardingSpec):
        shards = tuple(_shard(each) for each in sharding.sharding_spec.shards)
    else:
        shards = tuple(PlannedShard(rank=rank, offsets=(0, 0), sizes=sizes) for rank in range(world_size))
    return PlannedTable(
        name=name,
        module=module,
        num_embeddings=sizes[0],
        embedding_dim=sizes[1],
        sharding_type=sharding.sharding_type,
        compute_kernel=sharding.compute_kernel,
        kernel_options=_options_to_json(name, sharding),
        shards=shards,
    )


def _shard(shard: ShardMetadata) -> PlannedShard:
    rank = shard.placement.rank()  # type: ignore[union-attr]
    assert rank is not None
    (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
    return PlannedShard(rank=rank, offsets=(row, column), sizes=(rows, columns))


_ENUMS: dict[str, Any] = {
    "cache_algorithm": CacheAlgorithm,
    "cache_precision": DataType,
    "bounds_check_mode": BoundsCheckMode,
    "output_dtype": DataType,
}
_CACHE = ("algorithm", "load_factor", "reserved_memory", "precision", "prefetch_pipeline")
_PLAIN = ("enforce_hbm", "stochastic_rounding", "bounds_check_mode", "output_dtype")


def _options_to_json(name: str, sharding: ParameterSharding) -> dict[str, Any]:
    cache = sharding.cache_params
    if sharding.key_value_params is not None or (cache is not None and cache.multipass_prefetch_config is not None):
        raise UserError(
            "a plan file does not hold options of SSD kernels or of multipass prefetch", where=f"table {name}"
        )
    found = {option: getattr(sharding, option) for option in _PLAIN}
    if cache is not None:
        found |= {f"cache_{option}": getattr(cache, option) for option in _CACHE}
    return {option: value.name if option in _ENUMS else value for option, value in found.items() if value is not None}


def _options_from_json(options: Mapping[str, Any]) -> dict[str, Any]:
    values = {option: _ENUMS[option][value] if option in _ENUMS else value for option, value in options.items()}
    cache = {option: values[f"cache_{option}"] for option in _CACHE if f"cache_{option}" in values}
    plain = {option: values[option] for option in _PLAIN if option in values}
    return {**plain, **({"cache_params": CacheParams(**cache)} if cache else {})}

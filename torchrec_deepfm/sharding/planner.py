"""TorchRec's planner on the hardware at hand: GPUs where there are, else CPU ranks."""

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_deepfm.errors import UserError


def plan_model(
    module: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    *,
    replicated: AbstractSet[str],
    batch_size: int,
    device: torch.device,
    constraints: Mapping[str, ParameterConstraints] | None = None,
) -> tuple[ShardingPlan, EmbeddingBagCollectionSharder]:
    """Plan where the tables go with the stock planner; a collective over the current process group.

    Args:
        module: the model, its tables on ``meta``.
        tables: its tables.
        replicated: names of the tables to replicate (data_parallel, trained by the dense optimizer). The planner places
            the others, and never by replication: their optimizer is fused.
        batch_size: samples per rank and step.
        device: this rank's device.
        constraints: what the planner may do with single tables, by name, instead of the above.

    Returns:
        The plan, the same on every rank, and the sharder to apply it with.

    Raises:
        UserError: the tables fit no plan on this hardware.
    """
    sharder = _Sharder()
    sharded_types = [
        sharding_type
        for sharding_type in EmbeddingBagCollectionSharder().sharding_types(device.type)
        if sharding_type != ShardingType.DATA_PARALLEL.value
    ]
    replicate = ParameterConstraints(
        sharding_types=[ShardingType.DATA_PARALLEL.value], compute_kernels=[EmbeddingComputeKernel.DENSE.value]
    )
    shard = ParameterConstraints(sharding_types=sharded_types)
    allowed = {table.name: replicate if table.name in replicated else shard for table in tables}
    planner = EmbeddingShardingPlanner(
        topology=_topology(device),
        batch_size=batch_size,
        # The dense part, the activations and the optimizer of both; the heuristic one guesses from modules on meta.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        constraints={**allowed, **(constraints or {})},
    )
    try:
        plan = planner.collective_plan(module, [sharder], dist.group.WORLD)  # type: ignore[list-item]
    except PlannerError as error:
        gib = sum(table.num_embeddings * table.embedding_dim * 4 for table in tables) / 2**30
        whole = f", {len(replicated)} of {len(tables)} replicated on every rank" if replicated else ""
        raise UserError(
            f"the tables ({gib:.1f} GiB of weights{whole}) fit no plan on {dist.get_world_size()} {device.type} rank(s) "
            f"({error.error_type.value}): use more ranks (-j), a smaller --factor-dim or a larger prepare --min-count"
        ) from error
    return plan, sharder


class _Sharder(EmbeddingBagCollectionSharder):
    """Knows row-wise sharding on CPU as well, which runs there; the stock one offers it on GPUs only.

    The planner takes it where a table's constraints name it.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(dict.fromkeys([*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value]))


def _topology(device: torch.device) -> Topology:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=dist.get_world_size(), local_world_size=local_world_size),
        HardwareConfig(hbm_cap_bytes=hbm, ddr_cap_bytes=host_memory // local_world_size),
        KernelConfig(compute_device=device.type),
    )

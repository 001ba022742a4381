"""Who holds what: a plan for the ranks at hand, by TorchRec's planner or the balanced one; or a saved plan."""

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.launch.processes import local_world_size, pod_size
from torchrec_deepfm.sharding.estimate import memory_by_rank, storage_estimator, with_prediction
from torchrec_deepfm.sharding.inputs.constraints import in_device_memory
from torchrec_deepfm.sharding.inputs.hardware import RESERVED, Hardware
from torchrec_deepfm.sharding.inputs.sharding_types import COLUMN_TYPES, SparseOptimizer, default_min_partition
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.inputs.topology import topology as hardware_topology
from torchrec_deepfm.sharding.plan.io import load_plan
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.plan.torchrec_plan import planned_tables
from torchrec_deepfm.sharding.plan.validate import check_fits, check_memory
from torchrec_deepfm.sharding.runtime.planner_errors import run_planner
from torchrec_deepfm.sharding.search.plan_tables import Planning

DATA_PARALLEL_ROWS = "--data-parallel-rows"
_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
_WINS = 0.99  # less than a percent of difference is below what any estimate says


def plan_model(
    module: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    *,
    replicated: AbstractSet[str],
    batch_size: int,
    device: torch.device,
    sharder: EmbeddingBagCollectionSharder,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    topology: Topology | None = None,
    hardware: Hardware | None = None,
    optimizer: SparseOptimizer = "rowwise_adagrad",
    ema: bool = False,
) -> PlanFile:
    """Plan where the tables go; on one rank, for all ranks of the process group.

    TorchRec's planner plans. Where the hardware is known and the balanced search predicts faster steps for it, its plan
    is taken; without ``hardware`` TorchRec's planner plans for its own bandwidths.

    The tables of ``replicated`` are data_parallel, as their optimizer wants it. The planner places the others, and
    replicates one only where its constraints ask for it. With ``ema`` a moving average takes as much memory as the
    weights, and every table stays in the device's memory.

    UserError: the tables fit no plan on this hardware, or the constraints shard a table of ``replicated``.
    """
    constraints = constraints or {}
    kinds = {name: each.sharding_types for name, each in constraints.items() if each.sharding_types}
    check_replicated(replicated, kinds, tables, "--constraint")
    if topology is None:
        topology = hardware_topology(hardware, dist.get_world_size()) if hardware else local_topology(device)
    given = in_device_memory(tables, constraints) if ema else constraints
    allowed = {table.name: _allowed(table, replicated, given, device) for table in tables}
    estimators = [
        EmbeddingPerfEstimatorFactory.create(DEFAULT_PERF_ESTIMATOR, topology=topology, constraints=allowed),
        storage_estimator(topology, allowed, ema=ema),
    ]
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=EmbeddingEnumerator(topology, batch_size, allowed, estimators),
        # The dense part, the activations and the optimizer of both; the heuristic one guesses from modules on meta.
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED),
        constraints=allowed,
    )
    made = run_planner(planner, module, [sharder], ema=ema)
    plan = PlanFile(
        world_size=topology.world_size,
        local_world_size=topology.local_world_size,
        pod_size=topology.intra_group_size // topology.local_world_size,
        batch_size=batch_size,
        search="constraints" if constraints else "torchrec",
        tables=planned_tables(made, dict.fromkeys(made.plan, tables), topology.world_size),
    )
    if hardware is None or topology.world_size == 1 or len(replicated) == len(tables):
        return plan
    free = {
        name: replace(each, min_partition=given[name].min_partition if name in given else None)
        for name, each in allowed.items()
    }
    listed = [table_of(table, free[table.name]) for table in tables]
    plan = with_prediction(plan, listed, hardware, optimizer=optimizer, ema=ema)
    balanced = Planning(
        listed, hardware, topology.world_size, batch_size, constraints=free, optimizer=optimizer, ema=ema
    ).plan()
    assert balanced.predicted is not None
    assert plan.predicted is not None
    return balanced if balanced.predicted.critical_path_ms < plan.predicted.critical_path_ms * _WINS else plan


def read_fitting_plan(
    path: Path,
    tables: Sequence[EmbeddingBagConfig],
    *,
    replicated: AbstractSet[str],
    device: torch.device,
    batch_size: int,
    optimizer: SparseOptimizer,
    ema: bool,
) -> PlanFile:
    """Read a plan for these tables and the ranks of the process group, on one rank; options as in ``plan_model``.

    UserError: it can't be read, is not sound, or does not fit the tables, the ranks or their memory.
    """
    plan = load_plan(path)
    where = f"--plan {path}"
    check_fits(
        plan,
        tables,
        dist.get_world_size(),
        local_world_size=local_world_size(),
        pod_size=pod_size(),
        compute_device=device.type,
        where=where,
    )
    # Where no table depends on hosts, the plan may run on hosts of another size.
    plan = replace(plan, local_world_size=local_world_size(), pod_size=pod_size())
    check_replicated(replicated, {table.name: [table.sharding_type] for table in plan.tables}, tables, where)
    topology = local_topology(device)
    sizes = [table_of(table) for table in tables]
    held = memory_by_rank(plan, sizes, topology, batch_size=batch_size, optimizer=optimizer, ema=ema)
    for tier in ("hbm", "ddr"):
        check_memory(
            [getattr(each, tier) for each in held],
            [int((1 - RESERVED) * getattr(rank.storage, tier)) for rank in topology.devices],
            what="GPU memory" if tier == "hbm" else "memory",
            ema=ema,
            where=where,
        )
    return plan


def table_of(table: EmbeddingBagConfig, constraint: ParameterConstraints | None = None) -> Table:
    """Describe a model's table to the balanced search."""
    pooling = (constraint or ParameterConstraints()).pooling_factors
    return Table(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        pooling_factor=sum(pooling) / len(pooling),
    )


def check_replicated(
    replicated: AbstractSet[str],
    kinds: Mapping[str, Sequence[str]],
    tables: Sequence[EmbeddingBagConfig],
    where: str,
) -> None:
    """Check that every table which the dense optimizer trains may be data_parallel.

    ``--data-parallel-rows`` decides who trains a table, and so what is learnt; a plan only decides where it lies.
    """
    rows = {table.name: table.num_embeddings for table in tables}
    for name in sorted(replicated & kinds.keys(), key=lambda name: rows[name]):
        if _DATA_PARALLEL not in kinds[name]:
            raise UserError(
                f"table {name} is to be {' or '.join(kinds[name])}, but has {rows[name]:,} rows, and "
                "--data-parallel-rows leaves tables of so few rows to Adam, which trains them "
                "data_parallel",
                where=where,
                remedy=f"lower it to {rows[name] - 1}",
            )


def local_topology(device: torch.device) -> Topology:
    """Describe the ranks of the process group to TorchRec's planner: their memory, and its own bandwidths."""
    world_size, local = dist.get_world_size(), local_world_size()
    if world_size % local:
        raise UserError(
            "the planner needs equal hosts",
            where=f"{world_size} ranks with {local} on this host",
            remedy=f"start {local} on each",
        )
    pods = pod_size()
    if world_size % (local * pods):
        raise UserError(
            f"{world_size} ranks on hosts of {local} do not fill NVLink domains of "
            f"TORCHREC_RESOLVED_POD_SIZE={pods} hosts",
            remedy=f"start a multiple of {local * pods} ranks, or set another number",
        )
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local, pod_size=pods if pods > 1 else None),
        HardwareConfig(hbm_cap_bytes=hbm, ddr_cap_bytes=host_memory // local),
        KernelConfig(compute_device=device.type),
    )


def _allowed(
    table: EmbeddingBagConfig,
    replicated: AbstractSet[str],
    constraints: Mapping[str, ParameterConstraints],
    device: torch.device,
) -> ParameterConstraints:
    """What the planner may do with a table."""
    given = constraints.get(table.name, ParameterConstraints())
    kinds = given.sharding_types or [
        kind for kind in EmbeddingBagCollectionSharder().sharding_types(device.type) if kind != _DATA_PARALLEL
    ]
    if table.name in replicated:
        return replace(given, sharding_types=[_DATA_PARALLEL], compute_kernels=[EmbeddingComputeKernel.DENSE.value])
    min_partition = given.min_partition
    # Without a width TorchRec takes 128 columns, and so leaves narrower tables whole, whatever type was asked for.
    if min_partition is None and given.sharding_types and set(kinds) & set(COLUMN_TYPES):
        min_partition = default_min_partition(table.embedding_dim)
    return replace(given, sharding_types=kinds, min_partition=min_partition)

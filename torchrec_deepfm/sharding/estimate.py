"""What a plan costs, by TorchRec's estimators, every term of it.

For each shard TorchRec estimates six terms in milliseconds: the look-up and the update of rows (``fwd_compute``,
``bwd_compute``), the exchange of pooled rows and of their gradients (``fwd_comms``, ``bwd_comms``), ``prefetch`` of
cached rows, and the exchange of ids (``input_dist_comms``, corrected in ``perf_config``). Its ``Perf.total``, by which
its planner chooses, leaves the last one out. Here a rank's time is the sum of all six over its shards, and the
**critical path** is the time of the slowest rank. The fixed costs of ``hardware.extra`` (``EXTRA`` lists them) are
added. ``plan.Objective`` lists the other ways to add the terms up.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    Shard,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name
from torchrec.distributed.types import CacheParams, ModuleSharder
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.sharding_types import SparseOptimizer
from torchrec_deepfm.sharding.inputs.sparse_optimizers import SPARSE_OPTIMIZERS
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.inputs.topology import topology
from torchrec_deepfm.sharding.perf_config import ARRIVING_IDS
from torchrec_deepfm.sharding.plan.plan import Cost, PlanCost, PlanFile, PlannedTable


def table_module(tables: Sequence[Table], optimizer: SparseOptimizer = "rowwise_adagrad") -> nn.Module:
    """Make a model of the tables alone on ``meta`` for a planner; weighted tables are a collection of their own."""
    model = nn.ModuleDict()
    for weighted in (False, True):
        chosen = [table for table in tables if table.weighted == weighted]
        if not chosen:
            continue
        collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table.name,
                    feature_names=list(table.feature_names),
                    num_embeddings=table.num_embeddings,
                    embedding_dim=table.embedding_dim,
                )
                for table in chosen
            ],
            is_weighted=weighted,
            device=torch.device("meta"),
        )
        for parameter in collection.parameters():
            # What apply_optimizer_in_backward leaves on a parameter, and what the storage estimator reads.
            parameter._optimizer_classes = [SPARSE_OPTIMIZERS[optimizer][0]]  # type: ignore[attr-defined]
        model["weighted_tables" if weighted else "tables"] = collection
    return model


def table_constraints(tables: Iterable[Table]) -> dict[str, ParameterConstraints]:
    """Make constraints by table that allow everything and hold the number of ids per sample."""
    return {
        table.name: ParameterConstraints(pooling_factors=[table.pooling_factor], is_weighted=table.weighted)
        for table in tables
    }


class SharedShardEstimator(ShardEstimator):
    """Runs an estimator once for shards that are alike, instead of once for each.

    TorchRec's estimators use a shard's size only, and a table on 1,024 ranks has 1,024 shards of two sizes. All
    shards of a size then share one ``Perf`` and one ``Storage``.

    Args:
        estimator: One of TorchRec's estimators.
        shard_ms: Fixed milliseconds of each shard, on top of its look-up and update.
    """

    def __init__(self, estimator: ShardEstimator, shard_ms: float = 0.0) -> None:
        self._estimator = estimator
        self._shard_ms = shard_ms

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fill in ``perf`` or ``storage`` of every shard, in place."""
        whole = [option.shards for option in sharding_options]
        alike = [_one_of_each_size(shards) for shards in whole]
        for option, sizes in zip(sharding_options, alike, strict=True):
            option.shards = list(sizes.values())
        try:
            self._estimator.estimate(sharding_options, sharder_data_map)
        finally:
            for option, shards in zip(sharding_options, whole, strict=True):
                option.shards = shards
        for shards, sizes in zip(whole, alike, strict=True):
            if self._shard_ms:
                for each in sizes.values():
                    if each.perf is not None:
                        # Backward takes twice the forward's time, in TorchRec's model of the kernels.
                        each.perf = each.perf + Perf(self._shard_ms / 3, 0.0, self._shard_ms * 2 / 3, 0.0)
            for shard in shards:
                one = sizes[tuple(shard.size)]
                shard.perf, shard.storage = one.perf, one.storage


def _one_of_each_size(shards: Iterable[Shard]) -> dict[tuple[int, ...], Shard]:
    found: dict[tuple[int, ...], Shard] = {}
    for shard in shards:
        key = tuple(shard.size)
        if key not in found:
            found[key] = Shard(size=shard.size, offset=shard.offset, perf=shard.perf, storage=shard.storage)
    return found


class EmaStorageEstimator(ShardEstimator):
    """Adds the moving average of a shard's weights (``train --ema``) to its memory.

    The average lies beside the weights, and only kernels that keep all weights in the device's memory have one.
    ``on_gpu``: the device's memory is HBM.
    """

    def __init__(self, estimator: ShardEstimator, *, on_gpu: bool) -> None:
        self._estimator = estimator
        self._on_gpu = on_gpu

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fill in ``storage`` of every shard."""
        self._estimator.estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            for shard in option.shards:
                assert shard.storage is not None
                average = math.prod(shard.size) * option.tensor.element_size()
                shard.storage += Storage(hbm=average, ddr=0) if self._on_gpu else Storage(hbm=0, ddr=average)


def storage_estimator(
    planner_topology: Topology, constraints: dict[str, ParameterConstraints] | None, *, ema: bool
) -> ShardEstimator:
    """Make TorchRec's estimator of memory, with the moving average on top where there is one."""
    estimator = EmbeddingStorageEstimator(topology=planner_topology, constraints=constraints)
    return EmaStorageEstimator(estimator, on_gpu=planner_topology.compute_device != "cpu") if ema else estimator


def shard_estimators(
    planner_topology: Topology,
    constraints: dict[str, ParameterConstraints] | None,
    *,
    shard_ms: float = 0.0,
    ema: bool = False,
) -> list[ShardEstimator]:
    """Make TorchRec's estimators of times and of memory, with the ids that arrive, run once for equal shards."""
    perf = EmbeddingPerfEstimatorFactory.create(ARRIVING_IDS, topology=planner_topology, constraints=constraints)
    storage = storage_estimator(planner_topology, constraints, ema=ema)
    return [SharedShardEstimator(perf, shard_ms), SharedShardEstimator(storage)]


def cost_of(perf: Perf, storage: Storage) -> Cost:
    """Combine TorchRec's estimates of a shard; the total holds every term."""
    return Cost(
        total_ms=perf.total + perf.input_dist_comms,
        fwd_compute_ms=perf.fwd_compute,
        fwd_comms_ms=perf.fwd_comms,
        bwd_compute_ms=perf.bwd_compute,
        bwd_comms_ms=perf.bwd_comms,
        prefetch_ms=perf.prefetch_compute,
        input_dist_comms_ms=perf.input_dist_comms,
        hbm_bytes=storage.hbm,
        ddr_bytes=storage.ddr,
    )


def predict_plan(
    plan: PlanFile,
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int | None = None,
    batch_size: int | None = None,
    *,
    optimizer: SparseOptimizer = "rowwise_adagrad",
    ema: bool = False,
) -> PlanCost:
    """Predict what a step of any plan costs on some hardware: milliseconds and bytes, by rank.

    Arguments and errors are those of ``with_prediction``.
    """
    predicted = with_prediction(plan, tables, hardware, ranks, batch_size, optimizer=optimizer, ema=ema).predicted
    assert predicted is not None
    return predicted


def with_prediction(
    plan: PlanFile,
    tables: Sequence[Table],
    hardware: Hardware,
    ranks: int | None = None,
    batch_size: int | None = None,
    *,
    optimizer: SparseOptimizer = "rowwise_adagrad",
    ema: bool = False,
) -> PlanFile:
    """Fill in the hardware, and what each shard and each rank of a plan costs.

    ``ranks`` and ``batch_size`` are the plan's by default. The memory is that of ``optimizer``, with a moving average
    of the weights where ``ema``. UserError: the plan is for other tables or another number of ranks, or no batch size
    is known.
    """
    if ranks not in (None, plan.world_size):
        raise UserError(f"the plan is for {plan.world_size} ranks, not for {ranks}", remedy=f"plan again for {ranks}")
    batch_size = plan.batch_size if batch_size is None else batch_size
    if batch_size is None:
        raise UserError("the plan does not hold the samples per rank", remedy="give --batch-size")
    if hardware.local_world_size(plan.world_size) != plan.local_world_size:
        raise UserError(
            f"the plan has {plan.local_world_size} ranks on a host, {hardware.name} has "
            f"{hardware.local_world_size(plan.world_size)}",
            remedy=f"name hardware with ranks_per_host = {plan.local_world_size}",
        )
    estimators = shard_estimators(
        topology(hardware, plan.world_size),
        table_constraints(tables),
        shard_ms=hardware.extra.get("shard_ms", 0.0),
        ema=ema,
    )
    estimator = _PlanEstimator(tables, estimators, batch_size, optimizer)
    planned = [estimator.fill_in(table) for table in plan.tables]
    sharding_types = {table.sharding_type for table in planned}
    fixed = hardware.extra.get("step_ms", 0.0) + len(sharding_types) * hardware.extra.get("group_ms", 0.0)
    per_rank = _sum_by_rank(planned, plan.world_size, fixed)
    totals = [cost.total_ms for cost in per_rank]
    return replace(
        plan,
        batch_size=batch_size,
        tables=tuple(planned),
        hardware=hardware,
        predicted=PlanCost(critical_path_ms=max(totals), mean_ms=sum(totals) / len(totals), per_rank=tuple(per_rank)),
    )


def memory_by_rank(
    plan: PlanFile,
    tables: Sequence[Table],
    planner_topology: Topology,
    *,
    batch_size: int,
    optimizer: SparseOptimizer,
    ema: bool,
) -> list[Storage]:
    """Estimate the bytes that a plan's tables take on each rank, rank 0 first.

    They are weights, optimizer state, moving average (``ema``), ids and pooled rows.
    """
    storage = storage_estimator(planner_topology, table_constraints(tables), ema=ema)
    estimator = _PlanEstimator(tables, [storage], batch_size, optimizer)
    held = [Storage(hbm=0, ddr=0) for _ in range(plan.world_size)]
    for table in plan.tables:
        needed = {tuple(shard.size): shard.storage for shard in estimator.estimate(table)}
        for shard in table.shards:
            each = needed[shard.sizes]
            assert each is not None
            held[shard.rank] += each
    return held


class _PlanEstimator:
    """Estimates the shards of planned tables; the tables of a model share one module and one topology."""

    def __init__(
        self,
        tables: Sequence[Table],
        estimators: Sequence[ShardEstimator],
        batch_size: int,
        optimizer: SparseOptimizer,
    ) -> None:
        self._batch_size = batch_size
        self._tables = {table.name: table for table in tables}
        self._modules = {
            name: (path, module, parameter)
            for path, module in table_module(tables, optimizer).named_children()
            for name, parameter in _parameters(module)
        }
        sharder: ModuleSharder[nn.Module] = EmbeddingBagCollectionSharder()  # type: ignore[assignment]
        self._sharder_data = build_sharder_data_map({sharder_name(sharder.module_type): sharder})
        self._estimators = estimators

    def fill_in(self, planned: PlannedTable) -> PlannedTable:
        costs = {}
        for shard in self.estimate(planned):
            assert shard.perf is not None
            assert shard.storage is not None
            costs[shard.size[0], shard.size[1]] = cost_of(shard.perf, shard.storage)
        return replace(planned, shards=tuple(replace(shard, predicted=costs[shard.sizes]) for shard in planned.shards))

    def estimate(self, planned: PlannedTable) -> list[Shard]:
        """One shard of each size that a table's shards have, with its estimates."""
        table = self._tables.get(planned.name)
        sizes = list(dict.fromkeys(shard.sizes for shard in planned.shards))
        if table is None:
            known = ", ".join(list(self._tables)[:3])
            raise UserError(
                f"the plan has a table {planned.name}, which is not among {known}, ...", remedy="name its tables"
            )
        if (table.num_embeddings, table.embedding_dim) != (planned.num_embeddings, planned.embedding_dim):
            raise UserError(
                f"{planned.num_embeddings} x {planned.embedding_dim} in the plan, {table.num_embeddings} x "
                f"{table.embedding_dim} in the list of tables",
                where=f"table {planned.name}",
                remedy="plan again, or name its tables",
            )
        path, module, parameter = self._modules[planned.name]
        option = ShardingOption(
            name=planned.name,
            tensor=parameter,
            module=(path, module),
            input_lengths=[table.pooling_factor],
            batch_size=self._batch_size,
            sharding_type=planned.sharding_type,
            partition_by=get_partition_by_type(planned.sharding_type),
            compute_kernel=planned.compute_kernel,
            shards=[Shard(size=list(size), offset=[0, 0]) for size in sizes],
            cache_params=_cache_params(planned),
            is_pooled=True,
        )
        for estimator in self._estimators:
            estimator.estimate([option], self._sharder_data)
        return option.shards


def _parameters(collection: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for name, parameter in collection.named_parameters():
        yield name.split(".")[-2], parameter  # embedding_bags.<table>.weight


def _cache_params(planned: PlannedTable) -> CacheParams | None:
    load_factor = planned.kernel_options.get("cache_load_factor")
    if planned.compute_kernel != EmbeddingComputeKernel.FUSED_UVM_CACHING.value or load_factor is None:
        return None
    return CacheParams(load_factor=load_factor)


def _sum_by_rank(tables: Iterable[PlannedTable], ranks: int, fixed_ms: float) -> list[Cost]:
    names = list(Cost.__dataclass_fields__)
    sums = [dict.fromkeys(names, 0.0) for _ in range(ranks)]
    for table in tables:
        for shard in table.shards:
            assert shard.predicted is not None
            for name in names:
                sums[shard.rank][name] += getattr(shard.predicted, name)
    return [
        Cost(
            **{name: int(value) if name.endswith("_bytes") else value for name, value in each.items()}
            | {"total_ms": each["total_ms"] + fixed_ms}  # type: ignore[arg-type]
        )
        for each in sums
    ]

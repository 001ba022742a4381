"""From a configuration to a sharded model, in TorchRec's order: meta tables, fused optimizer, plan, DMP, weights."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingPlan, ShardingType

from torchrec_deepfm.distributed.process_group import on_main
from torchrec_deepfm.errors import UserError, flag
from torchrec_deepfm.launch.processes import local_world_size
from torchrec_deepfm.model.deepfm import DeepFM, DeepFMTrain
from torchrec_deepfm.model.tables import embedding_tables
from torchrec_deepfm.sharding.inputs.constraints import parse_constraints
from torchrec_deepfm.sharding.inputs.sharding_types import COLUMN_TYPES, IN_MEMORY_KERNELS
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.plan.torchrec_plan import find_embedding_bags, to_sharding_plan
from torchrec_deepfm.sharding.runtime.init_tables import initialize_tables
from torchrec_deepfm.sharding.runtime.local_hardware import known_hardware
from torchrec_deepfm.sharding.runtime.plan_model import DATA_PARALLEL_ROWS, plan_model, read_fitting_plan
from torchrec_deepfm.sharding.runtime.sharder import make_sharder
from torchrec_deepfm.training.config import CompileDense, TrainConfig
from torchrec_deepfm.training.optim.optimizers import fuse_sparse_optimizer
from torchrec_deepfm.training.optim.regularisers import penalise_looked_up_rows

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A sharded model and the plan behind it, in TorchRec's form and in that of a plan file."""

    model: DistributedModelParallel
    plan: ShardingPlan
    plan_file: PlanFile

    @property
    def prefetch(self) -> bool:
        """Whether the plan caches rows on the device that the pipeline is to fetch ahead."""
        return any(table.compute_kernel == _CACHING for table in self.plan_file.tables)


def make_deepfm(
    config: TrainConfig,
    num_embeddings: Mapping[str, int],
    dense_in_features: int,
    dense_device: torch.device,
    *,
    dense_widths: Sequence[int] = (),
    is_weighted: bool = False,
) -> DeepFM:
    """Make the unsharded model of a configuration with its initial weights, the tables on ``meta``."""
    tables = embedding_tables(num_embeddings, config.factor_dim, init_std=config.init_std)
    return DeepFM(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta"), is_weighted=is_weighted),
        dense_in_features,
        config.over_arch_layer_sizes,
        config.factor_dim,
        dense_widths=dense_widths,
        terms=config.terms,
        activation=_ACTIVATIONS[config.activation],
        dropout=config.dropout,
        batch_norm=config.batch_norm,
        init_std=config.init_std,
        dense_device=dense_device,
    )


def build_model(
    config: TrainConfig,
    num_embeddings: Mapping[str, int],
    dense_in_features: int,
    device: torch.device,
    *,
    dense_widths: Sequence[int] = (),
    is_weighted: bool = False,
    constraints: Mapping[str, ParameterConstraints] | Sequence[str] = (),
    plan: Path | PlanFile | None = None,
    hardware: str | None = None,
    negative_rate: float = 1.0,
    compile_dense: CompileDense = "off",
) -> Sharded:
    """Build ``DeepFMTrain`` sharded over the current process group; a collective.

    The initial weights depend only on the seed and the tables, not on the plan or the number of ranks.

    Args:
        config: model, optimizer of the tables, seed.
        num_embeddings: rows of each categorical feature's table, in the order of the fields.
        dense_in_features: I.
        device: this rank's device.
        dense_widths: as in ``DeepFM``.
        is_weighted: whether the batches carry weights, for all ids or for none (``bool(data.schema.weighted)``).
        constraints: for the planner, by table; or rules, see ``sharding.inputs.constraints``.
        hardware: what the ranks run on, for the planner: a preset or a TOML file. Default: the GPU's preset.
        plan: a fitting plan, or a plan file that rank 0 reads, to use instead of the planner.
        negative_rate: as in ``DeepFMTrain``.
        compile_dense: mode in which to compile everything after the look-ups.

    Returns:
        The sharded model with its plan.

    Raises:
        UserError: no plan fits the tables, the given plan does not fit, a constraint or a model option is invalid, or
            an option contradicts the tables' optimizer.
    """
    if plan is not None and constraints:
        raise UserError(
            "a plan already places every table", where="--plan and --constraint", remedy="leave one of them out"
        )
    sharder = make_sharder(device, *config.qcomms_both)
    torch.manual_seed(config.seed)  # the dense part is equal on every rank
    # Drawn on the CPU and moved, so that a training starts from the same weights on every device.
    cpu = torch.device("cpu")
    deepfm = make_deepfm(
        config, num_embeddings, dense_in_features, cpu, dense_widths=dense_widths, is_weighted=is_weighted
    )
    _move_dense(deepfm, device)
    if compile_dense != "off":
        deepfm.compile_dense_path(compile_dense)
    ebc = deepfm.sparse_arch.embedding_bag_collection
    assert isinstance(ebc, EmbeddingBagCollection)
    tables = ebc.embedding_bag_configs()
    penalise_looked_up_rows(deepfm.sparse_arch, config, device)
    adam = config.sparse_optimizer == "adam"
    small = {table.name for table in tables if table.num_embeddings <= config.data_parallel_rows}
    if not adam:
        bags = {name: bag for name, bag in ebc.embedding_bags.items() if name not in small}
        _check_penalties(config, list(bags))
        fuse_sparse_optimizer([weight for bag in bags.values() for weight in bag.parameters()], config)
    train_model = DeepFMTrain(deepfm, negative_rate)

    def find_plan() -> PlanFile:
        if isinstance(plan, PlanFile):
            return plan
        if plan is not None:
            return read_fitting_plan(
                plan,
                tables,
                replicated=small,
                device=device,
                batch_size=config.batch_size,
                optimizer=config.sparse_optimizer,
                ema=bool(config.ema),
            )
        by_table = constraints
        if not isinstance(by_table, Mapping):
            by_table = parse_constraints(
                by_table,
                tables,
                compute_device=device.type,
                world_size=dist.get_world_size(),
                local_world_size=local_world_size(),
            )
        if adam:
            by_table = {name: _without_column_types(one) for name, one in by_table.items()}
        # Adam's tables are sharded where a constraint asks for it.
        free = {table.name for table in tables} - {name for name, one in by_table.items() if one.sharding_types}
        return plan_model(
            train_model,
            tables,
            replicated=small | free if adam else small,
            batch_size=config.batch_size,
            device=device,
            sharder=sharder,
            constraints=by_table,
            hardware=known_hardware(hardware, device),
            optimizer=config.sparse_optimizer,
            ema=bool(config.ema),
        )

    found = on_main(find_plan)
    sharding_plan = to_sharding_plan(found, find_embedding_bags(train_model), device)
    _check_plan(config, sharding_plan, small)
    if adam:
        _without_fused_optimizer(sharding_plan)
    _prefetch_caches(sharding_plan)
    model = DistributedModelParallel(train_model, device=device, plan=sharding_plan, sharders=[sharder])  # type: ignore[list-item]
    initialize_tables(model, tables, factor_dim=config.factor_dim, std=config.init_std, seed=config.seed)
    torch.manual_seed(config.seed + 1 + dist.get_rank())  # dropout: another stream on every rank
    return Sharded(model=model, plan=sharding_plan, plan_file=found)


def _move_dense(deepfm: DeepFM, device: torch.device) -> None:
    """Move everything but the tables, which are on ``meta``."""
    for module in deepfm.children():
        if module is not deepfm.sparse_arch:
            module.to(device)
    deepfm.bias.data = deepfm.bias.data.to(device)


def _prefetch_caches(plan: ShardingPlan) -> None:
    """Let the caches of a plan be filled one batch ahead, as ``PrefetchTrainPipelineSparseDist`` does."""
    for module in plan.plan.values():
        for sharding in module.values():  # type: ignore[attr-defined]
            if sharding.compute_kernel == _CACHING:
                sharding.cache_params = replace(sharding.cache_params or CacheParams(), prefetch_pipeline=True)


def _check_penalties(config: TrainConfig, fused: Sequence[str]) -> None:
    """Refuse penalties on whole tables with a fused optimizer, which sees only the rows of the batch."""
    for option in ("embedding_l2", "linear_l2"):
        if getattr(config, option) and fused:
            raise UserError(
                f"this penalty is on whole tables, but {config.sparse_optimizer}, which trains {fused[0]}, "
                "sees only the rows of each batch",
                where=f"{flag(option)} {getattr(config, option)}",
                remedy=f"add --sparse-optimizer adam, or take {flag(f'touched_{option}')}",
            )


def _check_plan(config: TrainConfig, plan: ShardingPlan, small: AbstractSet[str]) -> None:
    """Refuse a plan that shards what ``data_parallel_rows`` replicates, or that the options do not support.

    What every step reads as a whole can't lie behind a cache, and Adam wants whole rows in the device's memory.
    """
    adam = config.sparse_optimizer == "adam"
    decays = bool(config.embedding_weight_decay)
    whole = {"--sparse-optimizer adam": adam, "--ema": bool(config.ema), "--embedding-weight-decay": decays}
    reads_all = next((option for option, value in whole.items() if value), None)
    for module in plan.plan.values():
        for name, sharding in module.items():  # type: ignore[attr-defined]
            kind, where = sharding.sharding_type, f"table {name}"
            if kind == _DATA_PARALLEL:
                continue
            if name in small:
                raise UserError(
                    f"the plan shards it ({kind}), but {DATA_PARALLEL_ROWS} {config.data_parallel_rows} replicates it",
                    where=where,
                    remedy="plan it as data_parallel, or change the option",
                )
            if reads_all and sharding.compute_kernel not in IN_MEMORY_KERNELS:
                raise UserError(
                    f"the plan keeps it out of the device's memory ({sharding.compute_kernel}), where {reads_all} "
                    "would read stale rows or move all of them at each step",
                    where=where,
                    remedy=f"plan it as fused, or leave out {reads_all}",
                )
            if adam and kind in COLUMN_TYPES:
                raise UserError(
                    f"the plan cuts its columns ({kind}), but --sparse-optimizer adam steps on whole rows",
                    where=where,
                    remedy="plan it as table_wise or row_wise, or take another optimizer",
                )
            if adam and config.clip_embedding == "cowclip":
                raise UserError(
                    f"the plan shards it ({kind}), but --clip-embedding cowclip clips the rows of Adam's tables where "
                    "they are replicated",
                    where=where,
                    remedy="plan it as data_parallel, or leave one of these options out",
                )


def _without_column_types(constraints: ParameterConstraints) -> ParameterConstraints:
    """Leave out the types that cut columns, where there are others."""
    kinds = constraints.sharding_types or []
    whole = [kind for kind in kinds if kind not in COLUMN_TYPES]
    return replace(constraints, sharding_types=whole) if whole else constraints


def _without_fused_optimizer(plan: ShardingPlan) -> None:
    """Let sharded tables have gradients of all their rows, for an optimizer that FBGEMM does not fuse."""
    for module in plan.plan.values():
        for sharding in module.values():  # type: ignore[attr-defined]
            sharding.compute_kernel = EmbeddingComputeKernel.DENSE.value

"""Every useful way to shard a table: TorchRec's types at every width of a column shard."""

import warnings
from typing import Final

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import BATCH_SIZE, POOLING_FACTOR
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Shard,
    ShardEstimator,
    ShardingOption,
    Topology,
)
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder, ShardingType

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import (
    COLUMN_TYPES,
    WIDE_ENOUGH,
    default_min_partition,
    why_rows_impossible,
)
from torchrec_deepfm.sharding.inputs.tables import Table

MIN_WIDTH: Final = 8

_UVM: Final = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)


class WidthEnumerator(EmbeddingEnumerator):
    """Offers, besides what TorchRec's enumerator does, column shards of every width, and grid_shard unasked.

    TorchRec's offers one width per table, 128 columns unless a constraint sets another, and grid_shard only where a
    constraint names it. Constraints apply here as well: ``min_partition`` fixes the width, listed types and kernels are
    the only ones.

    All that TorchRec's enumerator offers is offered here, except what could only make a plan worse, or no plan at all
    (unless a constraint leaves nothing else): table_column_wise, which by the estimates is column_wise with fewer
    places; types that can't run (``sharding_types.why_rows_impossible``); and kernels that keep rows in host memory if
    ``host_memory`` is false. Of the narrower widths those that make more blocks than hosts, or more column shards than
    ranks, are left out too.

    Args:
        topology: The ranks.
        batch_size: Samples per rank and step.
        constraints: As for TorchRec's enumerator.
        estimator: As for TorchRec's enumerator.
        use_exact_enumerate_order: As for TorchRec's enumerator.
        min_width: Columns of a shard at least; a multiple of 4. Narrow shards mean many small kernels and rows that
            fill no cache line, which the estimators do not count.
        host_memory: Whether to offer kernels that keep a table's rows in host memory, which is slow, to tables of which
            no constraint names the kernel. Without them a search has a third of the options.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int = BATCH_SIZE,
        constraints: dict[str, ParameterConstraints] | None = None,
        estimator: ShardEstimator | list[ShardEstimator] | None = None,
        use_exact_enumerate_order: bool = False,
        *,
        min_width: int = MIN_WIDTH,
        host_memory: bool = True,
    ) -> None:
        super().__init__(topology, batch_size, constraints, estimator, use_exact_enumerate_order)
        self._min_width = max(min_width, 4)
        self._host_memory = host_memory

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Return the ways to shard each table of a module, with estimates, which shards of one size share."""
        self._sharder_map = {sharder_name(sharder.module_type): sharder for sharder in sharders}
        self._sharder_data_map = build_sharder_data_map(self._sharder_map)
        found: list[tuple[str, nn.Module, ModuleSharder[nn.Module], dict[str, nn.Parameter]]] = []
        queue = [("", module)]
        while queue:
            path, child = queue.pop(0)
            sharder = self._sharder_map.get(sharder_name(type(child)))
            if sharder is None:
                queue.extend((f"{path}.{name}".removeprefix("."), each) for name, each in child.named_children())
            else:
                found.append((path, child, sharder, sharder.shardable_parameters(child)))
        options = [
            option
            for path, child, sharder, parameters in found
            for name, parameter in parameters.items()
            for option in self._of_table(path, child, sharder, name, parameter)
        ]
        self.populate_estimates(options)
        self._last_stored_module, self._last_stored_sharders = module, sharders
        self._last_stored_search_space = options
        return options

    def _of_table(
        self,
        path: str,
        child: nn.Module,
        sharder: ModuleSharder[nn.Module],
        name: str,
        parameter: nn.Parameter,
    ) -> list[ShardingOption]:
        constraint = (self._constraints or {}).get(name) or ParameterConstraints(pooling_factors=[POOLING_FACTOR])
        if constraint.device_group and constraint.device_group != self._compute_device:
            return []
        pooled = ShardingOption.module_pooled(child, path)
        options = []
        for kind in self._types(name, sharder, parameter, constraint):
            kernels = sorted(
                self._filter_compute_kernels(name, sharder.compute_kernels(kind, self._compute_device), kind)
            )
            if not self._host_memory and not constraint.compute_kernels:
                kernels = [kernel for kernel in kernels if kernel not in _UVM] or kernels
            for width in self._widths(kind, parameter, constraint):
                with warnings.catch_warnings():  # of a width that does not divide: then it is the whole table
                    warnings.simplefilter("ignore", UserWarning)
                    sizes, offsets = calculate_shard_sizes_and_offsets(
                        tensor=parameter,
                        world_size=self._world_size,
                        local_world_size=self._local_world_size,
                        sharding_type=kind,
                        col_wise_shard_dim=width,
                        device_memory_sizes=self._device_memory_sizes,
                        num_buckets=self._get_num_buckets(name, child),
                    )
                options += [
                    ShardingOption(
                        name=name,
                        tensor=parameter,
                        module=(path, child),
                        input_lengths=constraint.pooling_factors,
                        batch_size=self._batch_size,
                        compute_kernel=kernel,
                        sharding_type=kind,
                        partition_by=get_partition_by_type(kind),
                        shards=[Shard(size=size, offset=offset) for size, offset in zip(sizes, offsets, strict=True)],
                        cache_params=constraint.cache_params,
                        enforce_hbm=constraint.enforce_hbm,
                        stochastic_rounding=constraint.stochastic_rounding,
                        bounds_check_mode=constraint.bounds_check_mode,
                        is_pooled=pooled,
                        feature_names=constraint.feature_names,
                        output_dtype=constraint.output_dtype,
                        key_value_params=constraint.key_value_params,
                    )
                    for kernel in kernels
                ]
        if not options:
            raise UserError(
                f"table {name}: no sharding type and kernel is left on {self._compute_device}, its constraints allow "
                f"{constraint.sharding_types or 'all types'} with {constraint.compute_kernels or 'all kernels'}; "
                "loosen them (--constraint)"
            )
        return options

    def _types(
        self, name: str, sharder: ModuleSharder[nn.Module], parameter: nn.Parameter, constraint: ParameterConstraints
    ) -> list[str]:
        offered = sharder.sharding_types(self._compute_device)
        if constraint.sharding_types:
            asked = [kind for kind in offered if kind in constraint.sharding_types]
        else:
            asked = list(offered)
            if "FeatureProcessed" in type(sharder).__name__:
                asked = self._filter_sharding_types(name, offered, sharder_name(sharder.module_type))
        rows, columns = parameter.shape
        hosts = self._world_size // self._local_world_size
        kept = [
            kind
            for kind in asked
            if not (kind == ShardingType.TABLE_COLUMN_WISE.value and ShardingType.COLUMN_WISE.value in asked)
            and not (kind == ShardingType.GRID_SHARD.value and hosts == 1)
            and not (kind == ShardingType.TABLE_ROW_WISE.value and self._local_world_size == 1)
            and not (kind == ShardingType.GRID_SHARD.value and rows < self._local_world_size)
            and why_rows_impossible(
                kind,
                Table(name="t", num_embeddings=rows, embedding_dim=max(4, columns - columns % 4)),
                world_size=self._world_size,
                local_world_size=self._local_world_size,
                compute_device=self._compute_device,
            )
            is None
        ]
        return kept or asked

    def _widths(self, kind: str, parameter: nn.Parameter, constraint: ParameterConstraints) -> list[int | None]:
        if kind not in COLUMN_TYPES or constraint.min_partition is not None:
            return [constraint.min_partition]
        columns = parameter.shape[1]
        hosts = max(self._world_size // self._local_world_size, 1)
        most = {
            ShardingType.COLUMN_WISE.value: self._world_size,
            ShardingType.TABLE_COLUMN_WISE.value: self._local_world_size,
            ShardingType.GRID_SHARD.value: hosts,
        }[kind]
        widths: list[int | None] = [
            width
            for width in range(4 * -(-self._min_width // 4), columns, 4)
            if columns % width == 0 and columns // width <= most
        ]
        torchrecs = default_min_partition(columns)
        if torchrecs is not None and torchrecs >= WIDE_ENOUGH and torchrecs not in widths:
            widths.append(torchrecs)
        return widths or [columns]

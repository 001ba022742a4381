"""Every useful way to shard a table: TorchRec's types at every width of a column shard."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardEstimator, ShardingOption, Topology
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingType

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import (
    COLUMN_TYPES,
    WIDE_ENOUGH,
    default_min_partition,
    why_rows_impossible,
)
from torchrec_deepfm.sharding.inputs.tables import Table

# Columns of a shard at least; a multiple of 4. Narrow shards mean many small kernels and rows that fill no cache line,
# which the estimators do not count.
MIN_WIDTH: Final = 8

CACHE_SHARES: Final = (0.05, 0.1, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Shares of rows in a cache on the GPU to try, beside TorchRec's 0.2."""

_UVM: Final = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
_NO_DEVICE: Final = "none"  # a device group that no topology has: TorchRec then skips the table


class UncopiedEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator without the copy of all options and shards that it keeps, which takes longest."""

    _found: list[ShardingOption] | None = None

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Return the options of each table of a module, with estimates."""
        options = self.enumerate_under(module, sharders, self._constraints or {})
        self.populate_estimates(options)
        return options

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Estimate options; those that TorchRec's ``enumerate`` makes are kept for later, when all are known."""
        if self._found is None:
            super().populate_estimates(sharding_options)
        else:
            self._found += sharding_options
            sharding_options.clear()  # TorchRec would copy them all, deeply, for its cache

    def enumerate_under(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: Mapping[str, ParameterConstraints],
    ) -> list[ShardingOption]:
        """Return the options under other constraints, without estimates."""
        before, self._constraints, self._found = self._constraints, dict(constraints), []
        self._last_stored_module = None
        try:
            with warnings.catch_warnings(), constraints_leave_a_type():
                # Of a width that does not divide: then it is the whole table.
                warnings.simplefilter("ignore", UserWarning)
                EmbeddingEnumerator.enumerate(self, module, sharders)
            return self._found
        finally:
            self._constraints, self._found = before, None


class WidthEnumerator(UncopiedEnumerator):
    """Offers, besides what TorchRec's enumerator does, column shards of every width, and grid_shard unasked.

    TorchRec's offers one width per table, 128 columns unless a constraint sets another, and grid_shard only where a
    constraint names it. Constraints apply here as well: ``min_partition`` fixes the width, listed types and kernels are
    the only ones.

    All that TorchRec's enumerator offers is offered here, except what could only make a plan worse, or no plan at all
    (unless a constraint leaves nothing else): table_column_wise, which by the estimates is column_wise with fewer
    places; types that can't run (``sharding_types.why_rows_impossible``); and kernels that keep rows in host memory if
    ``host_memory`` is false: they are slow, and without them a search has a third of the options.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int = BATCH_SIZE,
        constraints: dict[str, ParameterConstraints] | None = None,
        estimator: ShardEstimator | list[ShardEstimator] | None = None,
        use_exact_enumerate_order: bool = True,
        *,
        host_memory: bool = True,
    ) -> None:
        super().__init__(topology, batch_size, constraints, estimator, use_exact_enumerate_order)
        self._host_memory = host_memory

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Return the ways to shard each table of a module, with estimates, which shards of one size share.

        TorchRec's ``enumerate`` makes the options, once for each width, so they have all that it knows: ``dependency``
        of the tables of an embedding tower, buckets, feature names. A second call for the same module returns copies.
        """
        if self._last_stored_module is module and self._last_stored_sharders == sharders:
            return copy.deepcopy(self._last_stored_search_space or [])
        given = self._constraints or {}
        by_table: dict[str, list[ShardingOption]] = {}
        for option in self.enumerate_under(module, sharders, given):
            by_table.setdefault(option.fqn, []).append(option)
        order = {fqn: list(dict.fromkeys(each.sharding_type for each in by_table[fqn])) for fqn in by_table}
        widths: dict[tuple[str, str], list[int]] = {}  # by table and type
        for fqn, options in by_table.items():
            options[:] = self._useful(options)
            if given.get(options[0].name, ParameterConstraints()).min_partition is None:
                for option in options:
                    if option.sharding_type in COLUMN_TYPES:
                        widths[fqn, option.sharding_type] = self._widths(option)
                options[:] = [each for each in options if each.sharding_type not in COLUMN_TYPES]
        names = {fqn: fqn.rpartition(".")[2] for fqn in by_table}
        for width in sorted({width for listed in widths.values() for width in listed}):
            kinds: dict[str, list[str]] = {name: [] for name in names.values()}
            for (fqn, kind), listed in widths.items():
                kinds[names[fqn]] += [kind] if width in listed else []
            for option in self.enumerate_under(module, sharders, _of_width(width, kinds, given)):
                if width in widths.get((option.fqn, option.sharding_type), ()):
                    by_table[option.fqn].append(option)
        for fqn, options in by_table.items():  # constraints are sets in TorchRec, of another order in every process
            options.sort(
                key=lambda each: (order[fqn].index(each.sharding_type), each.shards[0].size, each.compute_kernel)
            )
        options = [option for options in by_table.values() for option in options]
        self.populate_estimates(options)
        self._last_stored_module, self._last_stored_sharders = module, sharders
        self._last_stored_search_space = options
        return options

    def other_cache_sizes(self, options: Iterable[ShardingOption]) -> list[ShardingOption]:
        """Return each ``fused_uvm_caching`` option with caches of other sizes, where no constraint names one."""
        found = []
        for option in options:
            if option.compute_kernel == _UVM[1] and option.cache_params is None:
                for share in CACHE_SHARES:
                    other = copy.copy(option)
                    other.cache_params = CacheParams(load_factor=share)
                    other.shards = [Shard(size=each.size, offset=each.offset) for each in option.shards]
                    found.append(other)
        self.populate_estimates(found)
        return found

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        asked = super()._filter_sharding_types(name, allowed_sharding_types, sharder_key)
        listed = (self._constraints or {}).get(name, ParameterConstraints()).sharding_types
        if not listed and "FeatureProcessedEmbeddingBagCollection" not in sharder_key:
            asked.append(ShardingType.GRID_SHARD.value)
        return [kind for kind in allowed_sharding_types if kind in asked]

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        kernels = super()._filter_compute_kernels(name, allowed_compute_kernels, sharding_type)
        if self._host_memory or (self._constraints or {}).get(name, ParameterConstraints()).compute_kernels:
            return kernels
        return [kernel for kernel in kernels if kernel not in _UVM] or kernels

    def _useful(self, options: list[ShardingOption]) -> list[ShardingOption]:
        """Drop what can only make a plan worse, or can't run, of the options of a table."""
        rows, columns = options[0].tensor.shape
        hosts = self._world_size // self._local_world_size
        kinds = {option.sharding_type for option in options}
        table = Table(name="t", num_embeddings=rows, embedding_dim=max(4, columns - columns % 4))
        at = {"world_size": self._world_size, "local_world_size": self._local_world_size}
        without = {
            ShardingType.TABLE_COLUMN_WISE.value: ShardingType.COLUMN_WISE.value in kinds,
            ShardingType.GRID_SHARD.value: hosts == 1 or rows < self._local_world_size,
            ShardingType.TABLE_ROW_WISE.value: self._local_world_size == 1,
        }
        for kind in kinds:
            if why_rows_impossible(kind, table, compute_device=self._compute_device, **at) is not None:
                without[kind] = True
        return [option for option in options if not without.get(option.sharding_type)] or options

    def _widths(self, option: ShardingOption) -> list[int]:
        columns = option.tensor.shape[1]
        # More shards than ranks may fill the ranks more evenly; on one rank they only cost more.
        narrower = range(MIN_WIDTH, columns if self._world_size > 1 else 0, 4)
        widths = [width for width in narrower if columns % width == 0]
        torchrecs = default_min_partition(columns)
        if torchrecs is not None and torchrecs >= WIDE_ENOUGH and torchrecs not in widths:
            widths.append(torchrecs)
        return widths or [columns]


@contextmanager
def constraints_leave_a_type() -> Iterator[None]:
    """Where they leave a table none, TorchRec's enumerator stops with a RuntimeError; it becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("No available sharding type"):
            raise
        raise UserError(f"{str(error).partition('. ')[0]}", remedy="loosen its constraints (--constraint)") from error


def _of_width(
    width: int, kinds: Mapping[str, list[str]], given: Mapping[str, ParameterConstraints]
) -> dict[str, ParameterConstraints]:
    """Constraints under which TorchRec cuts tables into columns of a width; a table without such a type is skipped."""
    found = {}
    for name, listed in kinds.items():
        constraint = given.get(name) or ParameterConstraints()
        changed = {"min_partition": width, "sharding_types": listed} if listed else {"device_group": _NO_DEVICE}
        found[name] = replace(constraint, **changed)
    return found

"""TorchRec's sharding types and kernels, and which of them a table can have. Standard library only."""

import math
from typing import Literal, Protocol

SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
"""Optimizers of tables."""
FusedOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]
"""Those that FBGEMM fuses into the backward pass."""
Qcomms = Literal["fp32", "fp16", "bf16"]
"""Precisions in which pooled rows and their gradients travel between GPUs."""

SHARDING_TYPES = (
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_column_wise",
    "table_row_wise",
    "grid_shard",
)
ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")  # cut rows
COLUMN_TYPES = ("column_wise", "table_column_wise", "grid_shard")  # cut columns
HOST_TYPES = ("table_column_wise", "table_row_wise", "grid_shard")  # depend on hosts

KERNELS = ("dense", "fused", "fused_uvm", "fused_uvm_caching")
CUDA_KERNELS = ("fused_uvm", "fused_uvm_caching")
IN_MEMORY_KERNELS = ("dense", "fused")  # weights lie in the device's own memory, every row up to date

DEFAULT_CACHE_SHARE = 0.2  # of a table's rows in the cache of fused_uvm_caching: TorchRec's and FBGEMM's default

COLUMN_ALIGNMENT = 4  # FBGEMM's fused kernels want the local width of a table to be a multiple of it
MAX_POOLING_FACTOR = 1_000_000  # ids a sample; far beyond any bag, and no product of it overflows
WIDE_ENOUGH = 128  # columns of a shard, TorchRec's own default (planner.constants.MIN_CW_DIM)


class TableSize(Protocol):
    """What is to be known of a table; TorchRec's ``EmbeddingBagConfig`` has it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def num_embeddings(self) -> int:
        """Its rows."""

    @property
    def embedding_dim(self) -> int:
        """Its columns."""


def column_cuts(embedding_dim: int) -> list[int]:
    """Return the widths of column shards that cut a table into equal parts of a multiple of 4 columns.

    Example:
        >>> column_cuts(24)
        [4, 8, 12]
    """
    return [cut for cut in range(COLUMN_ALIGNMENT, embedding_dim, COLUMN_ALIGNMENT) if embedding_dim % cut == 0]


def default_min_partition(embedding_dim: int) -> int | None:
    """Return the default width of column shards: TorchRec's 128, or the widest that cuts the table, or None.

    Example:
        >>> [default_min_partition(dim) for dim in (4, 12, 16, 128, 256, 384)]
        [None, 4, 8, 64, 128, 128]
    """
    cuts = column_cuts(embedding_dim)
    return min((cut for cut in cuts if cut >= WIDE_ENOUGH), default=max(cuts, default=None))


def kernels_of(sharding_type: str) -> tuple[str, ...]:
    """Return the kernels that a sharding type can have.

    Example:
        >>> kernels_of("data_parallel"), kernels_of("row_wise")
        (('dense',), ('fused', 'fused_uvm', 'fused_uvm_caching'))
    """
    return KERNELS[:1] if sharding_type == "data_parallel" else KERNELS[1:]


def why_impossible(
    sharding_type: str,
    table: TableSize,
    *,
    min_partition: int | None = None,
    world_size: int | None = None,
    local_world_size: int | None = None,
    compute_device: str | None = None,
) -> str | None:
    """Explain why a table can't be sharded this way; None where it can. Unknown ranks are not checked.

    Example:
        >>> from torchrec_deepfm.sharding.plan.plan import PlannedTable
        >>> table = PlannedTable(
        ...     name="t", num_embeddings=5, embedding_dim=12, sharding_type="", compute_kernel="", shards=()
        ... )
        >>> why_impossible("row_wise", table, world_size=4, compute_device="cuda") is None
        True
        >>> print(why_impossible("row_wise", table, world_size=4, compute_device="cpu"))
        row_wise cuts its 5 rows into pieces of 2 and leaves 1 of 4 ranks none, which FBGEMM's kernel on CPU can't do; choose another type
    """  # noqa: E501
    if sharding_type in COLUMN_TYPES:
        cuts = column_cuts(table.embedding_dim)
        if not cuts:
            return (
                f"{sharding_type} cuts columns into pieces of a multiple of {COLUMN_ALIGNMENT}, and its "
                f"{table.embedding_dim} columns can't be cut so; choose another type"
            )
        if min_partition is not None and min_partition > cuts[-1]:
            return (
                f"min_partition {min_partition} leaves its {table.embedding_dim} columns in one piece; choose at most "
                f"{cuts[-1]}"
            )
    return why_rows_impossible(
        sharding_type,
        table,
        world_size=world_size,
        local_world_size=local_world_size,
        compute_device=compute_device,
    )


def why_rows_impossible(
    sharding_type: str,
    table: TableSize,
    *,
    world_size: int | None,
    local_world_size: int | None,
    compute_device: str | None,
) -> str | None:
    """Explain why the rows of a table can't be cut this way; see ``why_impossible``."""
    if sharding_type not in ROW_TYPES:
        return None
    if sharding_type != "row_wise" and local_world_size == 1:
        return f"{sharding_type} cuts rows over the ranks of a host, and a host has one rank here; choose another type"
    if sharding_type == "grid_shard" and table.num_embeddings == 1:
        return "grid_shard cuts rows and columns, and it has one row; choose another type"
    parts = world_size if sharding_type == "row_wise" else local_world_size
    if parts is None or compute_device != "cpu":
        return None
    step = math.ceil(table.num_embeddings / parts)
    without = parts - math.ceil(table.num_embeddings / step)
    if without:
        return (
            f"{sharding_type} cuts its {table.num_embeddings} rows into pieces of {step} and leaves {without} of "
            f"{parts} ranks none, which FBGEMM's kernel on CPU can't do; choose another type"
        )
    return None

"""Initial weights of sharded tables that do not depend on how they are sharded.

TorchRec re-runs each table's ``init_fn`` on the local shards. There a column shard does not know which columns of the
packed row it holds, and every plan draws other numbers. So the rows are drawn once more here, in blocks that have
seeds of their own: any shard on any rank takes its cut of the same virtual table.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_deepfm.model.fm import init_packed_rows_

BLOCK_ROWS = 8192


def initialize_tables(
    model: nn.Module, tables: Sequence[EmbeddingBagConfig], *, factor_dim: int, std: float, seed: int
) -> None:
    """Fill the tables of a sharded model: v ~ N(0, std^2), w and padding zero, the same under every plan."""
    by_name = {table.name: table for table in tables}
    for key, weight in model.state_dict().items():
        table = by_name.get(key.split(".")[-2]) if key.endswith(".weight") else None
        if table is None or "embedding_bags" not in key:
            continue
        for shard, row, column in local_shards(weight):
            _fill(shard, row, column, table, factor_dim, std, seed)
    purge_row_caches(model)


def purge_row_caches(model: nn.Module) -> None:
    """Empty the caches of rows on the device, after the tables behind them were written.

    ``state_dict()`` brings cached rows back to the tables before it returns views of them, but TorchRec drops its
    caches only in ``load_state_dict``: after a write into the views, look-ups would still find the rows of before
    (``fused_uvm_caching``). Call this after every such write.
    """
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            while isinstance(lookup, DistributedDataParallel):
                lookup = lookup.module
            lookup.purge()


def local_shards(weight: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the local tensors of a table, which share the model's memory, and the row and column where each starts."""
    if isinstance(weight, Tensor) and not hasattr(weight, "local_shards"):
        yield weight, 0, 0
        return
    for shard in weight.local_shards():
        yield shard.tensor, shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1]


def _fill(
    shard: Tensor, row: int, column: int, table: EmbeddingBagConfig, factor_dim: int, std: float, seed: int
) -> None:
    rows, columns = shard.shape
    for block in range(row // BLOCK_ROWS, (row + rows - 1) // BLOCK_ROWS + 1):
        generator = torch.Generator().manual_seed(_block_seed(seed, table.name, block))
        first, last = max(row, block * BLOCK_ROWS), min(row + rows, (block + 1) * BLOCK_ROWS)
        # Rows are drawn one after the other, those after the last for nothing. A single row would be drawn another way.
        drawn = max(last - block * BLOCK_ROWS, 2)
        values = init_packed_rows_(torch.empty(drawn, table.embedding_dim), factor_dim, std, generator)
        cut = values[first - block * BLOCK_ROWS : last - block * BLOCK_ROWS, column : column + columns]
        with torch.no_grad():
            shard[first - row : last - row].copy_(cut)


def _block_seed(seed: int, table: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{table}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

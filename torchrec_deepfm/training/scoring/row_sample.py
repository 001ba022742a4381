"""A bounded sample of the rows of a split."""

from collections.abc import Iterator
from typing import Final

import numpy as np

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.row_reader import CopiedRows, SplitRows

BLOCK_ROWS: Final = 1024


def sample_rows(data: PreparedData, split: str, blocks: int) -> Iterator[CopiedRows]:
    """Yield at most ``blocks`` blocks of 1,024 neighbouring rows, spread evenly over a split; all of a small one."""
    source, total = SplitRows(data, split), data.rows(split)
    if total <= blocks * BLOCK_ROWS:
        starts = range(0, total, BLOCK_ROWS)
    else:
        starts = np.linspace(0, total - BLOCK_ROWS, blocks).astype(int).tolist()
    for start in starts:
        yield source.stretch(start, min(start + BLOCK_ROWS, total))
    source.release()

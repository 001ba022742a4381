"""The rows of a day, and the arrays on disk that hold them.

Shape letters: N rows of a file, I numeric columns, F1 categorical columns with one id per row, M ids of a list column.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torchrec_deepfm.data.dataset.npy_mmap import MappedRows

DENSE: Final = "_dense.npy"
SPARSE: Final = "_sparse.npy"
LABELS: Final = "_labels.npy"
ROW_WEIGHTS: Final = "_row_weights.npy"
MAX_NUM_EMBEDDINGS: Final = 2**31 - 1  # ids are int32


@dataclass(frozen=True, kw_only=True)
class Day:
    """Consecutive rows, stored in arrays whose file names begin with the same stem.

    ``stem``: the prefix of the file names, such as ``day_0``. ``start``: the first row of the files that belongs to it.
    Criteo Terabyte's last day is halved into validation and test. ``positives``: how many of them have label 1;
    ``None`` if unknown.
    """

    stem: str
    start: int = 0
    rows: int
    positives: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bags:
    """The ids of a multi-hot column.

    ``ids``: int [M], the bags one after another; or int [N, H], H ids per row. ``offsets``: int64 [N + 1]: row i has
    the ids from ``offsets[i]`` to ``offsets[i + 1]``. ``None`` with [N, H]. ``weights``: float32 [M]; ``None`` where
    the column has none.
    """

    ids: MappedRows
    offsets: MappedRows | None = None
    weights: MappedRows | None = None


@dataclass(frozen=True, kw_only=True)
class DayArrays:
    """The arrays with the stem of a day. A day's rows are those from ``day.start`` on.

    ``dense``: [N, I] numbers; float32 in folders with a manifest. ``sparse``: [N, F1] ids of the one-hot columns, in
    the schema's order; int32 in folders with a manifest. ``labels``: [N, 1] or [N]; int32 in folders with a manifest.
    ``weights``: float32 [N, 1], the weights of the rows; ``None`` where these are equal.
    """

    dense: MappedRows
    sparse: MappedRows
    labels: MappedRows
    bags: Mapping[str, Bags]
    weights: MappedRows | None = None

    def files(self) -> tuple[MappedRows, ...]:
        """Return all mapped files, in the order of ``stem_files``."""
        lists = [part for bags in self.bags.values() for part in (bags.offsets, bags.ids, bags.weights)]
        return (*self.by_row(), *(part for part in lists if part is not None))

    def by_row(self) -> tuple[MappedRows, ...]:
        """Return the files that have a line for every row, the first of ``files``."""
        return (self.dense, self.sparse, self.labels, *([] if self.weights is None else [self.weights]))

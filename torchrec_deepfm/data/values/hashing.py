"""The id of a categorical value with hashing: 1 + h % (num_embeddings - 1), and 0 for a missing one.

h is the value itself where it is a number (Criteo's categories are hashes already), and the last 8 bytes of its MD5,
little-endian, where it is text.

Shape letters: n rows, F1 columns.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import MAX_NUM_EMBEDDINGS
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

# MLPerf's cap on the ids of a column.
HASH_EMBEDDINGS: Final = 40_000_000
# For bucketized numbers: floor(log(x)^2) stays below 999 up to x = 5e13.
BUCKET_EMBEDDINGS: Final = 1000
# Up to this many rows Python hashes: DuckDB and polars' engine take longer to start.
_FEW: Final = 256


class Hashing:
    """Turns values into ids.

    Example:
        >>> hashing = Hashing(duckdb.connect(), [10])
        >>> hashing.ids(0, pl.Series([8, 9, -1, None])).tolist()
        [9, 1, 9, 0]
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, num_embeddings: Sequence[int]) -> None:
        self._connection = connection
        self._sizes = num_embeddings

    def ids(self, j: int, values: pl.Series) -> NDArray[np.int32]:
        """Hash n values of one column, int32 [n]."""
        return self.block(values.alias(f"c{j}").to_frame(), [j])[:, 0]

    def block(self, frame: pl.DataFrame, columns: Sequence[int]) -> NDArray[np.int32]:
        """Hash several columns at once, those of n rows with ``c0`` ...; int32 [n, F1]."""
        if not columns:
            return np.empty((len(frame), 0), np.int32)
        numbers = [self._md5(frame[f"c{j}"]) if frame.schema[f"c{j}"] == pl.String else frame[f"c{j}"] for j in columns]
        if len(frame) <= _FEW:
            few = np.empty((len(frame), len(columns)), np.int32)
            for place, (j, series) in enumerate(zip(columns, numbers, strict=True)):
                size = self._sizes[j] - 1
                few[:, place] = [0 if value is None else 1 + value % size for value in series.to_list()]
            return few
        hashed = pl.DataFrame(numbers).select(
            (pl.col(f"c{j}") % pl.lit(self._sizes[j] - 1, dtype=series.dtype) + pl.lit(1, dtype=series.dtype))
            .fill_null(0)
            .cast(pl.Int32)
            for j, series in zip(columns, numbers, strict=True)
        )
        return np.ascontiguousarray(hashed.to_numpy(order="c"))

    def _md5(self, text: pl.Series) -> pl.Series:
        if len(text) <= _FEW:
            few = [None if value is None else _md5_number_lower(value) for value in text]
            return pl.Series(text.name, few, dtype=pl.UInt64)
        rows = pl.DataFrame({"value": text}).with_row_index("row")
        self._connection.register("hashed", rows.to_arrow())
        found = self._connection.execute(
            "SELECT row, md5_number_lower(value) AS hash FROM hashed WHERE value IS NOT NULL"
        ).fetchnumpy()
        self._connection.unregister("hashed")
        numbers, missing = np.zeros(len(text), np.uint64), np.ones(len(text), np.bool_)
        numbers[found["row"]], missing[found["row"]] = found["hash"], False
        return pl.Series(text.name, numbers).set(pl.Series(missing), None)


def hash_sizes(raw: Schema, schema: Schema, num_embeddings: Sequence[int]) -> list[int]:
    """Settle how many ids each categorical column of the prepared schema has when values are hashed.

    ``num_embeddings`` has none, one for all, or one for each categorical column, of the raw or of the prepared schema.
    """
    names, buckets = schema.categorical, len(schema.categorical) - len(raw.categorical)
    each = list(num_embeddings)
    if not each:
        each = [BUCKET_EMBEDDINGS] * buckets + [HASH_EMBEDDINGS] * len(raw.categorical)
    elif len(each) == 1:
        each *= len(names)
    elif len(each) == len(raw.categorical):
        each = [BUCKET_EMBEDDINGS] * buckets + each
    if len(each) != len(names):
        raise UserError(
            f"{len(each)} numbers for {len(names)} categorical columns",
            where="--num-embeddings",
            remedy="give one for all, or one each",
        )
    each = [schema.options(name).num_embeddings or size for name, size in zip(names, each, strict=True)]
    for size in each:
        if not 2 <= size <= MAX_NUM_EMBEDDINGS:
            raise UserError(
                f"{size} is out of range", where="--num-embeddings", remedy=f"give 2 to {MAX_NUM_EMBEDDINGS}"
            )
    return each


def _md5_number_lower(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[8:], "little")

"""Which id a categorical value gets by hashing: 1 + h % (num_embeddings - 1), and 0 for a missing one.

h is the value itself where it is a number (Criteo's categories are hashes already), and the last 8 bytes of its MD5,
little-endian, where it is text.

Shape letters: n rows, F1 columns.
"""

from collections.abc import Sequence

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray


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
        """Hash the values of one column.

        Returns int32 [n].
        """
        return self.block(values.alias(f"c{j}").to_frame(), [j])[:, 0]

    def block(self, frame: pl.DataFrame, columns: Sequence[int]) -> NDArray[np.int32]:
        """Hash several columns at once.

        ``frame``: n rows with ``c0`` ... Returns int32 [n, F1].
        """
        if not columns:
            return np.empty((len(frame), 0), np.int32)
        numbers = [self._md5(frame[f"c{j}"]) if frame.schema[f"c{j}"] == pl.String else frame[f"c{j}"] for j in columns]
        hashed = pl.DataFrame(numbers).select(
            (pl.col(f"c{j}") % pl.lit(self._sizes[j] - 1, dtype=series.dtype) + pl.lit(1, dtype=series.dtype))
            .fill_null(0)
            .cast(pl.Int32)
            for j, series in zip(columns, numbers, strict=True)
        )
        return np.ascontiguousarray(hashed.to_numpy(order="c"))

    def _md5(self, text: pl.Series) -> pl.Series:
        rows = pl.DataFrame({"value": text}).with_row_index("row")
        self._connection.register("hashed", rows.to_arrow())
        found = self._connection.execute(
            "SELECT row, md5_number_lower(value) AS hash FROM hashed WHERE value IS NOT NULL"
        ).fetchnumpy()
        self._connection.unregister("hashed")
        numbers, missing = np.zeros(len(text), np.uint64), np.ones(len(text), np.bool_)
        numbers[found["row"]], missing[found["row"]] = found["hash"], False
        return pl.Series(text.name, numbers).set(pl.Series(missing), None)

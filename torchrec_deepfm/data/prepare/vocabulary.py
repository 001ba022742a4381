"""Which id a categorical value gets by a vocabulary with a frequency threshold.

A column with K ids has ``num_embeddings`` K, ids 0 to K - 1; id 0 is every value that is not in the vocabulary. DuckDB
counts and joins, since it does both beyond memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchrec_deepfm.data.prepare.duckdb_session import parquet, quoted
from torchrec_deepfm.data.prepare.work_folder import sync

VOCABULARY: Final = "vocabulary_{}.parquet"
# Up to so many ids, a table of Arrow's is faster than a join of DuckDB's, and need not be put in order again.
SMALL: Final = 100_000


def vocabulary_file(folder: Path, j: int) -> Path:
    """Return the file of a column's vocabulary.

    ``j``: the column's position in ``schema.categorical``. Returns its path: columns ``value`` (null for missing),
    ``id`` INTEGER, ``count`` BIGINT, in the order of ``id``.
    """
    return folder / VOCABULARY.format(j)


def count_column(
    connection: duckdb.DuckDBPyConnection,
    staged: Sequence[Path],
    j: int,
    *,
    is_list: bool,
    min_count: int,
    missing_is_rare: bool = False,
    drafts: Path,
    target: Path,
) -> None:
    """Count a column's values in the training rows, number those that occur often enough, write the file.

    Values are numbered from 1 by falling count, ties by value (numbers by size, text by its UTF-8 bytes); a missing
    value counts as a value that comes before all others on a tie, unless it is declared rare.

    ``min_count``: values with fewer occurrences are left out (they become id 0). ``missing_is_rare``: leave the missing
    value out too, however often it occurs. ``drafts``: a folder on the same disk for the unfinished file, and what
    DuckDB leaves when it is killed.
    """
    rows = parquet(staged)
    values = f"SELECT unnest(c{j}) AS value FROM {rows}" if is_list else f"SELECT c{j} AS value FROM {rows}"  # noqa: S608
    known = "WHERE value IS NOT NULL" if missing_is_rare else ""
    partial = drafts / target.name
    partial.unlink(missing_ok=True)
    connection.execute(f"""
        COPY (
            SELECT value, (row_number() OVER (ORDER BY count DESC, value ASC NULLS FIRST))::INTEGER AS id, count
            FROM (SELECT value, count(*) AS count FROM ({values}) {known} GROUP BY value HAVING count(*) >= {min_count})
            ORDER BY id
        ) TO {quoted(partial)} (FORMAT parquet)
    """)  # noqa: S608 (paths are quoted, all else is ours)
    sync(partial)
    partial.replace(target)


def vocabulary_size(folder: Path, j: int) -> int:
    """Return ``num_embeddings`` of a column with a vocabulary."""
    return 1 + int(pq.read_metadata(vocabulary_file(folder, j)).num_rows)


def look_up(connection: duckdb.DuckDBPyConnection, values: pl.Series, vocabulary: Path) -> NDArray[np.int32]:
    """Turn values into ids.

    Returns int32 [n]; 0 for a value that is not in the vocabulary.
    """
    if values.null_count() == len(values):  # of whatever type: nothing in it shows its type
        values = values.cast(pl.read_parquet_schema(vocabulary)["value"])
    if pq.read_metadata(vocabulary).num_rows < SMALL:
        kept = pl.read_parquet(vocabulary, columns=["value"], glob=False, hive_partitioning=False)["value"]
        values = values.cast(kept.dtype) if values.dtype.is_integer() and kept.dtype == pl.Int64 else values
        if values.dtype == kept.dtype:
            # The file is in the order of the ids: the place in it is the id.
            places = pc.index_in(values.to_arrow(), value_set=kept.to_arrow())
            small: NDArray[np.int32] = pc.add(places.fill_null(-1), pa.scalar(1, pa.int32())).to_numpy()
            return small
    looked_up = pl.DataFrame({"value": values}).with_row_index("row")
    connection.register("looked_up", looked_up.to_arrow())
    found = connection.execute(f"""
        SELECT l.row, v.id FROM looked_up l JOIN {parquet([vocabulary])} v
        ON l.value IS NOT DISTINCT FROM v.value
    """).fetchnumpy()  # noqa: S608 (the path is quoted)
    connection.unregister("looked_up")
    ids = np.zeros(len(values), np.int32)
    ids[found["row"]] = found["id"]  # joins keep no order
    return ids

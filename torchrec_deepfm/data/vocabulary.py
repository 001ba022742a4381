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
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.sql import quoted, quoted_source
from torchrec_deepfm.data.workfolder import sync
from torchrec_deepfm.errors import UserError

VOCABULARY: Final = "vocabulary_{}.parquet"


def vocabulary_file(folder: Path, j: int) -> Path:
    """Return the file of a column's vocabulary.

    Args:
        folder: A prepared folder.
        j: The column's position in ``schema.categorical``.

    Returns:
        Its path: columns ``value`` (null for missing), ``id`` INTEGER, ``count`` BIGINT, in the order of ``id``.
    """
    return folder / VOCABULARY.format(j)


def count_column(
    connection: duckdb.DuckDBPyConnection,
    staged: Sequence[Path],
    j: int,
    *,
    is_list: bool,
    min_count: int,
    target: Path,
) -> None:
    """Count a column's values in the training rows, number those that occur often enough, write the file.

    Values are numbered from 1 by falling count, ties by value (numbers by size, text by its UTF-8 bytes); a missing
    value counts as a value that comes before all others on a tie.

    Args:
        connection: An open DuckDB connection.
        staged: Staged Parquet files with the training rows.
        j: The column's position.
        is_list: Whether its cells are lists.
        min_count: Values with fewer occurrences are left out (they become id 0).
        target: The file to write, whole or not at all.
    """
    rows = f"read_parquet([{', '.join(quoted_source(path) for path in staged)}])"
    values = f"SELECT unnest(c{j}) AS value FROM {rows}" if is_list else f"SELECT c{j} AS value FROM {rows}"  # noqa: S608
    partial = target.with_name(f"{target.name}.partial")
    connection.execute(f"""
        COPY (
            SELECT value, (row_number() OVER (ORDER BY count DESC, value ASC NULLS FIRST))::INTEGER AS id, count
            FROM (SELECT value, count(*) AS count FROM ({values}) GROUP BY value HAVING count(*) >= {min_count})
            ORDER BY id
        ) TO {quoted(partial)} (FORMAT parquet)
    """)  # noqa: S608 (paths are quoted, all else is ours)
    sync(partial)
    partial.replace(target)


def vocabulary_size(folder: Path, j: int) -> int:
    """Return ``num_embeddings`` of a column with a vocabulary.

    Args:
        folder: The folder that holds it.
        j: The column's position.

    Returns:
        1 + the number of values kept.
    """
    return 1 + int(pq.read_metadata(vocabulary_file(folder, j)).num_rows)


def look_up(connection: duckdb.DuckDBPyConnection, values: pl.Series, vocabulary: Path) -> NDArray[np.int32]:
    """Turn values into ids.

    Args:
        connection: An open DuckDB connection.
        values: n values, null for missing.
        vocabulary: The file of their column.

    Returns:
        int32 [n]; 0 for a value that is not in the vocabulary.
    """
    looked_up = pl.DataFrame({"value": values}).with_row_index("row")
    connection.register("looked_up", looked_up.to_arrow())
    found = connection.execute(f"""
        SELECT l.row, v.id FROM looked_up l JOIN read_parquet({quoted_source(vocabulary)}) v
        ON l.value IS NOT DISTINCT FROM v.value
    """).fetchnumpy()  # noqa: S608 (the path is quoted)
    connection.unregister("looked_up")
    ids = np.zeros(len(values), np.int32)
    ids[found["row"]] = found["id"]  # joins keep no order
    return ids


def check_vocabulary(folder: Path, schema: Schema, other: Schema, dtypes: Sequence[pl.DataType] | None) -> None:
    """Check that a prepared folder's vocabulary serves other data.

    Args:
        folder: The prepared folder whose vocabulary is to be used.
        schema: The prepared schema of the new data.
        other: The schema in the folder.
        dtypes: Types of the new data's categorical values, where they are known already.

    Raises:
        UserError: The columns differ, or there is no vocabulary.
    """
    if schema.categorical != other.categorical or schema.multi_hot != other.multi_hot:
        different = [name for name in schema.categorical if name not in other.categorical]
        different += [name for name in other.categorical if name not in schema.categorical]
        what = f"column {different[0]!r} is in one of them only" if different else "the columns' order or kind differs"
        raise UserError(f"--vocabulary {folder}: its categorical columns are not those of --schema; {what}")
    for j, name in enumerate(schema.categorical):
        path = vocabulary_file(folder, j)
        if not path.is_file():
            raise UserError(
                f"--vocabulary {folder}: there is no {path.name}; name a folder that was prepared without --hash"
            )
        if dtypes is None:
            continue
        kept, dtype = pl.read_parquet_schema(path)["value"], dtypes[j]
        if (kept == pl.String) != (dtype == pl.String):
            raise UserError(f"--vocabulary {folder}: column {name!r} holds {kept} there and {dtype} here")

"""Which id a categorical value gets: by a vocabulary with a frequency threshold, or by a plain modulus.

Id 0 is the same in both: no row of its own. A column with K ids has ``num_embeddings`` K, ids 0 to K - 1.
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb

from torchrec_deepfm.data.rawtext import quoted, quoted_source
from torchrec_deepfm.data.schema import Schema


def count_vocabulary(
    connection: duckdb.DuckDBPyConnection, train: Sequence[Path], schema: Schema, min_count: int
) -> dict[str, int]:
    """Count the values of the training rows and number those that occur often enough.

    Values are numbered from 1 by falling count, ties by value; a missing value counts as a value that comes before all
    others on a tie. It leaves one temporary table ``v0`` ... (value, count, id) per column in the connection.

    Args:
        connection: An open DuckDB connection.
        train: Staged Parquet files with the training rows.
        schema: The columns.
        min_count: Values with fewer occurrences are left out (they become id 0).

    Returns:
        ``num_embeddings`` per categorical column: 1 + the number of values kept.
    """
    rows = f"read_parquet([{', '.join(quoted_source(path) for path in train)}])"
    num_embeddings = {}
    for j, column in enumerate(schema.categorical):
        connection.execute(f"""
            CREATE TEMP TABLE v{j} AS
            SELECT value, count, row_number() OVER (ORDER BY count DESC, value ASC NULLS FIRST)::INTEGER AS id
            FROM (SELECT c{j} AS value, count(*) AS count FROM {rows} GROUP BY c{j} HAVING count(*) >= {min_count})
        """)  # noqa: S608 (paths are quoted, all else is ours)
        (kept,) = connection.execute(f"SELECT count(*) FROM v{j}").fetchall()[0]  # noqa: S608 (a number of ours)
        num_embeddings[column] = 1 + int(kept)
    return num_embeddings


def save_vocabulary(connection: duckdb.DuckDBPyConnection, schema: Schema, target: Path) -> None:
    """Write the counted vocabulary to one Parquet file.

    Args:
        connection: The connection that ``count_vocabulary`` used.
        schema: The columns.
        target: The file: column VARCHAR, value UINTEGER (NULL for missing), id INTEGER, count BIGINT, in id order.
    """
    # Column names go in as parameters, since a user chose them.
    tables = " UNION ALL ".join(
        f"SELECT {j} AS position, ? AS column, value, id, count FROM v{j}"  # noqa: S608 (a number of ours)
        for j in range(len(schema.categorical))
    )
    connection.execute(f"CREATE TEMP TABLE vocabulary AS {tables}", list(schema.categorical))
    connection.execute(f"""
        COPY (SELECT "column", value, id, count FROM vocabulary ORDER BY position, id)
        TO {quoted(target)} (FORMAT parquet)
    """)  # noqa: S608 (the path is quoted)


def vocabulary_ids(schema: Schema) -> tuple[list[str], str]:
    """Return the SQL that turns the values of a staged row ``d`` into ids by the counted vocabulary.

    Args:
        schema: The columns.

    Returns:
        One INTEGER expression per categorical column, and the joins that they need.
    """
    columns = range(len(schema.categorical))
    expressions = [f"coalesce(v{j}.id, 0)" for j in columns]
    return expressions, " ".join(f"LEFT JOIN v{j} ON d.c{j} IS NOT DISTINCT FROM v{j}.value" for j in columns)


def hashed_ids(schema: Schema, num_embeddings: int) -> tuple[list[str], str]:
    """Return the SQL that turns the values of a staged row ``d`` into ids by a modulus.

    The values are hashes already, so a modulus spreads them: id = 1 + value % (num_embeddings - 1), 0 for missing.

    Args:
        schema: The columns.
        num_embeddings: Ids per column, at least 2.

    Returns:
        One INTEGER expression per categorical column, and no joins.
    """
    columns = range(len(schema.categorical))
    return [f"coalesce(1 + d.c{j} % {num_embeddings - 1}, 0)::INTEGER" for j in columns], ""

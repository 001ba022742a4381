"""Paths and settings for DuckDB."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

import duckdb


def quoted(path: Path) -> str:
    """Return a path as an SQL literal that names a file to write.

    Example:
        >>> quoted(Path("it's"))
        "'it''s'"
    """
    return "'" + str(path).replace("'", "''") + "'"


def quoted_source(path: Path) -> str:
    """Return a path as an SQL literal that names one file to read.

    Unescaped, DuckDB takes ``*``, ``?`` and ``[`` as a pattern that may match several.

    Example:
        >>> quoted_source(Path("day[1].tsv"))
        "'day[[]1].tsv'"
    """
    return quoted(Path(escape(str(path))))


def parquet(paths: Sequence[Path]) -> str:
    """Return the SQL table function that reads Parquet files and ignores the names of their folders.

    By default DuckDB would turn a folder ``id=5`` into a column ``id`` that replaces the file's.

    Example:
        >>> parquet([Path("a.parquet")])
        "read_parquet(['a.parquet'], hive_partitioning = false)"
    """
    return f"read_parquet([{', '.join(quoted_source(path) for path in paths)}], hive_partitioning = false)"


def connect(spill: Path, *, memory: int, threads: int | None) -> duckdb.DuckDBPyConnection:
    """Open an empty database in memory that spills to disk, with all CPU threads by default."""
    config: dict[str, str | int] = {
        "memory_limit": f"{memory}B",
        "temp_directory": str(spill),
        "preserve_insertion_order": "true",
        "autoinstall_known_extensions": "false",  # no network access
        "autoload_known_extensions": "false",
    }
    if threads is not None:
        config["threads"] = threads
    return duckdb.connect(config=config)  # type: ignore[arg-type]

"""The id of a categorical value with a vocabulary and a frequency threshold.

A column with K ids has ``num_embeddings`` K, ids 0 to K - 1; id 0 is every value that is not in the vocabulary. DuckDB
counts and joins, since it does both beyond memory.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import PreparedData, read_manifest
from torchrec_deepfm.data.dataset.publish import digest, sync
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values.duckdb_session import parquet, quoted
from torchrec_deepfm.data.values.numeric import NumericColumn
from torchrec_deepfm.data.values.statistics import ColumnStatistics
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.strict_json import as_type

VOCABULARY: Final = "vocabulary_{}.parquet"
# Up to this many ids Arrow's lookup is faster than DuckDB's join, and keeps the order.
SMALL: Final = 100_000
# Up to this many values at once, a Python dictionary is faster than a call of a library. That of a larger vocabulary
# would take much memory.
_FEW: Final = 256
_DICTIONARY: Final = 100_000


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
    """)  # noqa: S608 (paths are quoted; no other text is foreign)
    sync(partial)
    partial.replace(target)


def vocabulary_size(folder: Path, j: int) -> int:
    """Return ``num_embeddings`` of a column with a vocabulary."""
    return 1 + int(pq.read_metadata(vocabulary_file(folder, j)).num_rows)


class Vocabulary:
    """The vocabulary of a column, held in memory.

    Args:
        values: Its values, null for missing; the first one has id 1.

    Example:
        >>> Vocabulary(pl.Series([7, None, 3])).ids(pl.Series([3, 4, None])).tolist()
        [3, 0, 2]
    """

    def __init__(self, values: pl.Series) -> None:
        self._values = values

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read the file of a vocabulary, whose rows are in the order of the ids."""
        return cls(pl.read_parquet(path, columns=["value"], glob=False, hive_partitioning=False)["value"])

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._values)

    @property
    def dtype(self) -> pl.DataType:
        """Type of the values."""
        return self._values.dtype

    @property
    def most_frequent(self) -> Any:
        """The value of id 1; None for missing, or without any value."""
        return self._values[0] if len(self) else None

    def ids(self, values: pl.Series) -> NDArray[np.int32]:
        """Turn n values, null for missing, into ids; 0 for a value that is not in the vocabulary.

        They have the vocabulary's type, or are other integers where it holds integers.
        """
        if len(values) <= _FEW and len(self) <= _DICTIONARY:
            return np.array(list(map(self._numbers.get, values.to_list(), repeat(0))), np.int32)
        if values.dtype != self.dtype:
            if values.null_count() == len(values):  # of whatever type: nothing in it shows its type
                values = values.cast(self.dtype)
            elif self.dtype != pl.Int64:
                return self._wide.ids(values)
            else:
                values = values.cast(pl.Int64)
        if len(values) > len(self._values):
            # Arrow makes a hash table of the vocabulary in each call, which pays off for many values.
            places = pl.Series(pc.index_in(values.to_arrow(), value_set=self._values.to_arrow()), dtype=pl.Int32)
            # Not by Arrow, which would load pandas for it where there is one.
            return (places.fill_null(-1) + 1).to_numpy()
        sorted_values, ids, missing = self._sorted
        if not len(sorted_values):
            return np.where(values.is_null().to_numpy(), missing, 0).astype(np.int32)
        if values.dtype.is_integer() and not values.null_count() and len(values) <= _FEW:
            held, asked = sorted_values.to_numpy(), values.to_numpy()
            at = np.minimum(np.searchsorted(held, asked), len(held) - 1)
            return np.where(held[at] == asked, ids[at], np.int32(0))
        given = values.fill_null("" if values.dtype == pl.String else 0)
        at = np.minimum(sorted_values.search_sorted(given).to_numpy(), len(sorted_values) - 1)
        hits = (sorted_values.gather(at) == values).fill_null(False).to_numpy()
        known = np.where(hits, ids[at], 0)
        return np.where(values.is_null().to_numpy(), missing, known).astype(np.int32)

    @cached_property
    def _wide(self) -> "Vocabulary":
        """The same integers in 64 bits, for values of another type."""
        assert self.dtype.is_integer(), self.dtype
        return Vocabulary(self._values.cast(pl.Int64))

    @cached_property
    def _numbers(self) -> dict[Any, int]:
        """The id of each value."""
        return {value: number for number, value in enumerate(self._values.to_list(), 1)}

    @cached_property
    def _sorted(self) -> tuple[pl.Series, NDArray[np.int32], int]:
        """The values but null in ascending order, their ids, and the id of null."""
        numbered = pl.DataFrame({"value": self._values}).with_row_index("id", offset=1)
        missing = numbered.filter(pl.col("value").is_null())["id"].to_list()
        known = numbered.filter(pl.col("value").is_not_null()).sort("value")
        return known["value"], known["id"].cast(pl.Int32).to_numpy(), int(missing[0]) if missing else 0


def look_up(connection: duckdb.DuckDBPyConnection, values: pl.Series, vocabulary: Path) -> NDArray[np.int32]:
    """Turn n values into ids by a vocabulary of any size; 0 for a value that is not in it."""
    if pq.read_metadata(vocabulary).num_rows < SMALL:
        return Vocabulary.read(vocabulary).ids(values)
    if values.null_count() == len(values):  # of whatever type: nothing in it shows its type
        values = values.cast(pl.read_parquet_schema(vocabulary)["value"])
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


def _points(column: NumericColumn) -> int:
    return column.shares + 1 if column.shares else 0


class OldVocabulary:
    """The vocabulary of a finished folder, and what transforms learned from its training rows."""

    def __init__(self, folder: Path, schema: Schema, numbers: Sequence[NumericColumn]) -> None:
        transforms = {column.name: column.transform for column in numbers}
        data = PreparedData.open(folder)
        self.folder, self._schema = folder, schema
        theirs = data.schema
        if schema.categorical != theirs.categorical or schema.multi_hot != theirs.multi_hot:
            different = [name for name in schema.categorical if name not in theirs.categorical]
            different += [name for name in theirs.categorical if name not in schema.categorical]
            what = (
                f"column {different[0]!r} is in one of them only" if different else "the columns' order or kind differs"
            )
            raise UserError(
                "its categorical columns are not those of --schema", where=f"--vocabulary {folder}", remedy=what
            )
        if schema.dense_names != theirs.dense_names:
            raise UserError(
                f"its numeric columns are {_few(theirs.dense_names)}, now they are {_few(schema.dense_names)}",
                where=f"--vocabulary {folder}",
                remedy="use its schema",
            )
        if schema.missing != theirs.missing:
            raise UserError(
                f"was prepared with --missing {theirs.missing}, now it is {schema.missing}",
                where=f"--vocabulary {folder}",
                remedy="choose the same --missing",
            )
        then = data.made.get("numeric")
        if isinstance(then, Mapping) and dict(then) != dict(transforms):
            names = [name for name in {**then, **transforms} if then.get(name) != transforms.get(name)]
            raise UserError(
                f"numeric column {names[0]!r} was prepared with {then.get(names[0])}, now it is "
                f"{transforms.get(names[0])}",
                where=f"--vocabulary {folder}",
                remedy="choose the same --numeric",
            )
        manifest = read_manifest(folder)
        learned = manifest.get("encoding", {}).get("statistics", {})
        self.statistics = {
            name: as_type(one, ColumnStatistics, where=f"{folder}: statistics of {name}", remedy="prepare it again")
            for name, one in learned.items()
        }
        for column in numbers:
            theirs_learned = self.statistics.get(column.keys[-1])
            if column.is_learned and (theirs_learned is None or len(theirs_learned.quantiles) != _points(column)):
                raise UserError(
                    f"numeric column {column.name!r} was prepared with other buckets",
                    where=f"--vocabulary {folder}",
                    remedy="choose the same in the schema",
                )
        files = manifest.get("files", {})
        self.digests: dict[str, Any] = {}
        for j in range(len(schema.categorical)):
            path = vocabulary_file(folder, j)
            if path.name not in files:
                raise UserError(
                    f"{path.name} is missing",
                    where=f"--vocabulary {folder}",
                    remedy="name a folder that was prepared without --hash",
                )
            self.digests[path.name] = files[path.name]

    def copy(self, staged: Sequence[Path], drafts: Path, target: Path) -> None:
        """Copy the files after checking checksums and types; ``drafts``, on the same disk, has unfinished ones."""
        for j, name in enumerate(self._schema.categorical):
            path = vocabulary_file(self.folder, j)
            if digest(path) != self.digests[path.name]:
                raise UserError(
                    "the file is damaged (its checksum differs)", where=path, remedy="name another --vocabulary"
                )
            self._check_type(j, name, pl.read_parquet_schema(path)["value"], staged)
            draft = drafts / path.name
            shutil.copyfile(path, draft)
            sync(draft)
            draft.replace(target / path.name)

    def _check_type(self, j: int, name: str, kept: pl.DataType, staged: Sequence[Path]) -> None:
        for path in staged:
            kind = pl.read_parquet_schema(path)[f"c{j}"]
            inner = kind.inner if isinstance(kind, pl.List) else kind
            if (kept == pl.String) == (inner == pl.String):
                continue
            column = pl.read_parquet(path, columns=[f"c{j}"], glob=False, hive_partitioning=False)[f"c{j}"]
            if column.null_count() < len(column):  # a column without values has no known type
                raise UserError(
                    f"column {name!r} holds {kept} there and {inner} here", where=f"--vocabulary {self.folder}"
                )


def _few(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")

"""Staged Parquet rows -> the three arrays of a day, written piece by piece in row order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import duckdb
import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.prepared import DENSE, LABELS, SPARSE, Day
from torchrec_deepfm.data.rawtext import quoted_source
from torchrec_deepfm.data.schema import Schema

# Rows held in memory at once: 80 MB of Criteo in arrays, about four times that while DuckDB joins.
PIECE_ROWS = 1 << 19

# dense [n, I], sparse [n, F], labels [n, 1]
Piece = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]


class _NpyFile:
    """An .npy file of a known shape whose rows arrive in pieces.

    A memory map would do as well, but the pages it has written count as this process's memory.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._rows = 0
        self._file = path.open("wb")
        header = {
            "shape": shape,
            "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(self._dtype),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "_NpyFile":
        return self

    def append(self, rows: NDArray[np.float32] | NDArray[np.int32]) -> None:
        assert rows.dtype == self._dtype, rows.dtype
        assert rows.shape[1:] == self._shape[1:], rows.shape
        self._rows += len(rows)
        self._file.write(np.ascontiguousarray(rows).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert error is not None or self._rows == self._shape[0], (self._rows, self._shape)


def encode_day(
    connection: duckdb.DuckDBPyConnection,
    sources: Sequence[tuple[Path, int]],
    schema: Schema,
    ids: tuple[list[str], str],
    folder: Path,
    stem: str,
) -> Day:
    """Write ``<stem>_dense.npy``, ``<stem>_sparse.npy`` and ``<stem>_labels.npy``.

    Args:
        connection: An open DuckDB connection, with the tables that ``ids`` joins.
        sources: Staged Parquet files and their row counts, one after another in the day.
        schema: The columns.
        ids: What ``vocabulary_ids`` or ``hashed_ids`` returned.
        folder: Where the arrays go.
        stem: The head of their names.

    Returns:
        The day with its row count and its number of positives.
    """
    rows = sum(count for _, count in sources)
    positives = 0
    with (
        _NpyFile(folder / f"{stem}{DENSE}", (rows, len(schema.numeric)), np.float32) as dense_file,
        _NpyFile(folder / f"{stem}{SPARSE}", (rows, len(schema.categorical)), np.int32) as sparse_file,
        _NpyFile(folder / f"{stem}{LABELS}", (rows, 1), np.int32) as labels_file,
    ):
        for source, count in sources:
            for dense, sparse, labels in _pieces(connection, source, count, schema, ids):
                dense_file.append(dense)
                sparse_file.append(sparse)
                labels_file.append(labels)
                positives += int(labels.sum())
    return Day(stem=stem, rows=rows, positives=positives)


def _pieces(
    connection: duckdb.DuckDBPyConnection, source: Path, count: int, schema: Schema, ids: tuple[list[str], str]
) -> Iterator[Piece]:
    expressions, joins = ids
    numeric = [f"d.n{j}" for j in range(len(schema.numeric))]
    named = [f"{expression} AS x{k}" for k, expression in enumerate(["d.label::INTEGER", *numeric, *expressions])]
    query = f"""
        SELECT d.file_row_number AS row, {", ".join(named)}
        FROM read_parquet({quoted_source(source)}, file_row_number = true) AS d {joins}
        WHERE d.file_row_number >= ? AND d.file_row_number < ?
    """  # noqa: S608 (paths are quoted, all else is ours)
    first_id = 1 + len(numeric)
    for start in range(0, count, PIECE_ROWS):
        stop = min(start + PIECE_ROWS, count)
        columns = connection.execute(query, [start, stop]).fetchnumpy()
        # Joins keep no order: every row goes to the place that its own number says.
        place = columns["row"] - start
        assert len(place) == stop - start, (source, start, len(place))
        dense = np.empty((stop - start, len(numeric)), np.float32)
        sparse = np.empty((stop - start, len(expressions)), np.int32)
        labels = np.empty((stop - start, 1), np.int32)
        labels[place, 0] = columns["x0"]
        if numeric:
            dense[place] = np.stack([columns[f"x{1 + j}"] for j in range(len(numeric))], axis=1)
        sparse[place] = np.stack([columns[f"x{first_id + j}"] for j in range(len(expressions))], axis=1)
        yield dense, sparse, labels

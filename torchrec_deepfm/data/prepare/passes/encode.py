"""Second pass: staged values -> ids by the vocabularies, in row order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import SPARSE
from torchrec_deepfm.data.prepare.passes.npy_appender import GrowingArray
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values.row_columns import flat
from torchrec_deepfm.data.values.vocabulary import SMALL, look_up, vocabulary_file, vocabulary_size


def encode_stem(
    connection: duckdb.DuckDBPyConnection,
    work: WorkFolder,
    stem: str,
    staged: Sequence[tuple[Path, int, int]],
    schema: Schema,
    vocabularies: Path,
    *,
    block_rows: int,
    block_bytes: int,
    threads: int | None,
    on_block: Callable[[int], None],
) -> None:
    """Write ``<stem>_sparse.npy``, and ``<stem>_ids_<j>.npy`` of list columns, resuming where they ended.

    A column at a time, so that one vocabulary is in memory and not all.

    ``staged``: its staged Parquet files, their rows, and the bytes that their values take in memory. ``block_rows``:
    most rows in memory at once; the more, the less often a vocabulary is read. ``block_bytes``: most bytes of values in
    memory at once. ``on_block``: called with the rows of every finished block.
    """
    name = f"encode_{stem}"
    record: dict[str, Any] = work.record(name) or {"files": 0, "rows": 0, "values": {}}
    lists = [j for j, column in enumerate(schema.categorical) if column in schema.multi_hot]
    one_hot = [j for j in range(len(schema.categorical)) if j not in lists]
    with ExitStack() as stack:

        def growing(ending: str, row: tuple[int, ...], rows: int) -> GrowingArray:
            return stack.enter_context(GrowingArray(work.out / f"{stem}{ending}", row, np.int32, rows=rows))

        sparse = growing(SPARSE, (len(one_hot),), record["rows"])
        ids = {j: growing(f"_ids_{j}.npy", (), record["values"].get(str(j), 0)) for j in lists}
        for files, rows in _blocks(staged[record["files"] :], block_rows, block_bytes):
            sparse.append(_one_hot(connection, files, rows, one_hot, vocabularies, threads))
            for j, array in ids.items():
                array.append(look_up(connection, flat(_column(files, j)), vocabulary_file(vocabularies, j)))
                array.flush()
                record["values"][str(j)] = array.rows
            sparse.flush()
            record["files"] += len(files)
            record["rows"] += rows
            work.write_record(name, record)
            on_block(rows)


def _one_hot(
    connection: duckdb.DuckDBPyConnection,
    files: list[Path],
    rows: int,
    columns: Sequence[int],
    vocabularies: Path,
    threads: int | None,
) -> NDArray[np.int32]:
    """The ids of a block: DuckDB uses all cores for a large vocabulary; small ones run side by side."""

    def ids_of(j: int) -> NDArray[np.int32]:
        return look_up(connection, _column(files, j), vocabulary_file(vocabularies, j))

    if not columns:
        return np.empty((rows, 0), np.int32)
    small = [j for j in columns if vocabulary_size(vocabularies, j) <= SMALL]
    with ThreadPoolExecutor(threads) as pool:
        ids = dict(zip(small, pool.map(ids_of, small), strict=True))
    ids |= {j: ids_of(j) for j in columns if j not in ids}
    # Polars transposes with all cores.
    block = pl.DataFrame({str(j): ids[j] for j in columns}).to_numpy(order="c")
    return np.ascontiguousarray(block)


def _column(files: list[Path], j: int) -> pl.Series:
    return pl.read_parquet(files, columns=[f"c{j}"], glob=False, hive_partitioning=False)[f"c{j}"]


def _blocks(
    staged: Sequence[tuple[Path, int, int]], block_rows: int, block_bytes: int
) -> Iterator[tuple[list[Path], int]]:
    """Whole staged files, as many as fit; one at least."""
    files: list[Path] = []
    rows = size = 0
    for path, more_rows, more_bytes in staged:
        if files and (rows + more_rows > block_rows or size + more_bytes > block_bytes):
            yield files, rows
            files, rows, size = [], 0, 0
        files.append(path)
        rows += more_rows
        size += more_bytes
    if files:
        yield files, rows

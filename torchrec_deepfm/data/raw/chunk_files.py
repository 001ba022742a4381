"""Tables that are read chunk by chunk: ORC, Arrow IPC (Feather), lines of JSON, rows in memory.

Also the columns that the names of folders add to a file of any format.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
import pyarrow.json
import pyarrow.orc

from torchrec_deepfm.data.raw.addresses import ARROW, ORC, File
from torchrec_deepfm.data.raw.table_files import BATCH_ROWS, Batch, CsvTable, ParquetTable, checked, read_errors

_BLOCK_BYTES: Final = 4 << 20


class ChunkTable:
    """A file of ORC, Arrow IPC or JSON lines, or rows in ``memory``; see ``ParquetTable``."""

    first_row = 1
    is_text = False
    rows = None

    def __init__(self, file: File, memory: pa.Table | None = None) -> None:
        self.file, self.memory = file, memory
        with self._open(None) as (schema, chunks):
            self.fields: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
            self.twice = {name for name in schema.names if schema.names.count(name) > 1}
            self.is_empty = not any(chunk.num_rows for chunk, _ in chunks)

    @classmethod
    def of_rows(cls, name: str, rows: pa.Table) -> "ChunkTable":
        """Rows in memory; ``name`` stands for a file's in messages."""
        return cls(File(name=name, bytes=rows.nbytes, path=""), memory=rows)

    def batches(self, names: Sequence[str], start: int = 0) -> Iterator[Batch]:
        """Continue reading at a row; yields batches whose sizes depend on the file."""
        skip = start
        with self._open(list(names)) as (_, chunks):
            for chunk, done in chunks:
                table = chunk.slice(min(skip, chunk.num_rows)).select(list(names))
                skip -= min(skip, chunk.num_rows)
                for first in range(0, table.num_rows, BATCH_ROWS):
                    rows = table.slice(first, BATCH_ROWS)
                    yield Batch(table=rows, broken={}, rows=rows.num_rows, done=done)

    @contextmanager
    def _open(self, names: list[str] | None) -> Iterator[tuple[pa.Schema, Iterator[tuple[pa.Table, float]]]]:
        """The schema, and chunks with the share that is read after each."""
        if self.memory is not None:
            yield self.memory.schema, iter([(self.memory, 1.0)])
            return
        with self.file.open() as opened, read_errors(self.file):
            checked(self.file, opened)
            if self.file.suffix in ORC:
                orc = pa.orc.ORCFile(opened)
                stripes = orc.nstripes
                yield orc.schema, ((_table(orc.read_stripe(i, names)), (i + 1) / stripes) for i in range(stripes))
            elif self.file.suffix in ARROW:
                ipc = pa.ipc.open_file(opened)
                count = ipc.num_record_batches
                yield ipc.schema, ((_table(ipc.get_batch(i)), (i + 1) / count) for i in range(count))
            else:
                reader = pa.json.open_json(
                    self.file.unpacked(opened),
                    read_options=pa.json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                )
                size = max(self.file.bytes, 1)
                yield reader.schema, ((_table(batch), _share(opened, size)) for batch in reader)


def open_table(file: File, delimiter: str | None = None, header: Sequence[str] = ()) -> "TableFile":
    """Open one file of a table.

    ``delimiter``: between the cells of a CSV; ``None`` takes it from the file's name. ``header``: the column names of a
    CSV without them. Returns the file, its columns known.
    """
    if file.format == "CSV":
        table: ParquetTable | CsvTable | ChunkTable = CsvTable(file, delimiter, header)
    else:
        table = ParquetTable(file) if file.format == "Parquet" else ChunkTable(file)
    return PartitionedTable(table) if file.partitions else table


def _share(opened: Any, size: int) -> float:
    """Share of the bytes that is read; a decompressor closes its file at the end."""
    return 1.0 if opened.closed else min(opened.tell() / size, 1.0)


def _table(rows: pa.RecordBatch | pa.Table) -> pa.Table:
    return rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])


class PartitionedTable:
    """A file with the columns that its folders' names add (``day=3/``), the same value in every row.

    A column of the file itself overrides them. Attributes are those of the file.
    """

    def __init__(self, table: ParquetTable | CsvTable | ChunkTable) -> None:
        self.table, self.file, self.twice = table, table.file, table.twice
        self.first_row, self.is_text, self.is_empty = table.first_row, table.is_text, table.is_empty
        self._values = {name: value for name, value in table.file.partitions.items() if name not in table.fields}
        kinds = {
            name: pa.binary() if self.is_text else pa.int64() if isinstance(value, int) else pa.string()
            for name, value in self._values.items()
        }
        self.fields: dict[str, pa.DataType] = {**table.fields, **kinds}

    def batches(self, names: Sequence[str], start: int = 0) -> Iterator[Batch]:
        """Continue reading at a row."""
        inner = [name for name in names if name not in self._values] or [next(iter(self.table.fields))]
        for batch in self.table.batches(inner, start):
            table = batch.table
            for name in names:
                if name in self._values:
                    table = table.append_column(name, self._repeated(name, table.num_rows))
            yield Batch(table=table.select(list(names)), broken=batch.broken, rows=batch.rows, done=batch.done)

    def _repeated(self, name: str, rows: int) -> pa.Array:
        value: Any = self._values[name]
        if self.is_text and value is not None:
            value = str(value).encode()
        return pa.array([value] * rows, self.fields[name])


TableFile = ParquetTable | CsvTable | ChunkTable | PartitionedTable

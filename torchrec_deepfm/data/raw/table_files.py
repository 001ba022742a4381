"""One Parquet or CSV file: which columns it has, and its rows in batches from any row on.

The values are interpreted elsewhere (``column_types.py``, ``columns.py``).
"""

import csv
import io
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from torchrec_deepfm.data.raw.addresses import File, one_line
from torchrec_deepfm.data.raw.file_kind import COMPRESSIONS, HEAD_BYTES, check_head, explain_damage
from torchrec_deepfm.errors import UserError

# Rows that are decoded at once, bytes of a CSV that are parsed at once (a row must fit), and bytes of a Parquet column
# chunk that are buffered: bounds on memory, whatever the file's row groups are.
BATCH_ROWS: Final = 65_536
_BLOCK_BYTES: Final = 4 << 20
_BUFFER_BYTES: Final = 1 << 20
_EMPTY: Final = "the file is empty; give a CSV whose first row holds the column names"
_BROKEN: Final = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
# Longest wait, in seconds, for Arrow to release Python objects; it takes milliseconds.
_RELEASE_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of a file.

    Args:
        table: The wanted columns. A row that is in ``broken`` has no row here.
        broken: Place of each CSV row with too few or too many cells among the rows of this batch (from 0), and what is
            wrong with it.
        rows: Rows of the batch, broken ones included.
        done: Share of the file that is read, 0 to 1.
    """

    table: pa.Table
    broken: dict[int, str]
    rows: int
    done: float


class ParquetTable:
    """A Parquet file: the Arrow type of each column in ``fields``, names that several have in ``twice``.

    ``first_row`` is the number that messages give to the first row.
    """

    first_row = 1
    is_text = False

    def __init__(self, file: File) -> None:
        self.file = file
        with file.open() as opened, read_errors(file):
            checked(file, opened)
            parquet = pa.parquet.ParquetFile(opened)
            names = parquet.schema_arrow.names
            self.fields: dict[str, pa.DataType] = dict(zip(names, parquet.schema_arrow.types, strict=True))
            self.twice = {name for name in names if names.count(name) > 1}
            self._groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        self.rows = sum(self._groups)
        self.is_empty = self.rows == 0

    def batches(self, names: Sequence[str], start: int = 0) -> Iterator[Batch]:
        """Continue reading at a row; the sizes of the batches depend on the row groups."""
        groups, skip = list(range(len(self._groups))), start
        while groups and skip >= self._groups[groups[0]]:
            skip -= self._groups[groups.pop(0)]
        row = start
        with self.file.open() as opened, read_errors(self.file):
            # Buffered instead of pre-fetched: a row group of any size then takes little memory.
            parquet = pa.parquet.ParquetFile(opened, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            # Arrow can't join lists of dictionary values over row groups: then it gets one at a time.
            alone = any(_has_inner_dictionary(self.fields[name]) for name in names)
            for some in [[group] for group in groups] if alone else [groups]:
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=some, columns=list(names)):
                    skipped = min(skip, batch.num_rows)
                    skip -= skipped
                    # Selecting `a` also selects `a.b`: pick by name.
                    table = pa.Table.from_batches([batch.slice(skipped)]).select(list(names))
                    if table.num_rows:
                        row += table.num_rows
                        yield Batch(table=table, broken={}, rows=table.num_rows, done=row / self.rows)


class CsvTable:
    """A CSV file whose first row holds the column names; all its cells are text here. See ``ParquetTable``.

    Rows are counted as a spreadsheet counts them, the header being row 1: blank lines are not rows, and a row whose
    quoted cells hold newlines is one row. ``rows`` is ``None``: they must be read to be counted.

    ``delimiter``: between the cells; ``None`` takes it from the file's name. ``header``: the column names of a file
    without such a row.
    """

    is_text = True
    rows = None

    def __init__(self, file: File, delimiter: str | None = None, header: Sequence[str] = ()) -> None:
        self.file, self.header = file, tuple(header)
        self.first_row = 1 if header else 2
        self.delimiter = delimiter or ("\t" if file.suffix.startswith(".tsv") else ",")
        if file.bytes == 0:
            raise UserError(_EMPTY, where=file.name)
        broken: list[Any] = []
        with file.open() as opened, read_errors(file):
            checked(file, opened)
            with _reading(self, opened, None, broken) as reader:
                names = reader.names
                rows = any(batch.num_rows for batch in reader) if not broken else True
        self.is_empty = not rows and not broken
        self.fields: dict[str, pa.DataType] = dict.fromkeys(names, pa.string())
        self.twice = {name for name in names if names.count(name) > 1}
        self._last = names[-1]

    def batches(self, names: Sequence[str], start: int = 0) -> Iterator[Batch]:
        """Continue reading at a row; earlier rows are parsed again, as a CSV has no index.

        ``start``: rows to leave out at the beginning, broken ones included. Yields batches of binary columns (the
        cells' bytes, null for an empty cell).
        """
        wanted = list(names)
        # The last column shows whether the end of the file is inside of a quoted cell.
        read = wanted if self._last in wanted or self._last in self.twice else [*wanted, self._last]
        broken: list[Any] = []
        row, last = 0, None
        with self.file.open() as opened, read_errors(self.file), _reading(self, opened, read, broken) as reader:
            for batch in reader:
                places, rows = _take(broken, row, batch.num_rows, self.first_row)
                table = pa.Table.from_batches([batch])
                last = table.column(self._last)[-1].as_py() if self._last in read and table.num_rows else last
                if row + rows > start:
                    cut = max(start - row, 0)
                    whole = sum(place < cut for place in places)  # broken rows before the cut have no row in the table
                    yield Batch(
                        table=table.select(wanted).slice(cut - whole),
                        broken={place - cut: what for place, what in places.items() if place >= cut},
                        rows=rows - cut,
                        done=min(opened.tell() / max(self.file.bytes, 1), 1.0),
                    )
                row += rows
            if broken:  # the file ends in broken rows
                places, rows = _take(broken, row, -1, self.first_row)
                cut = max(start - row, 0)
                kept = {place - cut: what for place, what in places.items() if place >= cut}
                if kept:
                    empty = pa.table({name: pa.array([], pa.binary()) for name in wanted})
                    yield Batch(table=empty, broken=kept, rows=len(kept), done=1.0)
        if last is not None and last.endswith(b"\n"):
            self._check_closed()

    def _check_closed(self) -> None:
        """Find an unclosed quote: it turns the rest of the file into one cell, and no parser reports it."""
        with self.file.open() as opened, read_errors(self.file):
            binary = cast("io.RawIOBase", self.file.unpacked(opened))
            text = io.TextIOWrapper(io.BufferedReader(binary), encoding="utf-8", errors="replace", newline="")
            try:
                for _ in csv.reader(text, delimiter=self.delimiter, strict=True):
                    pass
            except csv.Error as error:
                if "end of data" in str(error) or "limit" in str(error):
                    raise UserError(
                        "a quoted cell is not closed",
                        where=self.file.name,
                        remedy="close the quote, or download the file again if it is cut off",
                    ) from error


@contextmanager
def _reading(table: CsvTable, file: Any, names: list[str] | None, broken: list[Any]) -> Iterator["_Batches"]:
    """Read a CSV with pyarrow, and wait until it has released every Python object.

    Arrow parses ahead in threads of its own. They release the handler of invalid rows, and a Python file, some time
    after the reader is gone; a thread that does so while the interpreter ends aborts the process. So wait for it.

    ``names``: columns to read as bytes; ``None`` for all, to see the header. ``broken``: gets the rows that have too
    few or too many cells.
    """
    waiting: list[threading.Event] = []

    def lend(item: Any) -> Any:
        waiting.append(threading.Event())
        weakref.finalize(item, waiting[-1].set)
        return item

    def keep(row: Any) -> str:
        broken.append(row)
        return "skip"

    def unraisable(event: Any) -> None:  # else Python also prints a traceback
        if not (isinstance(event.exc_value, UnicodeDecodeError) and getattr(event.object, "__name__", "") == "keep"):
            hook(event)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    batches = _Batches()
    source = file if isinstance(file, pa.NativeFile) else pa.PythonFile(lend(_Lent(file)), mode="r")
    try:
        batches.reader = pa.csv.open_csv(
            table.file.unpacked(source),
            # One thread: the numbers of broken rows are known only then.
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=list(table.header) or None
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=table.delimiter, newlines_in_values=True, invalid_row_handler=lend(keep)
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=None if names is None else dict.fromkeys(names, pa.binary()),
                include_columns=names,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        yield batches
    finally:
        sys.unraisablehook = hook
        batches.reader = source = keep = None  # type: ignore[assignment]
        for released in waiting:
            released.wait(_RELEASE_SECONDS)


class _Batches:
    """The record batches of a reader; the reader itself must have no other owner."""

    reader: Any = None

    @property
    def names(self) -> list[str]:
        return list(self.reader.schema.names)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return iter(self.reader)


class _Lent:
    """A Python file object without other references, so that its release can be observed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def checked(file: File, opened: Any) -> None:
    """Raise where the first bytes contradict the file's name."""
    check_head(file.name, file.path, opened.read(HEAD_BYTES))
    opened.seek(0)


class read_errors:  # noqa: N801 (used as a function)
    """Turn what pyarrow finds wrong with a file into one line that names it."""

    def __init__(self, file: File) -> None:
        self.file = file

    def __enter__(self) -> None:
        """Return nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise the line in place of the error."""
        name = self.file.name
        if isinstance(error, UserError) or error is None:
            return
        if isinstance(error, UnicodeDecodeError):
            raise UserError("the header is not UTF-8", where=name, remedy="save the file as UTF-8") from error
        # A broken row that is not UTF-8 never reaches the handler, and is an error of the whole file.
        if isinstance(error, pa.ArrowInvalid) and (found := _BROKEN.search(str(error))):
            row, wanted, cells = found.groups()
            raise UserError(
                f"row {row}, the row has {cells} cells, the header {wanted}, and its text is not UTF-8",
                where=name,
                remedy="save the file as UTF-8, or repair or remove the row",
            ) from error
        if isinstance(error, pa.ArrowInvalid) and "Empty CSV file" in str(error):
            raise UserError(_EMPTY, where=name) from error
        if isinstance(error, pa.ArrowInvalid) and "straddling" in str(error):
            raise UserError(
                f"a row is longer than {_BLOCK_BYTES >> 20} MiB",
                where=name,
                remedy="close the quote if one is open, or shorten the row",
            ) from error
        if isinstance(error, pa.ArrowNotImplementedError):
            raise UserError(
                f"pyarrow can't read this ({one_line(error)})", where=name, remedy="write its columns in simpler types"
            ) from error
        suffix = PurePath(self.file.suffix).suffix
        if isinstance(error, OSError) and suffix in COMPRESSIONS:
            raise UserError(explain_damage(suffix, error), where=name) from error
        if isinstance(error, pa.ArrowException | OSError | EOFError):
            raise UserError(
                f"the file can't be read as {self.file.format} ({one_line(error)})",
                where=name,
                remedy="download or write the file again",
            ) from error


def _has_inner_dictionary(arrow: pa.DataType) -> bool:
    inner = [arrow.field(i).type for i in range(arrow.num_fields)]
    return any(pa.types.is_dictionary(kind) or _has_inner_dictionary(kind) for kind in inner)


def _take(broken: list[Any], first: int, good: int, first_row: int) -> tuple[dict[int, str], int]:
    """Take the broken rows that lie among the next `good` rows; -1 takes all. Row 1 is the header, if there is one.

    ``broken``: what the parser left out, in order. It reads ahead, so some may belong to a later batch. Returns what is
    wrong at each broken place of the batch, and the batch's number of rows, broken ones included.
    """
    places: dict[int, str] = {}
    while broken and (good < 0 or broken[0].number - first_row - first < good + len(places)):
        row = broken.pop(0)
        places[row.number - first_row - first] = (
            f"the row has {row.actual_columns} cells, the header {row.expected_columns}"
        )
    return places, max(good, 0) + len(places)

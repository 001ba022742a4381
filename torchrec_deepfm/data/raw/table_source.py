"""The user's own table, Parquet or CSV, as sources of pieces (layout ``table`` of a schema).

``addresses.py`` finds the files, ``table_files.py`` reads rows, ``table_frame.py`` makes values of them. Here they
become ``source.Piece``s whose borders depend on nothing but the rows before them.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw.addresses import find_files
from torchrec_deepfm.data.raw.bad_rows import Skipped, refuse_or_list
from torchrec_deepfm.data.raw.cells import columns as cells
from torchrec_deepfm.data.raw.cells.table_frame import category_types, table_frame
from torchrec_deepfm.data.raw.chunk_files import ChunkTable, TableFile, open_table
from torchrec_deepfm.data.raw.source import JoinedPiece, Piece
from torchrec_deepfm.data.raw.table_files import BATCH_ROWS, CsvTable
from torchrec_deepfm.data.schema import Schema, toml_key, toml_text
from torchrec_deepfm.errors import UserError

# A piece ends before `piece_rows` rows when its values take this much memory: long lists and texts do.
_PIECE_BYTES: Final = 64 << 20
# Columns that a message names when one is missing.
_NAMED: Final = 8
_REMEDY: Final = "correct the name in the schema, or add the column"
_DELIMITERS: Final = (";", "\t", ",", "|")


@dataclass(frozen=True)
class TableSource:
    """One file of a table; see ``source.Source``.

    ``types``: ``string`` or ``integer`` per categorical column, ``None`` where the file has only missing values.
    ``keep``: columns that pieces carry along unchanged, without a label where not ``labelled``.
    """

    file: TableFile
    schema: Schema
    types: tuple[str | None, ...]
    piece_rows: int
    labelled: bool = True
    keep: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """As the user named it; for a file of a folder, the folder's name and its own."""
        return self.file.file.name

    @property
    def bytes(self) -> int:
        """Size of the stored file."""
        return self.file.file.bytes

    def pieces(self, *, start: int = 0, line: int = 0, skip_bad: bool = False) -> Iterator[Piece]:
        """Continue reading at the end of a piece.

        ``start``: ``end`` of the previous piece, or 0: rows of the table, bad ones included. ``line``: not needed here:
        a row's number follows from ``start``. Yields the pieces. Their borders are the same however often reading was
        resumed.
        """
        del line
        frames: list[pl.DataFrame] = []
        kept: list[pa.Table] = []
        skipped: list[Skipped] = []
        row, begin, size, done = start, start, 0, 0.0
        for table, broken, done in self._steps(start):
            first = row + self.file.first_row
            frame, faults = self._frame(table, broken)
            skipped += refuse_or_list(faults, first=first, path=self.path, skip_bad=skip_bad, before=row - begin)
            if (columns := self._kept(table, broken)) is not None:
                kept.append(columns)
            row, size = row + table.num_rows + len(broken), size + _memory(frame)
            frames.append(frame)
            if len(frames) == self._cut[1] or size >= _PIECE_BYTES:
                yield self._piece(frames, kept, skipped, row, done)
                frames, kept, skipped, size, begin = [], [], [], 0, row
        if frames:
            yield self._piece(frames, kept, skipped, row, 1.0)

    def share(self, *, start: int, line: int, skip_bad: bool, mine: Callable[[int], bool]) -> Iterator[Piece | None]:
        """Read some of the pieces; ``None`` stands for the others, which have to be read to find where they end."""
        for number, piece in enumerate(self.pieces(start=start, line=line, skip_bad=skip_bad)):
            yield piece if mine(number) else None

    @property
    def _cut(self) -> tuple[int, int]:
        """(Rows of a step, most steps of a piece). Steps have equal size, so a piece may end after any of them."""
        steps = -(-self.piece_rows // BATCH_ROWS)
        return self.piece_rows // steps, steps

    def _piece(
        self, frames: list[pl.DataFrame], kept: list[pa.Table], skipped: list[Skipped], row: int, done: float
    ) -> Piece:
        return Piece(
            frame=pl.concat(frames, rechunk=True),
            end=row,
            line=row + self.file.first_row - 1,
            done=done,
            skipped=tuple(skipped),
            kept=pa.concat_tables(kept) if kept else None,
        )

    def _steps(self, start: int) -> Iterator[tuple[pa.Table, dict[int, str], float]]:
        """(Good rows, broken ones by place, share read), always as many rows at once, except the last ones.

        The batches of a file follow its row groups and blocks, and so depend on where reading began; these do not.
        """
        step, _ = self._cut
        tables: list[pa.Table] = []
        places: dict[int, str] = {}
        held = 0
        wanted = dict.fromkeys([*_columns_read(self.schema, labelled=self.labelled), *self.keep])
        for batch in self.file.batches(list(wanted), start):
            at = used = 0  # rows of the batch, and rows of its table, that are handed on
            while batch.rows - at:
                count = min(batch.rows - at, step - held)
                bad = {place: what for place, what in batch.broken.items() if at <= place < at + count}
                places |= {held + place - at: what for place, what in bad.items()}
                tables.append(batch.table.slice(used, count - len(bad)))
                at, used, held = at + count, used + count - len(bad), held + count
                if held == step:
                    yield pa.concat_tables(tables), places, batch.done
                    tables, places, held = [], {}, 0
        if held:
            yield pa.concat_tables(tables), places, 1.0

    def _frame(self, table: pa.Table, broken: dict[int, str]) -> tuple[pl.DataFrame, dict[int, str]]:
        """The frame of a step's good rows, and what is wrong with the others by place among all of them."""
        frame, faults = table_frame(table, self.schema, self.types, labelled=self.labelled)
        if not broken:
            return frame, faults
        # Places in the table -> places among all rows of the step.
        places = [place for place in range(table.num_rows + len(broken)) if place not in broken]
        return frame, {places[place]: what for place, what in faults.items()} | broken

    def _kept(self, table: pa.Table, broken: dict[int, str]) -> pa.Table | None:
        """The columns to keep of all rows of a step; a broken row has none of their values."""
        if not self.keep:
            return None
        kept = table.select(list(dict.fromkeys(self.keep)))
        if self.file.is_text:
            kept = pa.table({name: cells.texts(kept.column(name)) for name in kept.column_names})
        if not broken:
            return kept
        good = iter(range(table.num_rows))
        rows = table.num_rows + len(broken)
        return kept.take(pa.array([None if place in broken else next(good) for place in range(rows)], pa.int64()))


def open_tables(
    named: str | ChunkTable,
    schema: Schema,
    *,
    piece_rows: int = 262_144,
    types: Sequence[str | None] | None = None,
    labelled: bool = True,
    keep: Sequence[str] = (),
) -> list[TableSource]:
    r"""Open the files of a table, one source per file in natural order, and check that they have the schema's columns.

    ``named`` is a path, a pattern or an fsspec address of a file or of a folder of such files, of which those without
    rows are left out; or an opened table. ``types`` are those of the categories in training; ``None`` derives them from
    the files. ``keep``: columns that pieces carry along unchanged. UserError: a file can't be read, lacks a column or
    has it in a type that does not fit, or there is no row.

    Example:
        >>> import tempfile, pathlib
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "clicks.csv"
        >>> _ = path.write_text("click,user,price\n1,anna,2.5\n0,,3\n")
        >>> schema = Schema(label="click", numeric=("price",), categorical=("user",), layout="table")
        >>> [source] = open_tables(str(path), schema)
        >>> [piece.frame.rows() for piece in source.pieces()]
        [[(1, 2.5, 'anna'), (0, 3.0, None)]]
        >>> folder.cleanup()
    """
    if piece_rows < 1:
        raise UserError(f"{piece_rows} is too small", where="piece_rows", remedy="give 1 or more")
    if isinstance(named, ChunkTable):
        tables: list[TableFile] = [named]
        named = named.file.name
    else:
        tables = [open_table(file, schema.delimiter, schema.header) for file in find_files(named)]
    filled = [table for table in tables if not table.is_empty]
    if not filled:
        raise UserError("the table has no rows", where=named, remedy="give one with data or leave it out")
    sources = [_source(table, schema, piece_rows, types, labelled, tuple(keep)) for table in filled]
    return sources if types is not None else unify(sources)


def joined_pieces(
    sources: Sequence[TableSource], start: tuple[int, int, int], *, skip_bad: bool
) -> Iterator[JoinedPiece]:
    """Read files of a table as one, since opening a small file costs more than reading its rows.

    ``sources``: the files, after ``unify``. ``start``: ``next_start`` of the previous piece, or zeros. Yields the
    pieces. Their borders are the same however often reading was resumed.
    """
    begin, row, _ = start
    total = max(sum(source.bytes for source in sources), 1)
    before = sum(source.bytes for source in sources[:begin])
    held: list[tuple[int, int, pa.Table, dict[int, str]]] = []  # index of the source, first row, good rows, broken ones
    rows = size = 0

    def piece(done: float) -> JoinedPiece:
        last, first, table, broken = held[-1]
        after = first + table.num_rows + len(broken)
        frame, faults = sources[last]._frame(pa.concat_tables(part for _, _, part, _ in held), {})
        skipped, good = [], 0
        for place, first, table, broken in held:
            kept = [i for i in range(table.num_rows + len(broken)) if i not in broken]
            bad = broken | {kept[i - good]: faults[i] for i in faults if good <= i < good + table.num_rows}
            good += table.num_rows
            first += sources[place].file.first_row
            left_out = refuse_or_list(bad, first=first, path=sources[place].path, skip_bad=skip_bad)
            skipped += [(place, one) for one in left_out]
        held.clear()
        return JoinedPiece(frame=frame, next_start=(last, after, 0), done=done, skipped=tuple(skipped))

    for place, source in enumerate(sources[begin:], begin):
        for table, broken, done in source._steps(row):
            if held and held[-1][2].schema != table.schema:
                yield piece(before / total)
                rows = size = 0
            held.append((place, row, table, broken))
            row += table.num_rows + len(broken)
            rows, size = rows + table.num_rows, size + table.nbytes
            if rows >= source.piece_rows or size >= _PIECE_BYTES:
                yield piece(min((before + done * source.bytes) / total, 1.0))
                rows = size = 0
        before, row = before + source.bytes, 0
    if held:
        yield piece(1.0)


def unify(sources: Sequence[TableSource]) -> list[TableSource]:
    """Give each categorical column one type over several files, also of several ``open_tables``.

    Returns the same sources; a column that has only missing values in one file gets its type from the others.
    """
    known: dict[str, tuple[str, str]] = {}
    for source in sources:
        for name, kind in zip(source.schema.categorical, source.types, strict=True):
            if kind is None:
                continue
            first, path = known.setdefault(name, (kind, source.path))
            if first != kind:
                raise UserError(
                    f"column {name!r} holds {_word(kind)}, but {_word(first)} in {path}",
                    where=source.path,
                    remedy=f'write both the same way, or set type = "string" under [columns.{toml_key(name)}]',
                )
    return [
        replace(source, types=tuple(known.get(name, (None, ""))[0] for name in source.schema.categorical))
        for source in sources
    ]


def _word(kind: str) -> str:
    return "text" if kind == "string" else "integers"


def missing_column(table: TableFile, name: str, *, role: str = "", remedy: str = _REMEDY) -> UserError:
    """Build the error for a missing column, with its ``role`` where the name does not show it, and the closest name."""
    names = list(table.fields)
    lower = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), list(lower), n=1)
    shown = ", ".join(repr(other) for other in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
    file, what = table.file.name, f"no column {name!r}{role and f', {role}'}; the file has {shown}{hint}"
    if table.is_text and any(map(is_number, names)):
        return UserError(
            what, where=file, remedy="its first row looks like data: add a first row that holds the column names"
        )
    if isinstance(table, CsvTable) and len(names) == 1 and (cut := delimiter_in(names[0])):
        return UserError(
            what,
            where=file,
            remedy=f"its cells are separated by {cut!r}: set delimiter = {toml_text(cut)} in the schema",
        )
    return UserError(what, where=file, remedy=remedy)


def delimiter_in(header: str) -> str | None:
    """Find the delimiter of a header that was read as one name.

    Returns the delimiter, ``None`` where it is one name.

    Example:
        >>> delimiter_in("click;user"), delimiter_in("click")
        (';', None)
    """
    return next((delimiter for delimiter in _DELIMITERS if delimiter in header), None)


def is_number(name: str) -> bool:
    """Return whether a column's name is a number, which means that a CSV lacks its header."""
    try:
        float(name)
    except ValueError:
        return False
    return True


def _columns_read(schema: Schema, *, labelled: bool) -> tuple[str, ...]:
    return schema.columns_read if labelled else schema.features_read


def _source(
    table: TableFile,
    schema: Schema,
    piece_rows: int,
    types: Sequence[str | None] | None,
    labelled: bool,
    keep: tuple[str, ...],
) -> TableSource:
    wanted = _columns_read(schema, labelled=labelled)
    for name in (*wanted, *keep):
        if name not in table.fields:
            owners = [other for other in schema.weighted if schema.options(other).weights == name]
            role = f"the weights of column {owners[0]!r}" if owners else ""
            raise missing_column(table, name, role=role, **({} if name in wanted else {"remedy": "correct --keep"}))
        if name in table.twice:
            raise UserError(
                f"column {name!r} appears twice", where=table.file.name, remedy="give every column a different name"
            )
    try:
        found = category_types(table.fields, schema, types=types, labelled=labelled, is_text=table.is_text)
    except UserError as error:
        raise error.within(table.file.name) from error
    return TableSource(file=table, schema=schema, types=found, piece_rows=piece_rows, labelled=labelled, keep=keep)


def _memory(frame: pl.DataFrame) -> int:
    """Bytes of the values, independent of their layout in memory, which a resume may change."""
    total = 0
    for series in frame:
        if series.dtype == pl.String:
            total += 16 * len(series) + int(series.str.len_bytes().sum())
        elif isinstance(series.dtype, pl.List):
            total += 8 * len(series)
            inner = series.explode().drop_nulls()
            total += 16 * len(inner) + (int(inner.str.len_bytes().sum()) if inner.dtype == pl.String else 0)
        elif isinstance(series.dtype, pl.Array):
            total += 4 * series.dtype.size * len(series)
        else:
            total += 8 * len(series)
    return total

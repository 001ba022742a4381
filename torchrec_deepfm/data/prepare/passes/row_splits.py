"""Splits that depend on values of the rows: by time, by user, by a column that names the split.

Before the other passes the rows are read once for these columns alone. What was read waits in the work folder; one
process then settles the split of every row, by DuckDB, which sorts beyond memory.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.publish import sync
from torchrec_deepfm.data.prepare.options import SPLITS_BY_ROW, SplitBy
from torchrec_deepfm.data.prepare.sources.inputs import LOTS_BY_ROW
from torchrec_deepfm.data.prepare.sources.units import OnPiece, Unit, deal
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.raw.cells import dates
from torchrec_deepfm.data.raw.cells.columns import scalars, shown_value
from torchrec_deepfm.data.raw.source import Source
from torchrec_deepfm.data.raw.table_source import TableSource, missing_column
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.data.values.duckdb_session import parquet, quoted
from torchrec_deepfm.errors import UserError, flag

# What a row is dealt to; rows in a gap go nowhere.
CODES: Final = {split: lots.start for split, lots in LOTS_BY_ROW.items()}
GAP: Final = 3
_NAMES: Final = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}
_TENTHS: Final = (8, 9)
_MICROSECONDS: Final = 1e6
_RECORD: Final = "row_splits"


@dataclass(frozen=True, kw_only=True)
class RowSplits:
    """How the rows are split.

    ``split`` is ``time``, ``leave-last-out`` or ``column``; another one where only leaks across time are looked for.
    Where ``schema`` makes parts of the time column, their format counts. ``halved`` is the stem whose rows are
    validation and test, half each.
    """

    split: str
    by: SplitBy
    schema: Schema
    work: WorkFolder
    skip_bad: bool
    halved: str | None = None

    @property
    def deals(self) -> bool:
        """Whether the split of a row follows from its values."""
        return self.split in SPLITS_BY_ROW

    def lots_file(self, unit: Unit) -> Path:
        """The file with the code of every row of a unit."""
        return self.work.staged / f"lots_{unit.name}.npy"

    def check(self, sources: Iterable[Source]) -> None:
        """Raise where a source lacks one of the columns."""
        for source in sources:
            assert isinstance(source, TableSource)
            for role, name in self.by.columns.items():
                if name not in source.file.fields:
                    raise missing_column(source.file, name, remedy=f"correct {flag(role)}")

    def collect(self, unit: Unit, place: int, on_piece: OnPiece) -> None:
        """Read the columns of a unit, the ``place``-th one, unless an earlier call did."""
        if self._record(unit) is not None:
            return
        frames, row, instants = [], 0, False
        for source in unit.sources:
            assert isinstance(source, TableSource)
            first = 0
            names = tuple(self.by.columns.values())
            for piece in replace(source, keep=names).pieces(skip_bad=self.skip_bad):
                assert piece.kept is not None
                bad = {one.place for one in piece.skipped}
                good = np.array([i for i in range(piece.kept.num_rows) if i not in bad], np.int64)
                columns, instants = self._columns(source, piece.kept.take(pa.array(good)), first + good)
                if not self.deals:
                    lots = np.empty(len(good), np.uint8)
                    for part, chosen in deal(unit, row, len(good)):
                        split = "validation" if part.stem == self.halved else part.split
                        lots[slice(None) if chosen is None else chosen] = CODES[split]
                    columns["code"] = pl.Series(lots)
                columns["unit"] = pl.Series(np.full(len(good), place, np.int32))
                columns["row"] = pl.Series(np.arange(row, row + len(good)))
                frames.append(pl.DataFrame(columns))
                first, row = first + piece.kept.num_rows, row + len(good)
                on_piece(len(good), piece.done)
        if not row:
            raise UserError("the file has no rows", where=unit, remedy="give a file with data or leave it out")
        pl.concat(frames).write_parquet(self._file(unit), compression="lz4")
        sync(self._file(unit))
        self.work.write_record(f"survey_split_{unit.name}", {"rows": row, "instants": instants})

    def settle(
        self, units: Sequence[Unit], connection: duckdb.DuckDBPyConnection, on_change: Callable[[], None]
    ) -> list[str]:
        """Settle the split of every row, and look for rows that leak.

        ``on_change``: called where rows were prepared with another split, since a source has changed. Returns lines
        for the user.
        """
        instants = {bool((self._record(unit) or {})["instants"]) for unit in units}
        if len(instants) > 1:
            raise UserError(
                "some files hold dates and others numbers",
                where=f"--time {self.by.time}",
                remedy="write all the same way",
            )
        shown = _instant if instants == {True} else _number
        rows = parquet([self._file(unit) for unit in units])
        said: list[str] = []
        if self.deals:
            codes = "code"
            if self.split == "time":
                codes, said = self._by_time(rows, connection, shown)
            elif self.split == "leave-last-out":
                codes = self._by_user()
            target = self.work.staged / "lots.parquet"
            time = "time" if self.by.time is not None else "NULL AS time"
            dealt = f"SELECT unit, row, {time}, ({codes})::UTINYINT AS code FROM {rows}"  # noqa: S608
            connection.execute(f"COPY ({dealt}) TO {quoted(target)} (FORMAT parquet)")
            rows = parquet([target])
            self._write(units, rows, connection, on_change)
        if self.by.time is not None and self.split != "time":
            said += self._leaks(rows, connection, shown)
        return said

    def _record(self, unit: Unit) -> dict[str, Any] | None:
        return self.work.record(f"survey_split_{unit.name}")

    def _file(self, unit: Unit) -> Path:
        return self.work.staged / f"split_{unit.name}.parquet"

    def _columns(
        self, source: TableSource, kept: pa.Table, places: NDArray[np.int64]
    ) -> tuple[dict[str, pl.Series], bool]:
        """``time``, ``user`` and ``code`` of rows, as far as they are wanted; and whether times are instants."""
        found: dict[str, pl.Series] = {}
        instants = False

        def check(name: str, series: pl.Series, what: Callable[[int], str]) -> pl.Series:
            if series.null_count():
                row = int(series.is_null().arg_max() or 0)
                raise UserError(
                    f"row {places[row] + source.file.first_row}, column {name!r}: {what(row)}", where=source.path
                )
            return series

        if (name := self.by.time) is not None:
            times, faults, instants = self._times(source, kept.column(name))
            missing = "the time is missing; give it, or remove the row"
            found["time"] = check(name, times, lambda row: faults.get(row, missing))
        if (name := self.by.user) is not None:
            found["user"] = scalars(kept.column(name)).cast(pl.String)
        if (name := self.by.split_column) is not None:
            texts = scalars(kept.column(name)).cast(pl.String)
            codes = texts.str.to_lowercase().replace_strict(_NAMES, default=None, return_dtype=pl.UInt8)
            found["code"] = check(
                name, codes, lambda row: f"{shown_value(texts[row])} is not a split; write train, validation or test"
            )
        return found, instants

    def _times(self, source: TableSource, column: pa.ChunkedArray) -> tuple[pl.Series, dict[int, str], bool]:
        """Times as Float64: microseconds, or the numbers of a column of which no format is known."""
        name = str(self.by.time)
        options = self._time_options
        if options.format is None and not dates.is_time(column.type):
            given = scalars(column)
            numbers = given.cast(pl.Float64, strict=False)
            if numbers.null_count() == given.null_count():  # also where both are text of a CSV
                return numbers.fill_nan(None), {}, False
        try:
            dates.check_time(column.type, options, name, csv=True)
        except UserError as error:
            raise UserError(f"column {name!r}: {error}", where=source.path) from error
        times = dates.local_times(column, options)
        return times.series.cast(pl.Int64).cast(pl.Float64), times.faults, True

    @property
    def _time_options(self) -> Column:
        """How the schema reads the time column, where it makes parts of it."""
        named = (self.schema.options(name) for name in (*self.schema.numeric, *self.schema.categorical))
        parts = [options for options in named if options.part is not None and options.of == self.by.time]
        return parts[0] if parts else Column(part="hour")

    def _by_time(
        self, rows: str, connection: duckdb.DuckDBPyConnection, shown: Callable[[float], str]
    ) -> tuple[str, list[str]]:
        gap, is_span = self.by.gap_amount
        if is_span and shown is _number:
            raise UserError(
                f"column {self.by.time!r} holds numbers of an unknown unit",
                where=f"--gap {self.by.gap}",
                remedy="give the gap as such a number, or make a part of the time in the schema, with its format",
            )
        if shown is _instant:
            if gap and not is_span:
                raise UserError(
                    f"column {self.by.time!r} holds times",
                    where=f"--gap {self.by.gap}",
                    remedy="add a unit, such as 1d or 12h",
                )
            gap *= _MICROSECONDS
        count = int(_one(connection, f"SELECT count(*) FROM {rows}"))  # noqa: S608
        order = f"SELECT time FROM {rows} ORDER BY time LIMIT 1 OFFSET "  # noqa: S608
        first, second = (float(_one(connection, order + str(count * share // 10))) for share in _TENTHS)
        codes = (
            f"CASE WHEN time < {first!r} THEN 0 WHEN time < {min(first + gap, second)!r} THEN {GAP} "
            f"WHEN time < {second!r} THEN 1 WHEN time < {second + gap!r} THEN {GAP} ELSE 2 END"
        )
        line = f"split by {self.by.time}: train before {shown(first)}, validation from {shown(first + gap)}, "
        return codes, [line + f"test from {shown(second + gap)}"]

    def _by_user(self) -> str:
        """Users with too few rows only train; a row without a user does too."""
        leave = self.by.leave
        order = f"{'time DESC, ' if self.by.time is not None else ''}unit DESC, row DESC"
        last = f"row_number() OVER (PARTITION BY user ORDER BY {order})"
        return (
            f"CASE WHEN user IS NULL OR count(*) OVER (PARTITION BY user) <= {2 * leave} THEN 0 "
            f"WHEN {last} <= {leave} THEN 2 WHEN {last} <= {2 * leave} THEN 1 ELSE 0 END"
        )

    def _write(
        self, units: Sequence[Unit], rows: str, connection: duckdb.DuckDBPyConnection, on_change: Callable[[], None]
    ) -> None:
        """Write the code of every row, unit by unit."""
        digests: dict[str, str] = {}
        for place, unit in enumerate(units):
            query = f"SELECT code FROM {rows} WHERE unit = {place} ORDER BY row"  # noqa: S608
            codes = np.asarray(connection.execute(query).fetchnumpy()["code"], np.uint8)
            np.save(self.lots_file(unit), codes)
            sync(self.lots_file(unit))
            digests[unit.name] = xxhash.xxh3_128(codes.tobytes()).hexdigest()
        if self.work.record(_RECORD) != digests:
            on_change()
            self.work.write_record(_RECORD, digests)

    def _leaks(self, rows: str, connection: duckdb.DuckDBPyConnection, shown: Callable[[float], str]) -> list[str]:
        """Describe held-out rows that are not later than the last training row."""
        last = _one(connection, f"SELECT max(time) FROM {rows} WHERE code = 0")  # noqa: S608
        said = []
        for name in ("validation", "test") if last is not None else ():
            query = f"SELECT count(*), count(*) FILTER (WHERE time <= ?) FROM {rows} WHERE code = ?"  # noqa: S608
            [(count, early)] = connection.execute(query, [last, CODES[name]]).fetchall()
            if early:
                said.append(
                    f"warning: {early:,} of {count:,} {name} rows are not later than the last training row "
                    f"({self.by.time} {shown(last)}): the model has seen what came after them; --split time keeps "
                    "them apart"
                )
        return said


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    [(found,)] = connection.execute(query).fetchall()
    return found


def _instant(microseconds: float) -> str:
    return str(datetime.fromtimestamp(microseconds / _MICROSECONDS, UTC).replace(tzinfo=None))


def _number(number: float) -> str:
    return f"{number:.15g}"

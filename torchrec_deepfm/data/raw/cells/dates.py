"""Dates and times of a user's table: hour, weekday, day, month, and age in days.

Shape letters: n rows.
"""

import re
from datetime import UTC, date, datetime
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw.cells.column_types import Kind, kind_of, stored
from torchrec_deepfm.data.raw.cells.columns import Values, scalars, shown_value, texts
from torchrec_deepfm.data.schema import UNITS, Column, toml_key
from torchrec_deepfm.errors import UserError

# Other years are the mark of a wrong unit.
_YEARS: Final = (1900, 2199)
_DAY_MICROSECONDS: Final = 86_400_000_000
_NUMBERS: Final = '"s" (seconds since 1970), "ms", "us", "ns" or a pattern such as "%y%m%d%H"'
# Patterns that `guessed_format` tries on whole numbers, with the years that it believes.
_PATTERNS: Final = {
    "%Y%m%d": (1990, 2069),
    "%y%m%d%H": (2000, 2069),
    "%Y%m%d%H": (1990, 2069),
    "%Y%m%d%H%M": (1990, 2069),
    "%Y%m%d%H%M%S": (1990, 2069),
}
_SURE: Final = 20  # different numbers that are dates by a pattern, from which on they are taken for dates


def is_time(arrow: pa.DataType) -> bool:
    """Whether a column of a type holds dates or timestamps."""
    arrow = stored(arrow)
    return bool(pa.types.is_timestamp(arrow) or pa.types.is_date(arrow))


def check_time(arrow: pa.DataType, options: Column, name: str, *, csv: bool) -> None:
    """Raise unless times can be read from a column of a type."""
    kind = kind_of(arrow)
    if is_time(arrow) or kind.scalar == "nothing" or csv:
        return
    if kind not in (Kind("integer"), Kind("float"), Kind("text")):
        raise UserError(f"it holds {kind}, not times", remedy="convert it to a date, a timestamp, a number or text")
    if kind.scalar != "text" and options.format is None:
        raise UserError(
            f"it holds {kind}, not times", remedy=f"set format = {_NUMBERS} under [columns.{toml_key(name)}]"
        )


def part_of(column: pa.ChunkedArray, options: Column, until: pa.ChunkedArray | None) -> Values:
    """Take a part of each time.

    ``column``: n times. ``until``: n times at which an age is counted, if that is a column. Returns n values Int64, an
    age in days Float64; null for missing.
    """
    times = local_times(column, options)
    faults = times.faults
    if options.part != "age":
        at = times.series.dt
        found = {"hour": at.hour, "weekday": at.weekday, "day": at.day, "month": at.month}[str(options.part)]()
        return Values(series=found.cast(pl.Int64), faults=faults)
    if until is None:
        end = pl.Series([datetime.fromisoformat(str(options.until))]).cast(pl.Datetime("us"))
    else:
        ends = local_times(until, options)
        end, faults = ends.series, ends.faults | faults
    age = end.cast(pl.Int64).cast(pl.Float64) - times.series.cast(pl.Int64).cast(pl.Float64)
    return Values(series=age / _DAY_MICROSECONDS, faults=faults)


def local_times(column: pa.ChunkedArray, options: Column) -> Values:
    """Read times as a clock of the time zone shows them.

    Instants (numbers since 1970, times with a zone) are converted to the zone; others are taken as they stand. Returns
    n values Datetime("us"); other values are faults.
    """
    arrow, zone = stored(column.type), options.timezone or "UTC"
    kind = kind_of(arrow)
    if is_time(arrow):
        given = pl.DataFrame(pl.from_arrow(pa.table({"x": column.cast(arrow)}))).to_series()
        zoned = pa.types.is_timestamp(arrow) and arrow.tz is not None
        found = given.cast(pl.Datetime("us", "UTC") if zoned else pl.Datetime("us"))
        return _checked(_in_zone(found, zone) if zoned else found, given)
    if kind.scalar == "nothing":
        return Values(series=pl.Series([None] * len(column), dtype=pl.Datetime("us")), faults={})
    given = pl.Series(texts(column).to_pylist(), dtype=pl.String) if kind.scalar == "text" else scalars(column)
    if given.dtype == pl.String:
        given = given.str.strip_chars(" ").replace("", None)
    else:
        given = given.fill_nan(None) if given.dtype.is_float() else given
    if options.format in UNITS:
        numbers = given.cast(pl.Float64, strict=False)
        since = (numbers * (1e6 / UNITS[options.format])).round().cast(pl.Int64, strict=False)
        return _checked(_in_zone(since.cast(pl.Datetime("us")).dt.replace_time_zone("UTC"), zone), given)
    if options.format is None:
        return _checked(_iso(given.cast(pl.String), zone), given)
    written = given.cast(pl.Int64, strict=False).cast(pl.String) if given.dtype.is_numeric() else given
    return _checked(_by_pattern(written, options.format, zone), given)


def guessed_format(values: pl.Series, name_says_time: bool) -> str | None:
    """Guess the format that makes times of given integers or text: empty for ISO 8601 text, ``None`` for no times."""
    different = values.unique()
    if values.dtype == pl.String:
        # Digits alone are numbers; without this a year would be a date.
        dates = different.str.contains(r"^\d{4}-\d{2}-\d{2}").all() and not _iso(different, "UTC").null_count()
        return "" if dates else None
    if not (name_says_time or len(different) >= _SURE):
        return None
    low, high = int(different.min()), int(different.max())  # type: ignore[arg-type]
    for pattern, (first, last) in _PATTERNS.items():
        if len(str(low)) == len(str(high)) == _digits(pattern):
            found = _by_pattern(different.cast(pl.String), pattern, "UTC")
            if not found.null_count() and bool(found.dt.year().is_between(first, last).all()):
                return pattern
    for unit, parts in UNITS.items():
        if name_says_time and 3e8 * parts <= low and high <= 4.1e9 * parts:  # from 1979 to 2099
            return unit
    return None


def _checked(found: pl.Series, given: pl.Series) -> Values:
    """Times with the faults of the given values that are none."""
    years = found.dt.year()
    within = years.is_between(*_YEARS)
    faults = {}
    for row in np.flatnonzero((given.is_not_null() & ~within.fill_null(False)).to_numpy()).tolist():
        year = years[row]
        faults[row] = f"{shown_value(given[row])} is not a time" + (
            "; set or correct its format" if year is None else f" of our days (year {year}); correct its format"
        )
    return Values(series=found.set(~within.fill_null(False), None), faults=faults)


def _in_zone(instants: pl.Series, zone: str) -> pl.Series:
    return instants.dt.convert_time_zone(zone).dt.replace_time_zone(None)


def _iso(given: pl.Series, zone: str) -> pl.Series:
    """ISO 8601 texts, with or without a zone."""

    def read(text: str | None) -> datetime | None:
        try:
            found = None if text is None else datetime.fromisoformat(text)
        except ValueError:
            return None
        return found

    different = given.unique()
    zoned: dict[str | None, datetime | None] = {}
    plain: dict[str | None, datetime | None] = {}
    for text in different.to_list():
        time = read(text)
        if time is not None:
            (plain if time.tzinfo is None else zoned)[text] = time if time.tzinfo is None else time.astimezone(UTC)
    frame = pl.DataFrame({"text": given})
    local = pl.DataFrame(
        {
            "text": [*plain, *zoned],
            "time": pl.concat([_naive(plain), _in_zone(_naive(zoned).dt.replace_time_zone("UTC"), zone)]),
        },
        schema_overrides={"text": pl.String},
    )
    return frame.join(local, on="text", how="left", maintain_order="left")["time"]


def _naive(times: dict[str | None, datetime | None]) -> pl.Series:
    plain = [None if time is None else time.replace(tzinfo=None) for time in times.values()]
    return pl.Series("time", plain, dtype=pl.Datetime("us"))


def _digits(pattern: str) -> int:
    return len(date(2001, 1, 1).strftime(pattern))


def _by_pattern(written: pl.Series, pattern: str, zone: str) -> pl.Series:
    if re.fullmatch(r"(%[YymdHMSj])+", pattern):  # a number has lost its leading zeros
        written = written.str.zfill(_digits(pattern))
    if "%H" in pattern and "%M" not in pattern:  # the parser wants minutes too
        pattern, written = f"{pattern} %M", written + " 00"
    zoned = "%z" in pattern
    if not any(hour in pattern for hour in ("%H", "%I", "%T", "%R", "%X", "%c", "%s")):
        return written.str.to_date(pattern, strict=False).cast(pl.Datetime("us"))
    found = written.str.to_datetime(pattern, strict=False, time_unit="us")
    return _in_zone(found, zone) if zoned else found

"""Raw click logs in text form -> one Parquet file of typed columns each.

DuckDB does the reading. One regular expression says what a good line is, so that the rule stands in one place and does
not depend on what a type cast happens to accept (``1e3`` or ``1_000`` as an integer, say).

Columns of the Parquet file: ``label`` UTINYINT, ``n0`` ... FLOAT (already transformed), ``c0`` ... UINTEGER or NULL.
The row order is that of the text.
"""

import gzip
import re
from collections.abc import Iterator
from glob import escape
from pathlib import Path

import duckdb

from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

_INTEGER = "-?[0-9]+"
_HEX = "[0-9a-fA-F]{1,8}"
_REPAIR = "repair or remove the line"
# The longest text of the input that an error message repeats.
_SHOWN = 40


def quoted(path: Path) -> str:
    """Return a path as an SQL literal that names a file to write.

    Args:
        path: Any path, also one that contains quotes.

    Returns:
        The quoted literal.

    Example:
        >>> quoted(Path("it's"))
        "'it''s'"
    """
    return "'" + str(path).replace("'", "''") + "'"


def quoted_source(path: Path) -> str:
    """Return a path as an SQL literal that names one file to read.

    Unescaped, DuckDB takes ``*``, ``?`` and ``[`` as a pattern that may match several.

    Args:
        path: Any path.

    Returns:
        The quoted literal.

    Example:
        >>> quoted_source(Path("day[1].tsv"))
        "'day[[]1].tsv'"
    """
    return quoted(Path(escape(str(path))))


def line_pattern(schema: Schema) -> str:
    r"""Return the regular expression that a whole good line matches (RE2 and Python read it alike).

    Args:
        schema: The columns.

    Returns:
        A pattern without groups to capture.

    Example:
        >>> re.fullmatch(line_pattern(Schema(label="y", numeric=("n",), categorical=("c",))), "1\t-3\tff") is not None
        True
    """
    return rf"[01](?:\t(?:{_INTEGER})?){{{len(schema.numeric)}}}(?:\t(?:{_HEX})?){{{len(schema.categorical)}}}"


def stage(connection: duckdb.DuckDBPyConnection, source: Path, schema: Schema, target: Path) -> int:
    """Read one raw text file, plain or ``.gz``, into one Parquet file.

    Args:
        connection: An open DuckDB connection that keeps insertion order.
        source: Tab separated text without a header.
        schema: Its columns.
        target: The Parquet file to write.

    Returns:
        The number of rows (blank lines are no rows).

    Raises:
        UserError: The file can't be read, holds no row, or has a bad line; the message names the first one.
    """
    _check_readable(source)
    field = iter(range(1, len(schema.columns) + 1))
    columns = [f"f[{next(field)}]::UTINYINT AS label"]
    # A missing number and a negative one become 0: x_j = 0 takes the field out of the model (docs/data.md).
    # greatest() skips NULL. Digits beyond the range of a double are told as an error, not passed on as infinity.
    columns += [_log1p(f"nullif(f[{next(field)}], '')::DOUBLE") + f" AS n{j}" for j in range(len(schema.numeric))]
    columns += [f"('0x' || nullif(f[{next(field)}], ''))::UINTEGER AS c{j}" for j in range(len(schema.categorical))]
    query = f"""
        COPY (
            SELECT {", ".join(columns)}
            FROM (
                SELECT CASE WHEN regexp_full_match(line, '{line_pattern(schema)}') THEN string_split(line, chr(9))
                            ELSE error('bad line') END AS f
                FROM {_lines(source)}
                WHERE line IS NOT NULL
            )
        ) TO {quoted(target)} (FORMAT parquet)
    """  # noqa: S608 (paths are quoted, all else is ours)
    try:
        (rows,) = connection.execute(query).fetchall()[0]
    except duckdb.Error as error:
        # DuckDB's threads meet bad lines in no fixed order: look for the first one.
        fault = first_fault(source, schema)
        if fault is None:
            raise
        raise UserError(fault) from error
    if rows == 0:
        raise UserError(f"{source}: the file holds no row; give a file with data or leave it out")
    return int(rows)


def first_fault(source: Path, schema: Schema) -> str | None:
    """Say in one line what is wrong with the first bad line of a file, if there is one.

    This runs only when reading has already failed. It never yields data.

    Args:
        source: Tab separated text, plain or ``.gz``.
        schema: Its columns.

    Returns:
        The message (file, line number from 1, column, remedy), or ``None`` where every line is good.
    """
    pattern = re.compile(line_pattern(schema))
    number = 0
    try:
        for number, line in enumerate(_text(source), start=1):
            row = line.rstrip("\n")
            if row and (not pattern.fullmatch(row) or _too_large(row, schema)):
                return f"{source}: line {number}{_describe(row, schema)}"
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        return (
            f"{source}: the compressed data can't be read past line {number} ({error}); fetch or compress the file anew"
        )
    return None


def _log1p(number: str) -> str:
    finite = f"CASE WHEN isinf({number}) THEN error('too large') ELSE {number} END"
    return f"ln(1 + greatest({finite}, 0))::FLOAT"


def _lines(source: Path) -> str:
    """The table function that yields a file's lines, NULL for a blank one. strict_mode=false lets CRLF and LF mix."""
    compression = "gzip" if source.suffix == ".gz" else "none"
    return (
        f"read_csv({quoted_source(source)}, columns = {{'line': 'VARCHAR'}}, header = false, "
        f"delim = '\x01\x02\x03\x04', auto_detect = false, quote = '', escape = '', nullstr = '', strict_mode = false, "
        f"compression = '{compression}')"
    )


def _text(source: Path) -> Iterator[str]:
    # Bytes that are no UTF-8 stay visible as escapes instead of stopping the search.
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=None) as lines:
        yield from lines


def _check_readable(source: Path) -> None:
    if source.is_dir():
        raise UserError(f"{source}: this is a folder; name the files in it")
    try:
        with source.open("rb") as file:
            file.read(1)
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file; check the path") from error
    except OSError as error:
        raise UserError(f"{source}: the file can't be read ({error.strerror}); check its permissions") from error


def _too_large(row: str, schema: Schema) -> bool:
    return any(_is_infinite(field) for field in row.split("\t")[1 : 1 + len(schema.numeric)])


def _is_infinite(field: str) -> bool:
    return bool(field) and abs(float(field)) == float("inf")


def _describe(row: str, schema: Schema) -> str:
    fields = row.split("\t")
    if len(fields) != len(schema.columns):
        return (
            f" has {len(fields)} columns, expected {len(schema.columns)} (label, {len(schema.numeric)} numbers, "
            f"{len(schema.categorical)} categories, tab separated); {_REPAIR}"
        )
    for index, (name, field) in enumerate(zip(schema.columns, fields, strict=True)):
        shown = repr(field if len(field) <= _SHOWN else field[:_SHOWN] + "...")
        if index == 0:
            if not field:
                return f", column {name}: the label is missing, it must be 0 or 1; {_REPAIR}"
            if field not in ("0", "1"):
                return f", column {name}: {shown} is no label, it must be 0 or 1; {_REPAIR}"
        elif index <= len(schema.numeric):
            if field and not re.fullmatch(_INTEGER, field):
                return f", column {name}: {shown} is no integer; {_REPAIR}"
            if _is_infinite(field):
                return f", column {name}: {shown} is too large for a number; {_REPAIR}"
        elif field and not re.fullmatch(_HEX, field):
            return f", column {name}: {shown} is no hexadecimal number of at most 8 digits; {_REPAIR}"
    raise AssertionError(f"a line that matches in parts but not as a whole: {row!r}")

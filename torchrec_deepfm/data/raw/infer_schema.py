"""A first schema for a user's table, to be read and corrected: ``schema infer``.

It looks at the first rows only and says next to each column why it stands where it does. The rules are told in
``docs/tables.md``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_deepfm.data.raw import column_types
from torchrec_deepfm.data.raw import columns as cells
from torchrec_deepfm.data.raw.addresses import find_files
from torchrec_deepfm.data.raw.table_files import CsvTable, ParquetTable, open_table
from torchrec_deepfm.data.raw.table_source import delimiter_in, is_number, missing_column
from torchrec_deepfm.data.schema import toml_text
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_local

# In this order, whatever the case of their letters.
_LABELS: Final = ("label", "click", "clicked", "is_click", "is_clicked", "target", "y")
# "id" as a word of its own, in snake_case, spaced or camelCase; and names of time, which no rule about size may catch.
_ID: Final = re.compile(r"(?:^|[^A-Za-z])(?:id|ids|ID|IDs|Id|Ids)$|[a-z0-9](?:Id|ID|Ids|IDs)$")
_TIME: Final = re.compile(r"(?i)time|date|(?:^|[^a-z])(?:ts|epoch)(?:$|[^a-z])")
# Integers: so few different ones are categories; so large ones are ids or hashes.
_FEW: Final = 50
# Names that a message lists.
_SHOWN: Final = 4
_HUGE: Final = 2**31
_SEPARATORS: Final = ("|", ";")


@dataclass
class _Column:
    """What is known of one column.

    Args:
        name: Its name.
        kind: What the file holds; for a CSV, what its cells look like.
        series: The sampled values: a list column's are its elements.
        rows: Rows of the sample.
        lengths: Elements per row of a list column.
    """

    name: str
    kind: column_types.Kind
    series: pl.Series
    rows: int
    lengths: tuple[int, ...] = ()
    text: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def infer_schema(named: str, *, label: str | None = None, sample_rows: int = 100_000) -> str:
    """Guess a schema from the first rows of a table.

    Args:
        named: A local path or fsspec address of a Parquet or CSV file, or of a folder of such files.
        label: Name of the 0/1 column; ``None`` looks for one.
        sample_rows: Rows to look at.

    Returns:
        TOML that ``read_schema`` takes, with a comment beside each column.

    Raises:
        UserError: The table can't be read, no column looks like a label, or none like a category.
    """
    tables, delimiter = _open(named)
    tables = [table for table in tables if not table.is_empty]
    if not tables:
        raise UserError(f"{named}: there is no row in it; give a table with data")
    first = tables[0]
    if label is not None and label not in first.fields:
        raise missing_column(first, label, remedy="name another --label")
    if first.twice:
        raise UserError(
            f"{first.file.name}: column {sorted(first.twice)[0]!r} appears twice; give every column a name of its own"
        )
    columns = [_looked_at(name, column, text=first.is_text) for name, column in _sample(tables, sample_rows).items()]
    if first.is_text and any(map(is_number, first.fields)) and label is None:
        shown = ", ".join(map(repr, list(first.fields)[:_SHOWN]))
        raise UserError(
            f"{first.file.name}: its first row looks like data ({shown}), and a CSV begins with the column names; add "
            "such a row, or pass --label NAME if these are names. Criteo's own text needs no schema"
        )
    found = _find_label(named, columns, label)
    others = [column for column in columns if column is not found]
    numeric, categorical, left_out = _sort(others)
    if not categorical:
        raise UserError(
            f"{named}: no column looks like a category, and a model needs one; write the schema by hand, docs/tables.md"
        )
    rows = found.rows
    share = cells.labels(pa.chunked_array([found.series.to_arrow()])).series.mean()
    lines = [
        f"# The columns of {toml_text(named)}, guessed from its first {rows:,} rows: read and correct.",
        "# docs/tables.md tells all keys.",
        "",
        *([f"delimiter = {toml_text(delimiter)}"] if delimiter else []),
        f"label = {toml_text(found.name)}  # {float(share or 0):.1%} ones",  # type: ignore[arg-type]
        "",
        *_names("numeric", numeric),
        "",
        *_names("categorical", categorical),
    ]
    if left_out:
        lines += ["", "# Left out:", *(f"#   {toml_text(column.name)}: {_comment(column.why)}" for column in left_out)]
    options = [column for column in categorical if column.options]
    if options:
        lines += ["", "[columns]"]
        for column in options:
            inner = ", ".join(f"{key} = {_toml(value)}" for key, value in column.options.items())
            lines.append(f"{toml_text(column.name)} = {{ {inner} }}")
    return "\n".join(lines) + "\n"


def write_inferred(named: str, output: Path, label: str | None = None) -> None:
    """Guess a schema and write it to a new file.

    Args:
        named: The table, as for ``infer_schema``.
        output: The TOML file to write; it must not exist.
        label: Name of the 0/1 column; ``None`` looks for one.

    Raises:
        UserError: As ``infer_schema``, or the file exists or can't be written.
    """
    check_local(output)
    exists = UserError(f"{output}: the file exists, and its corrections would be lost; name another or remove it")
    if output.exists():
        raise exists
    text = infer_schema(named, label=label)
    try:
        with output.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise exists from error
    except OSError as error:
        raise UserError(
            f"{output}: it can't be written ({error.strerror}); name a file in a writable folder"
        ) from error


def _open(named: str) -> tuple[list[ParquetTable | CsvTable], str | None]:
    """The files of a table, and the delimiter of a CSV if its name does not say it."""
    files = find_files(named)
    tables = [open_table(file) for file in files]
    header = next(iter(tables[0].fields), "")
    delimiter = delimiter_in(header) if tables[0].is_text and len(tables[0].fields) == 1 else None
    return (tables if delimiter is None else [open_table(file, delimiter) for file in files]), delimiter


def _sample(tables: Sequence[ParquetTable | CsvTable], rows: int) -> dict[str, pa.ChunkedArray]:
    """The first rows of a table, a file after the other as far as they have the first one's columns and types."""
    names = list(tables[0].fields)
    parts: list[pa.Table] = []
    for table in tables:
        if any(table.fields.get(name) != tables[0].fields[name] for name in names):
            break
        for batch in table.batches(names):
            if batch.broken:
                place = min(batch.broken)
                raise UserError(
                    f"{table.file.name}: row {place + table.first_row}, {batch.broken[place]}; repair or remove the row"
                )
            parts.append(batch.table.slice(0, rows - sum(part.num_rows for part in parts)))
            if sum(part.num_rows for part in parts) >= rows:
                break
        if sum(part.num_rows for part in parts) >= rows:
            break
    whole = pa.concat_tables(parts)
    return {name: whole.column(name) for name in names}


def _looked_at(name: str, column: pa.ChunkedArray, *, text: bool) -> _Column:
    kind = column_types.kind_of(column.type)
    rows = len(column)
    if kind.scalar not in ("boolean", "integer", "float", "text"):
        return _Column(name, kind, pl.Series(dtype=pl.Null), rows)
    if kind.is_list:
        lengths = tuple(pc.fill_null(pc.list_value_length(column), 0).to_pylist())
        elements = cells.scalars(pa.chunked_array([pc.list_flatten(chunk) for chunk in column.chunks]))
        return _Column(name, kind, elements, rows, lengths)
    series = cells.scalars(column)
    if not text:
        return _Column(name, kind, series, rows)
    return _Column(name, column_types.Kind(_looks_like(series)), series, rows, text=True)


def _looks_like(cells_: pl.Series) -> str:
    """What the cells of a CSV column hold."""
    given = cells_.drop_nulls().str.strip_chars(" ")
    if not len(given):
        return "nothing"
    if given.str.contains("^[-+]?0[0-9]").any():
        return "text"  # zeros before a number, as in 007, mean something
    whole = given.cast(pl.Int64, strict=False)
    if bool((whole.cast(pl.String) == given).fill_null(False).all()):
        return "integer"
    return "text" if given.cast(pl.Float64, strict=False).null_count() else "float"


def _find_label(named: str, columns: Sequence[_Column], label: str | None) -> _Column:
    by_name: dict[str, _Column] = {}
    for column in columns:
        by_name.setdefault(column.name.casefold(), column)
    if label is not None:
        [chosen] = [column for column in columns if column.name == label]
        if not _is_label(chosen):
            raise UserError(f"{named}: column {label!r} holds other values than 0 and 1; name another --label")
        return chosen
    for name in _LABELS:
        if name in by_name and _is_label(by_name[name]):
            return by_name[name]
    able = [repr(column.name) for column in columns if _is_label(column)]
    hint = f" (these hold 0 and 1: {', '.join(able[:8])})" if able else ""
    raise UserError(
        f"{named}: no column named {', '.join(_LABELS)} holds values 0 and 1; pass label= or --label NAME{hint}"
    )


def _is_label(column: _Column) -> bool:
    if column.kind.is_list or not len(column.series) or column.series.null_count():
        return False
    if column.kind.scalar == "text" and not column.text:
        return False
    return not cells.labels(pa.chunked_array([column.series.to_arrow()])).faults


def _sort(columns: Sequence[_Column]) -> tuple[list[_Column], list[_Column], list[_Column]]:
    """(Numeric, categorical, left out), each with its reason and options set."""
    numeric: list[_Column] = []
    categorical: list[_Column] = []
    left_out: list[_Column] = []
    places: dict[str, list[_Column]] = {"numeric": numeric, "categorical": categorical, "left out": left_out}
    weights = [column for column in columns if column.kind == column_types.Kind("float", True)]
    for column in columns:
        if column in weights:
            continue
        place, column.why = _place(column)
        places[place].append(column)
    for weight in weights:
        able = [
            column
            for column in categorical
            if column.kind.is_list and column.lengths == weight.lengths and "weights" not in column.options
        ]
        if len(able) == 1:
            able[0].options["weights"] = weight.name
            able[0].why += f"; {toml_text(weight.name)} has as many numbers in each row, perhaps its weights"
        else:
            weight.why = "lists of decimal numbers; as the weights of a list column they stand in its options"
            left_out.append(weight)
    return numeric, categorical, left_out


def _place(column: _Column) -> tuple[str, str]:
    """Where a column goes, and why."""
    kind, series = column.kind, column.series.drop_nulls()
    if column.series.dtype == pl.Float64:
        series = series.drop_nans()
    if kind.scalar not in column_types.TAKEN:
        return "left out", f"it holds {kind}; convert it to numbers, integers or text"
    if not len(series):
        return "left out", "no value in these rows"
    different = series.n_unique()
    count = f"{kind}, {different:,} different"
    if kind.is_list:
        column.options["list"] = True
        return "categorical", count
    if kind.scalar == "boolean":
        return "categorical", "booleans"
    if kind.scalar == "text":
        return "categorical", count + _text_note(column, series, different)
    if kind.scalar == "float":
        numbers = series.str.strip_chars(" ").cast(pl.Float64, strict=False) if column.text else series
        whole = bool((numbers % 1 == 0).all())
        if whole and _ID.search(column.name):
            column.options["type"] = "integer"
            return "categorical", f"whole numbers, {different:,} different; its name ends in id"
        return "numeric", "decimal numbers"
    numbers = series.str.strip_chars(" ") if series.dtype == pl.String else series
    numbers = numbers.cast(pl.Int64, strict=False).drop_nulls()
    if len(numbers) < len(series):
        column.options["type"] = "string"
        return "categorical", f"{count}; some beyond a 64-bit integer, so taken as text"
    return _place_integers(column, numbers, count)


def _place_integers(column: _Column, series: pl.Series, count: str) -> tuple[str, str]:
    different = series.n_unique()
    low, high = int(series.min()), int(series.max())  # type: ignore[arg-type]
    reason = ""
    if _ID.search(column.name):
        reason = "its name ends in id"
    elif _TIME.search(column.name) and different > _FEW:
        return "numeric", f"{count}; its name speaks of time"
    elif different <= _FEW:
        reason = "few"
    elif 2 * different >= high - low + 1:
        reason = "they fill their range, as numbered ids do"
    elif max(-low, high) >= _HUGE:
        reason = "too large for counts"
    if not reason:
        return "numeric", f"{count}; a range with gaps, as counts have"
    if column.text:
        column.options["type"] = "integer"
    return "categorical", f"{count}; {reason}{_spread_note(different, column.rows)}"


def _text_note(column: _Column, series: pl.Series, different: int) -> str:
    note = _spread_note(different, column.rows)
    for separator in _SEPARATORS:
        if note or 2 * int(series.str.contains(separator, literal=True).sum()) < len(series):
            continue
        elements = series.str.split(separator).list.explode()
        if _looks_like(elements.filter(elements != "")) == "float":
            note = f"; numbers cut by {separator}: the weights of a list? Then name it there as weights, and not here"
        else:
            option = f'{toml_text(column.name)} = {{ list = true, separator = "{separator}" }}'
            note = f"; lists cut by {separator}? Then write below [columns]: {option}"
    return note


def _spread_note(different: int, rows: int) -> str:
    if different == 1 and rows > 1:
        return "; the same in every row: of no use"
    if different == rows > 1:
        return "; another in every row: the number of the row? Then remove it"
    return ""


def _names(key: str, columns: Sequence[_Column]) -> list[str]:
    if not columns:
        return [f"{key} = []"]
    return [f"{key} = [", *(f"    {toml_text(column.name)},  # {_comment(column.why)}" for column in columns), "]"]


def _toml(value: object) -> str:
    return toml_text(value) if isinstance(value, str) else json.dumps(value)


def _comment(text: str) -> str:
    """A text as a TOML comment may hold it. Type names can have names of columns in them, and these anything."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)

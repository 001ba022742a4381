"""A first schema for a user's table, to be read and corrected: ``schema infer``.

It reads the first rows only. A comment beside each column has what was seen and the reason for its place;
``column_roles.py`` has the rules.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from torchrec_deepfm.data.raw.addresses import find_files
from torchrec_deepfm.data.raw.bad_rows import refuse_or_list
from torchrec_deepfm.data.raw.cells import columns as cells
from torchrec_deepfm.data.raw.chunk_files import ChunkTable, TableFile, open_table
from torchrec_deepfm.data.raw.column_roles import SampledColumn, sampled, sort
from torchrec_deepfm.data.raw.table_source import delimiter_in, is_number, missing_column
from torchrec_deepfm.data.schema import LabelRule, toml_text
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_local

# In this order, whatever the case of their letters.
_LABELS: Final = ("label", "click", "clicked", "is_click", "is_clicked", "target", "y")
_RATINGS: Final = ("rating", "ratings", "stars", "score", "overall")
# Not "weight" itself, which may be a product's.
_WEIGHTS: Final = ("sample_weight", "row_weight", "example_weight", "instance_weight")
# Names that a message lists.
_SHOWN: Final = 4


def infer_schema(
    named: str | ChunkTable, *, label: str | None = None, sample_rows: int = 100_000, keep: bool = False
) -> str:
    """Guess a schema from the first rows of a table, as TOML with a comment beside each column.

    ``label`` is a 0/1 column or a comparison such as ``rating >= 4``; ``None`` looks for one. ``keep`` keeps columns
    whatever they hold: keys, constants, what gives the label away. UserError: the table can't be read, no column looks
    like a label, or none like a feature.
    """
    tables: Sequence[TableFile]
    tables, delimiter = ([named], None) if isinstance(named, ChunkTable) else _open(named)
    named = named.file.name if isinstance(named, ChunkTable) else named
    tables = [table for table in tables if not table.is_empty]
    if not tables:
        raise UserError("the table has no rows", where=named, remedy="give one with data")
    first = tables[0]
    rule = None if label is None or label in first.fields else LabelRule.parse(label)
    if rule is not None and rule.column not in first.fields:
        raise missing_column(first, rule.column, remedy="name another --label")
    if label is not None and rule is None and label not in first.fields:
        raise missing_column(first, label, remedy="name another --label")
    if first.twice:
        raise UserError(
            f"column {sorted(first.twice)[0]!r} appears twice",
            where=first.file.name,
            remedy="give every column a different name",
        )
    columns = [sampled(name, column, text=first.is_text) for name, column in _sample(tables, sample_rows).items()]
    if first.is_text and any(map(is_number, first.fields)) and label is None:
        shown = ", ".join(map(repr, list(first.fields)[:_SHOWN]))
        raise UserError(
            f"its first row looks like data ({shown}), and a CSV begins with the column names",
            where=first.file.name,
            remedy="add such a row, or write a schema with header = [names], or pass --label NAME if these "
            "are names. Criteo's own text needs no schema",
        )
    found = _find_label(named, columns, rule or label)
    weight = None if keep else next(filter(_is_weight, (column for column in columns if column is not found)), None)
    others = [column for column in columns if column not in (found, weight)]
    labels = cells.labels(pa.chunked_array([found.series.to_arrow()]), rule).series.to_numpy()
    numeric, categorical, left_out = sort(others, labels, keep=keep)
    if not (numeric or categorical):
        reasons = "".join(f"; {column.name!r} is left out: {column.why}" for column in left_out[:_SHOWN])
        raise UserError(
            "no column looks like a feature, and a model needs one",
            where=named,
            remedy=f"write the schema by hand, docs/tables.md{reasons}",
        )
    rows = found.rows
    lines = [
        f"# The columns of {toml_text(named)}, guessed from its first {rows:,} rows: read and correct.",
        "# docs/tables.md lists all keys.",
        "",
        *([f"delimiter = {toml_text(delimiter)}"] if delimiter else []),
        f"label = {toml_text(found.name if label is None else label)}  # {labels.mean():.1%} ones",
        *([f"weight = {toml_text(weight.name)}  # {_comment(weight.comment)}"] if weight else []),
        "",
        *_names("numeric", numeric),
        "",
        *_names("categorical", categorical),
    ]
    if left_out:
        lines += [
            "",
            "# Left out:",
            *(f"#   {toml_text(column.name)}: {_comment(column.comment)}" for column in left_out),
        ]
    options = [column for column in (*numeric, *categorical) if column.options]
    if options:
        lines += ["", "[columns]"]
        for column in options:
            inner = ", ".join(f"{key} = {_toml(value)}" for key, value in column.options.items())
            lines.append(f"{toml_text(column.name)} = {{ {inner} }}")
    return "\n".join(lines) + "\n"


def write_inferred(named: str, output: Path, label: str | None = None) -> None:
    """Guess a schema as ``infer_schema`` does, and write it to a new file."""
    check_local(output)
    exists = UserError(
        "the file exists, and its corrections would be lost", where=output, remedy="name another or remove it"
    )
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
            f"it can't be written ({error.strerror})", where=output, remedy="name a file in a writable folder"
        ) from error


def _open(named: str) -> tuple[list[TableFile], str | None]:
    """The files of a table, and the delimiter of a CSV if its name does not say it."""
    files = find_files(named)
    tables = [open_table(file) for file in files]
    header = next(iter(tables[0].fields), "")
    delimiter = delimiter_in(header) if tables[0].is_text and len(tables[0].fields) == 1 else None
    return (tables if delimiter is None else [open_table(file, delimiter) for file in files]), delimiter


def _sample(tables: Sequence[TableFile], rows: int) -> dict[str, pa.ChunkedArray]:
    """The first rows of a table, a file after the other as far as they have the first one's columns and types."""
    names = list(tables[0].fields)
    parts: list[pa.Table] = []
    for table in tables:
        if any(table.fields.get(name) != tables[0].fields[name] for name in names):
            break
        for batch in table.batches(names):
            refuse_or_list(batch.broken, first=table.first_row, path=table.file.name)
            parts.append(batch.table.slice(0, rows - sum(part.num_rows for part in parts)))
            if sum(part.num_rows for part in parts) >= rows:
                break
        if sum(part.num_rows for part in parts) >= rows:
            break
    whole = pa.concat_tables(parts)
    return {name: whole.column(name) for name in names}


def _find_label(named: str, columns: Sequence[SampledColumn], label: LabelRule | str | None) -> SampledColumn:
    by_name: dict[str, SampledColumn] = {}
    for column in columns:
        by_name.setdefault(column.name.casefold(), column)
    if isinstance(label, LabelRule):
        [chosen] = [column for column in columns if column.name == label.column]
        found = cells.labels(pa.chunked_array([chosen.series.to_arrow()]), label)
        if found.faults or found.series.n_unique() != 2:
            fault = f"row {min(found.faults) + 1}: {found.faults[min(found.faults)]}" if found.faults else ""
            what = fault or f"{label} holds in {'every' if found.series[0] else 'no'} row"
            raise UserError(f"column {label.column!r}, {what}", where=named, remedy="name another --label")
        return chosen
    if label is not None:
        [chosen] = [column for column in columns if column.name == label]
        if not _is_label(chosen):
            raise UserError(
                f"column {label!r} holds other values than 0 and 1", where=named, remedy="name another --label"
            )
        return chosen
    for name in _LABELS:
        if name in by_name and _is_label(by_name[name]):
            return by_name[name]
    able = [repr(column.name) for column in columns if _is_label(column)]
    hint = f" (these hold 0 and 1: {', '.join(able[:8])})" if able else ""
    rated = next((column for column in columns if column.name.casefold() in _RATINGS), None)
    if rated is not None and rated.kind.scalar in ("integer", "float") and not rated.kind.is_list:
        numbers = cells.numbers(pa.chunked_array([rated.series.to_arrow()])).series.drop_nulls().to_numpy()
        hint += f"; a rating becomes one by a threshold, such as --label '{rated.name} >= {np.median(numbers):g}'"
    raise UserError(
        f"no column named {', '.join(_LABELS)} holds values 0 and 1",
        where=named,
        remedy=f"pass label= or --label NAME{hint}",
    )


def _is_label(column: SampledColumn) -> bool:
    if column.kind.is_list or not len(column.series) or column.series.null_count():
        return False
    if column.kind.scalar == "text" and not column.text:
        return False
    return not cells.labels(pa.chunked_array([column.series.to_arrow()])).faults


def _is_weight(column: SampledColumn) -> bool:
    """Whether a column has a name that only weights of rows have, and holds such."""
    if column.name.casefold() not in _WEIGHTS or column.kind.scalar not in ("integer", "float") or column.kind.is_list:
        return False
    numbers = cells.numbers(pa.chunked_array([column.series.to_arrow()])).series.to_numpy()
    column.why = "its name and its numbers are those of weights of rows"
    return bool(np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() > 0)


def _names(key: str, columns: Sequence[SampledColumn]) -> list[str]:
    if not columns:
        return [f"{key} = []"]
    return [f"{key} = [", *(f"    {toml_text(column.name)},  # {_comment(column.comment)}" for column in columns), "]"]


def _toml(value: object) -> str:
    return toml_text(value) if isinstance(value, str) else json.dumps(value)


def _comment(text: str) -> str:
    """A text as a TOML comment may hold it. Type names can have names of columns in them, and these anything."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)

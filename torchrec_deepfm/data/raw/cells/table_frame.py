"""Rows of an Arrow table, of a file or in memory, into the frame of a ``Piece``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw.cells import column_types, dates
from torchrec_deepfm.data.raw.cells import columns as cells
from torchrec_deepfm.data.raw.cells.vectors import check_vectors, vectors
from torchrec_deepfm.data.schema import Column, Schema, is_date
from torchrec_deepfm.errors import UserError

# The type of categories of Criteo's layout.
HEX: Final = "hex"


def table_frame(
    table: pa.Table, schema: Schema, types: Sequence[str | None], *, labelled: bool = True
) -> tuple[pl.DataFrame, dict[int, str]]:
    """Convert rows to the types of a ``Piece``: the good rows, and what is wrong with the others by place from 0.

    ``types`` is what ``category_types`` returned, or what the categories had in training.
    """
    found: dict[str, cells.Values] = {}
    layout = _layout(schema, tuple(types))
    if labelled:
        found["label"] = cells.labels(table.column(schema.label_column), schema.label_rule)
    if labelled and schema.weight is not None:
        found["row_weight"] = cells.row_weights(table.column(schema.weight))
    for key, name in layout.parts.items():
        found[key] = _part(table, schema, name)
    for key, (source, width, separator) in layout.vectors.items():
        found[key] = vectors(table.column(source), width, separator)
    for key, (name, wanted) in layout.lists.items():
        options = schema.options(name)
        weights = None if options.weights is None else table.column(options.weights)
        found[key], weighed = cells.lists(table.column(schema.source(name)), wanted, options.separator, weights)
        if weighed is not None:
            found[f"w{key[1:]}"] = weighed
    for transform, some in layout.numbers.items():
        columns = {key: table.column(source) for key, source in some}
        found |= cells.read_columns(columns, partial(cells.numbers, transform=transform))
    for wanted, some in layout.categories.items():
        columns = {key: table.column(source) for key, source in some}
        found |= cells.read_columns(columns, partial(cells.categories, wanted=wanted))
    keys = [key for key in layout.keys if key in found]
    faults: dict[int, str] = {}
    for key in keys:
        for row, what in found[key].faults.items():
            faults.setdefault(row, f"column {_name_of(key, schema)!r}: {what}")
    frame = pl.DataFrame([found[key].series.rename(key) for key in keys])
    crosses = [name for name in schema.categorical if schema.options(name).cross]
    if crosses:
        key_of = {name: f"c{j}" for j, name in enumerate(schema.categorical)}
        made = (_cross([key_of[other] for other in schema.options(name).cross]).alias(key_of[name]) for name in crosses)
        frame = frame.with_columns(made)
    if faults:
        good = np.ones(frame.height, bool)
        good[list(faults)] = False
        frame = frame.filter(pl.Series(good))
    return frame, faults


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the columns of a frame are read, by their keys: each by its own rule, or many by one."""

    parts: Mapping[str, str]
    vectors: Mapping[str, tuple[str, int, str | None]]
    lists: Mapping[str, tuple[str, str]]
    numbers: Mapping[str | None, Sequence[tuple[str, str]]]
    categories: Mapping[str, Sequence[tuple[str, str]]]
    keys: Sequence[str]


@lru_cache(64)  # for few rows this takes longer than reading them
def _layout(schema: Schema, types: tuple[str | None, ...]) -> _Layout:
    parts, number_lists, lists = {}, {}, {}
    numbers: dict[str | None, list[tuple[str, str]]] = {}
    categories: dict[str, list[tuple[str, str]]] = {}
    for j, name in enumerate(schema.numeric):
        options, key = schema.options(name), f"n{j}"
        if options.part is not None:
            parts[key] = name
        elif options.width is not None:
            number_lists[key] = (str(schema.source(name)), options.width, options.separator)
        else:
            numbers.setdefault(options.transform, []).append((key, str(schema.source(name))))
    for j, (name, known) in enumerate(zip(schema.categorical, types, strict=True)):
        options, key, wanted = schema.options(name), f"c{j}", known or "string"
        if options.cross:
            continue
        if options.part is not None:
            parts[key] = name
        elif options.list:
            lists[key] = (name, wanted)
        else:
            categories.setdefault(wanted, []).append((key, str(schema.source(name))))
    keys = ["label", "row_weight", *(f"n{j}" for j in range(len(schema.numeric)))]
    keys += [f"{kind}{j}" for j in range(len(schema.categorical)) for kind in "cw"]
    return _Layout(parts=parts, vectors=number_lists, lists=lists, numbers=numbers, categories=categories, keys=keys)


def _name_of(key: str, schema: Schema) -> str:
    """The raw column of a key of the frame."""
    if key in ("label", "row_weight"):
        return schema.label_column if key == "label" else str(schema.weight)
    kind, j = key[0], int(key[1:])
    if kind == "n":
        return schema.numeric[j]
    return schema.categorical[j] if kind == "c" else str(schema.options(schema.categorical[j]).weights)


def _part(table: pa.Table, schema: Schema, name: str) -> cells.Values:
    options = schema.options(name)
    until = None if options.until is None or is_date(options.until) else table.column(options.until)
    return dates.part_of(table.column(schema.source(name)), options, until)


def _cross(keys: Sequence[str]) -> pl.Expr:
    """One text of several values; a separator that the texts themselves hold is doubled, so no two pairs meet."""
    parts = [pl.col(key).cast(pl.String).str.replace_all("|", "||", literal=True).fill_null("|-") for key in keys]
    return pl.concat_str(parts, separator="|,")


def category_types(
    fields: Mapping[str, pa.DataType],
    schema: Schema,
    *,
    types: Sequence[str | None] | None = None,
    labelled: bool = True,
    is_text: bool = False,
) -> tuple[str | None, ...]:
    """Check that the columns of a table have types that fit the schema, and return those of the categories.

    ``string``, ``integer`` or, in Criteo's layout, ``hex``; ``None`` where the table has only missing values.
    ``types``, of the training, override what the table says. The cells of a CSV (``is_text``) are checked when they are
    read. The UserError names the column, and no file.
    """
    found: list[str | None] = []
    known = types or [schema.options(name).type for name in schema.categorical]
    if schema.layout == "criteo":
        known = [HEX] * len(schema.categorical)
    lists = [schema.options(name) for name in schema.weighted]
    cut = {options.weights: options.separator is not None for options in lists}
    weights = [str(schema.options(name).weights) for name in schema.weighted]
    for name in (*(schema.names if labelled else schema.names[1:]), *weights):
        options = schema.options(name)
        source = schema.label_column if name == schema.label else name if name in weights else schema.source(name)
        if source is None:
            found.append("string")
            continue
        until = None if options.until is None or is_date(options.until) else fields[options.until]
        role, wanted = "weights", None
        if name in schema.categorical:
            role, wanted = "categorical", known[schema.categorical.index(name)]
        elif name not in weights:
            role = "label" if name == schema.label else "numeric"
        try:
            kind = _column_type(role, name, options, fields[source], until, wanted, cut.get(name, False), is_text)
        except UserError as error:
            raise error.within(f"column {source!r}") from error
        if role == "categorical":
            found.append(kind)
    if labelled and schema.weight is not None and not is_text:
        try:
            column_types.check_number(column_types.kind_of(fields[schema.weight]))
        except UserError as error:
            raise error.within(f"column {schema.weight!r}") from error
    return tuple(found)


@lru_cache(4096)  # for few rows this takes longer than reading them
def _column_type(
    role: str,
    name: str,
    options: Column,
    field: pa.DataType,
    until: pa.DataType | None,
    wanted: str | None,
    cut: bool,
    is_text: bool,
) -> str | None:
    """Check a column; return the type of its values if it is categorical."""
    kind = column_types.kind_of(field)
    if options.part is not None:
        for each in (field, until):
            if each is not None:
                dates.check_time(each, options, name, csv=is_text)
        return "integer"
    if role == "categorical":
        typed = replace(options, type="integer" if wanted == HEX else wanted)
        derived = column_types.category_type(kind, typed, name, csv=is_text)
        return HEX if wanted == HEX else derived
    if options.width is not None:
        check_vectors(kind, options, name, csv=is_text)
        return None
    if is_text:
        return None  # what a cell holds is seen when it is read
    if role == "label":
        column_types.check_label(kind)
    elif role == "numeric":
        column_types.check_number(kind)
    else:
        column_types.check_weights(kind, cut=cut)
    return None

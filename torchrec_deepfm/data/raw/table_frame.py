"""Rows of an Arrow table, of a file or in memory, into the frame of a ``Piece``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw import column_types
from torchrec_deepfm.data.raw import columns as cells
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

# The type of categories of Criteo's layout.
HEX: Final = "hex"


def table_frame(
    table: pa.Table, schema: Schema, types: Sequence[str | None], *, labelled: bool = True
) -> tuple[pl.DataFrame, dict[int, str]]:
    """Convert rows to the types of a ``Piece``.

    Args:
        table: n rows with the columns of the schema, of types that ``category_types`` has accepted.
        schema: The columns.
        types: What ``category_types`` returned, or the types that the categories had in training.
        labelled: Whether to convert the label too.

    Returns:
        The good rows, as in ``Piece.frame``; and what is wrong with the others by place from 0.
    """
    columns: dict[str, pl.Series] = {}
    faults: dict[int, str] = {}

    def add(key: str, name: str, values: cells.Values) -> None:
        columns[key] = values.series
        for row, what in values.faults.items():
            faults.setdefault(row, f"column {name!r}: {what}")

    if labelled:
        add("label", schema.label, cells.labels(table.column(schema.label)))
    for j, name in enumerate(schema.numeric):
        add(f"n{j}", name, cells.numbers(table.column(name), schema.options(name).transform))
    for j, (name, wanted) in enumerate(zip(schema.categorical, types, strict=True)):
        options, column = schema.options(name), table.column(name)
        if not options.list:
            add(f"c{j}", name, cells.categories(column, wanted or "string"))
            continue
        weights = None if options.weights is None else table.column(options.weights)
        values, weighed = cells.lists(column, wanted or "string", options.separator, weights)
        add(f"c{j}", name, values)
        if weighed is not None:
            add(f"w{j}", str(options.weights), weighed)
    frame = pl.DataFrame(columns)
    if faults:
        good = np.ones(frame.height, bool)
        good[list(faults)] = False
        frame = frame.filter(pl.Series(good))
    return frame, faults


def category_types(
    fields: Mapping[str, pa.DataType],
    schema: Schema,
    *,
    types: Sequence[str | None] | None = None,
    labelled: bool = True,
    is_text: bool = False,
) -> tuple[str | None, ...]:
    """Check that the columns of a table have types that fit the schema.

    Args:
        fields: Arrow type by column name; every column of the schema is among them.
        schema: The columns.
        types: Types that the categories had in training; ``None`` derives them from the table.
        labelled: Whether the label is read.
        is_text: Whether the table is a CSV, whose cells are checked when they are read.

    Returns:
        ``string``, ``integer`` or, in Criteo's layout, ``hex`` per categorical column; ``None`` where the table has
        only missing values.

    Raises:
        UserError: A column has a type that does not fit; the message names it, and no file.
    """
    found: list[str | None] = []
    known = types or [schema.options(name).type for name in schema.categorical]
    if schema.layout == "criteo":
        known = [HEX] * len(schema.categorical)
    lists = [schema.options(name) for name in schema.weighted]
    cut = {options.weights: options.separator is not None for options in lists}
    for name in schema.columns_read if labelled else schema.columns_read[1:]:
        kind = column_types.kind_of(fields[name])
        try:
            if name in schema.categorical:
                wanted = known[schema.categorical.index(name)]
                options = replace(schema.options(name), type="integer" if wanted == HEX else wanted)
                derived = column_types.category_type(kind, options, name, csv=is_text)
                found.append(HEX if wanted == HEX else derived)
            elif is_text:
                continue  # what a cell holds is seen when it is read
            elif name == schema.label:
                column_types.check_label(kind)
            elif name in schema.numeric:
                column_types.check_number(kind)
            else:
                column_types.check_weights(kind, cut=cut[name])
        except UserError as error:
            raise UserError(f"column {name!r}: {error}") from error
    return tuple(found)

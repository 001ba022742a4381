"""Rows in memory, however a person holds them, as an Arrow table.

Shape letters: n rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_deepfm.errors import UserError, did_you_mean, shown

_TAKEN: Final = "a pandas or polars DataFrame, an Arrow table, a Hugging Face Dataset, or a list of dicts"
_FEW: Final = 8


def as_arrow(frame: Any, names: Sequence[str]) -> pa.Table:
    """Take columns out of n rows in memory, in any of the forms that ``prepare`` takes; NaN becomes null.

    UserError: it is another kind of object, a column or a key is absent, or a column mixes types.

    Example:
        >>> as_arrow([{"user": "anna", "age": 3}, {"user": None, "age": 4}], ["user"]).to_pylist()
        [{'user': 'anna'}, {'user': None}]
    """
    if isinstance(frame, pl.LazyFrame):
        frame = frame.collect()
    if type(frame).__module__.partition(".")[0] == "datasets" and hasattr(frame, "with_format"):
        frame = frame.with_format("arrow")[:]  # in the order of its rows, whatever was shuffled or selected
    if isinstance(frame, pl.DataFrame):
        _check_names(frame.columns, names)
        table = frame.select(names).to_arrow()
    elif isinstance(frame, pa.RecordBatch | pa.Table):
        _check_names(frame.schema.names, names)
        table = pa.table({name: frame.column(name) for name in names})
    elif type(frame).__module__.partition(".")[0] == "pandas" and hasattr(frame, "columns"):
        columns = [str(name) for name in frame.columns]
        _check_names(columns, names)
        table = pa.table({name: _from_pandas(name, frame.iloc[:, columns.index(name)]) for name in names})
    elif isinstance(frame, Sequence) and not isinstance(frame, str | bytes):
        for row, values in enumerate(frame, 1):
            if not isinstance(values, Mapping):
                raise UserError(f"{shown(values)} is not a dict", where=f"row {row}", remedy=f"give {_TAKEN}")
            for name in names:
                if name not in values:
                    hint = did_you_mean(name, [str(key) for key in values])
                    raise UserError(
                        f"column {name!r} is absent{hint}",
                        where=f"row {row}",
                        remedy="give it, or None where it is missing",
                    )
        table = pa.table({name: _array(name, [values[name] for values in frame]) for name in names})
    else:
        raise UserError(f"rows of type {type(frame).__name__} can't be read", remedy=f"give {_TAKEN}")
    return pa.table({name: _typeless_if_missing(table.column(name)) for name in names})


def frame_columns(frame: Any) -> list[str]:
    """The columns of a frame; of a list of dicts those of any row."""
    if isinstance(frame, pl.LazyFrame):
        return frame.collect_schema().names()
    if isinstance(frame, pa.RecordBatch | pa.Table):
        return list(frame.schema.names)
    if hasattr(frame, "column_names"):  # of Hugging Face
        return list(frame.column_names)
    if hasattr(frame, "columns"):
        return [str(name) for name in frame.columns]
    if isinstance(frame, list) and all(isinstance(row, Mapping) for row in frame):
        return list(dict.fromkeys(str(name) for row in frame for name in row))
    return []  # as_arrow says what it takes


def _check_names(there: Sequence[str], names: Sequence[str]) -> None:
    for name in names:
        if name not in there:
            listed = ", ".join(there[:_FEW]) + (", ..." if len(there) > _FEW else "")
            raise UserError(
                f"column {name!r} is absent{did_you_mean(name, there)}", remedy=f"the rows have {listed or 'no column'}"
            )
        if there.count(name) > 1:
            raise UserError(f"column {name!r} appears twice", remedy="give every column a name of its own")


def _from_pandas(name: str, values: Any) -> pa.Array:
    """An Arrow array of a pandas Series."""
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):  # mixed types, sparse columns
        return _array(name, values.astype(object).where(values.notna().to_numpy(), None).tolist())


def _array(name: str, values: Sequence[Any]) -> pa.Array:
    """An Arrow array of Python's values; integers among texts become texts."""
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        given = [None if value is None or value is np.nan else value for value in values]
    if all(value is None or (isinstance(value, int | str) and not isinstance(value, bool)) for value in given):
        return pa.array([None if value is None else str(value) for value in given], pa.string())
    first = next(value for value in given if value is not None)
    for row, value in enumerate(given, 1):
        try:
            pa.array([value], from_pandas=True)
        except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
            raise UserError(
                f"{shown(value)} of type {type(value).__name__} can't be read",
                where=f"row {row}, column {name!r}",
                remedy="give a number, text or a list of them",
            ) from error
        try:
            pa.array([first, value], from_pandas=True)
        except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
            raise UserError(
                f"{shown(value)} does not go with {shown(first)} before it",
                where=f"row {row}, column {name!r}",
                remedy="give one type",
            ) from error
    raise UserError("its values have no common type", where=f"column {name!r}", remedy="give one type")


def _typeless_if_missing(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of nothing but missing values has any type, often that of NaN; here it has none."""
    given = len(column) - column.null_count
    if given and pa.types.is_floating(column.type):
        first = column[0].as_py()
        if first is not None and first == first:
            return column
        given -= pc.sum(pc.is_nan(column.cast(pa.float64()))).as_py()
    return column if given or not len(column) else pa.chunked_array([pa.nulls(len(column))])

"""Columns of lists of numbers, all equally long, such as embeddings of texts.

Shape letters: n rows, m list elements in all of them.
"""

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw.cells import columns as cells
from torchrec_deepfm.data.raw.cells.column_types import Kind
from torchrec_deepfm.data.schema import Column, toml_key
from torchrec_deepfm.errors import UserError


def check_vectors(kind: Kind, options: Column, name: str, *, csv: bool) -> None:
    """Raise unless lists of numbers can be read from a column of a file."""
    at = f"[columns.{toml_key(name)}]"
    if kind.scalar == "nothing" or (kind.is_list and kind.scalar in ("integer", "float")):
        return
    if not kind.is_list and kind.scalar == "text" and options.separator is not None:
        return
    if not kind.is_list and kind.scalar == "text":
        where = "a CSV's cells" if csv else "it holds text, which"
        raise UserError(f"{where} must be cut into numbers", remedy=f'set separator, such as "|", under {at}')
    raise UserError(f"it holds {kind}, not lists of numbers", remedy=f"remove width under {at}")


def vectors(column: pa.ChunkedArray, width: int, separator: str | None = None) -> cells.Values:
    """Read lists of numbers.

    ``column``: n lists of numbers, or texts. Returns n values Array(Float32, width); a list that is missing, of another
    length or with an element that is missing or not finite is a fault, and its values mean nothing.
    """
    lists = cells.cut_lists(column, separator)
    numbers = cells.flat_numbers(lists.elements)
    with np.errstate(over="ignore"):
        values = numbers.series.to_numpy().astype(np.float32)  # NaN for null
    good = (lists.lengths == width) & ~lists.missing
    faults: dict[int, str] = {}
    for row in np.flatnonzero(~good).tolist():
        what = "the list is missing" if lists.missing[row] else f"the list has {lists.lengths[row]} numbers"
        faults[row] = f"{what} (expected {width}, the column's width)"
    firsts = np.cumsum(lists.lengths) - lists.lengths
    rows = lists.rows
    for place in np.flatnonzero(~np.isfinite(values)).tolist():
        row, raw = int(rows[place]), lists.elements.raw(place)
        absent = raw is None or raw != raw
        fault = "is missing" if absent else f"{cells.shown_value(raw)} is beyond the range of float32"
        fault = numbers.faults.get(place, fault)
        faults.setdefault(row, f"number {place - int(firsts[row]) + 1} of the list: {fault}")
    found = np.zeros((len(good), width), np.float32)
    found[good] = values[np.repeat(good, lists.lengths)].reshape(-1, width)
    return cells.Values(series=pl.Series(found, dtype=pl.Array(pl.Float32, width)), faults=faults)

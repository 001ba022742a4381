"""From a piece of raw rows to the categorical columns of the prepared schema, for ``prepare`` and for new rows.

Shape letters: n rows, F categorical columns of the prepared schema, m values of n lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.values.numeric import NumericColumn, buckets


def categorical_columns(frame: pl.DataFrame, numbers: Sequence[NumericColumn]) -> pl.DataFrame:
    """Put the categories that numbers became before the categorical columns, in the order of the prepared schema.

    The result has ``c0`` ..., with the weights ``w{j}`` of lists.
    """
    extra = buckets(frame, numbers)
    kept = [series for series in frame.get_columns() if series.name[0] in "cw"]
    if extra:
        kept = [series.alias(f"{series.name[0]}{len(extra) + int(series.name[1:])}") for series in kept]
    return pl.DataFrame([*(series.alias(f"c{j}") for j, series in enumerate(extra)), *kept])


@dataclass(frozen=True, kw_only=True)
class ListValues:
    """The values of a list column, one list after another.

    Args:
        values: m values.
        lengths: int64 [n]; an absent list has none.
        weights: float32 [m]; ``None`` where the column has none.
    """

    values: pl.Series
    lengths: NDArray[np.int64]
    weights: NDArray[np.float32] | None


def list_values(frame: pl.DataFrame, j: int) -> ListValues:
    """Take list column ``j`` of ``categorical_columns``'s result apart."""
    lists = frame[f"c{j}"]
    weights = frame[f"w{j}"] if f"w{j}" in frame.columns else None
    return ListValues(
        values=flat(lists),
        lengths=lists.list.len().fill_null(0).to_numpy().astype(np.int64),
        weights=None if weights is None else flat(weights).to_numpy().astype(np.float32),
    )


def flat(lists: pl.Series) -> pl.Series:
    """Return the values of a list column one after another; an absent or empty list has none.

    Example:
        >>> flat(pl.Series([[1, 2], None, [], [3]])).to_list()
        [1, 2, 3]
    """
    return lists.filter(lists.list.len().fill_null(0) > 0).explode()

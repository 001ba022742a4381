"""What becomes of numbers: a dense float32, or a category.

| transform | value x | missing |
| --- | --- | --- |
| log1p | log(1 + max(x, 0)) | 0 |
| signed_log1p | sign(x) log(1 + abs(x)) | 0 |
| log | log(x - m + 2), m the smallest number of the file (missing: 0), as TorchRec's tsv_to_npys | as x = 0 |
| none | x | 0 |
| standard | (x - mean) / standard deviation | as x = mean: 0 |
| minmax | (x - minimum) / (maximum - minimum) | as x = mean |
| clip | as minmax, between the 1st and the 99th percentile, at which x is cut | as x = mean |
| quantile | share of the training values below x, those equal to x counted by half; 0 and 1 at the ends | 0.5 |
| bucketize | no dense value; an extra category: floor(log(x)^2) above 2, floor(x) up to 2 | a category of its own |
| bucketize, with buckets = q | the same: how many of the q - 1 inner quantiles are at most x | a category of its own |
| fuxictr | as bucketize, but x up to 2 is cut towards 0, and 0 counts as missing | as x = 0 |

Mean, percentiles and the like are those of the training rows (``statistics.py``). ``fuxictr`` is what the benchmark
configurations of FuxiCTR do (``datasets/criteo.py`` with ``fill_na: 0``): a missing number is filled with 0, and the
filler is not a word of the vocabulary.

Shape letters: n rows, I columns of the dense array.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.schema import BUCKETS, TRANSFORMS, Schema, toml_key
from torchrec_deepfm.data.values.statistics import ColumnStatistics
from torchrec_deepfm.errors import UserError, one_of

# Transforms whose dense value depends on the training rows.
LEARNED: Final = ("standard", "minmax", "clip", "quantile")
# Equal shares of the rows that the quantiles of a transform divide.
_SHARES: Final = {"clip": 100, "quantile": 1000}
_BEYOND: Final = "is beyond the range of float32 (with the transform log1p it would fit)"
# What a transform does not take.
UNFIT: Final = {
    "none": _BEYOND,
    "log": "is not an integer of 32 bits, which the transform log takes, as TorchRec's script does (log1p takes it)",
    **dict.fromkeys(LEARNED, _BEYOND),
}
_INT32: Final = np.iinfo(np.int32)
# Up to this many cells are transformed without polars' engine, whose threads a busy machine runs late.
_FEW_CELLS: Final = 4096
_LOGARITHMS: Final[Mapping[str, Callable[[float], float]]] = {
    "log1p": lambda value: math.log1p(max(value, 0.0)),
    "signed_log1p": lambda value: math.copysign(math.log1p(abs(value)), value),
}
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """What becomes of a numeric column.

    Args:
        name: Of the column.
        transform: One of ``TRANSFORMS``.
        buckets: Number of learned buckets; ``None`` for the fixed ones of ``bucketize``.
        indicator: Whether another column of the dense array holds 1 where the number is missing.
        width: Numbers per row; ``None`` for one, which may be missing.
        learned: The training values, of lists those at each place; empty until they are known, and where they are not
            needed.
    """

    name: str
    transform: str
    buckets: int | None = None
    indicator: bool = False
    width: int | None = None
    learned: tuple[ColumnStatistics, ...] = ()

    @property
    def is_category(self) -> bool:
        """Whether the number becomes a category."""
        return self.transform in BUCKETS

    @property
    def is_learned(self) -> bool:
        """Whether the transform depends on the training rows."""
        return self.transform in LEARNED or self.buckets is not None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of what is learned: the column's own, or those of the places of its lists."""
        return (self.name,) if self.width is None else tuple(f"{self.name}[{i}]" for i in range(self.width))

    @property
    def shares(self) -> int:
        """Equal shares of the training rows that its quantiles divide; 0 for none."""
        return self.buckets or _SHARES.get(self.transform, 0)

    @property
    def indicator_name(self) -> str:
        """Name of the column that holds 1 where the number is missing."""
        return f"{self.name}_missing"


def numeric_columns(schema: Schema, option: str | None) -> tuple[NumericColumn, ...]:
    """Settle the transform of every numeric column; nothing is learned yet.

    A column's own option overrides the schema's, and the schema's overrides the command's ``option``, by default log1p
    in Criteo's layout and none in a table. UserError: the transform does not exist, ``log`` is mixed with another one,
    or an option does not fit it.
    """
    if option is not None and option not in TRANSFORMS:
        raise UserError("not a transform", where=f"--numeric {option}", remedy=f"choose {one_of(TRANSFORMS, option)}")
    fallback = option or ("log1p" if schema.layout == "criteo" else "none")
    found = []
    for name in schema.numeric:
        options = schema.options(name)
        transform = options.transform or schema.numeric_transform or fallback
        if options.width is not None:
            transform = options.transform or "none"
        column = NumericColumn(
            name=name,
            transform=transform,
            buckets=options.buckets,
            indicator=options.missing_indicator,
            width=options.width,
        )
        at = f"schema: columns.{toml_key(name)}"
        if column.buckets is not None and transform != "bucketize":
            raise UserError(
                f"the transform is {transform}",
                where=f"{at}.buckets",
                remedy='set transform = "bucketize", or remove it',
            )
        if column.indicator and (column.is_category or transform == "log"):
            raise UserError(
                f"not valid with the transform {transform}",
                where=f"{at}.missing_indicator",
                remedy="remove it, or choose another",
            )
        if column.indicator and column.indicator_name in schema.names:
            raise UserError(
                f"its column would be {column.indicator_name!r}, which is a column already",
                where=f"{at}.missing_indicator",
                remedy="remove one of them",
            )
        found.append(column)
    chosen = {column.transform for column in found}
    if "log" in chosen and chosen - {"log", *BUCKETS}:
        raise UserError(
            "log shifts all of them by one minimum, so it can't stand beside log1p or none",
            where="numeric columns",
            remedy="use log for all, or for none",
        )
    return tuple(found)


def with_statistics(
    columns: Sequence[NumericColumn], statistics: Mapping[str, ColumnStatistics]
) -> tuple[NumericColumn, ...]:
    """Return the columns with what was learned of them."""
    return tuple(
        replace(column, learned=tuple(statistics[key] for key in column.keys)) if column.is_learned else column
        for column in columns
    )


def prepared_schema(schema: Schema, columns: Sequence[NumericColumn]) -> Schema:
    """Return the schema of the prepared data.

    Numbers that become categories are the first categorical columns, indicators of missing numbers the last numeric
    ones.
    """
    bucketized = tuple(column.name for column in columns if column.is_category)
    dense = tuple(column.name for column in columns if not column.is_category)
    dense += tuple(column.indicator_name for column in columns if column.indicator)
    options = {name: one for name, one in schema.columns.items() if name not in bucketized}
    return replace(schema, numeric=dense, categorical=bucketized + schema.categorical, columns=options)


def settled(schema: Schema, transforms: Mapping[str, str]) -> Schema:
    """Name the transform of every numeric column in the schema, for the sources: some numbers fit none of it."""
    named = {name: replace(schema.options(name), transform=transform) for name, transform in transforms.items()}
    return replace(schema, columns={**schema.columns, **named})


def unfit(numbers: pl.Series, transform: str | None) -> NDArray[np.bool_]:
    """Find the numbers that a transform (``None``: not known yet) does not take, bool [n]; ``UNFIT`` says why.

    Example:
        >>> unfit(pl.Series([1.0, 1e39, None]), "none").tolist(), unfit(pl.Series([1.0, 0.5, 3e9]), "log").tolist()
        ([False, True, False], [False, True, True])
    """
    if transform not in UNFIT or (transform != "log" and numbers.dtype.is_integer()):
        return np.zeros(len(numbers), np.bool_)
    values = np.nan_to_num(numbers.cast(pl.Float64).to_numpy())  # null is NaN there
    if transform == "log":
        # Two at each end are left for the shift by 2.
        found = (values != np.floor(values)) | (values < _INT32.min + 2) | (values > _INT32.max - 2)
    else:
        with np.errstate(over="ignore"):
            found = np.isinf(values.astype(np.float32))
    return np.asarray(found, np.bool_)


def learned_numbers(frame: pl.DataFrame, columns: Sequence[NumericColumn]) -> NDArray[np.float64]:
    """Take the numbers that something is learned from, [n, L]; a list has a column per place, NaN is missing."""
    found = [_values(frame, j).reshape(len(frame), -1) for j, column in enumerate(columns) if column.is_learned]
    return np.concatenate(found, axis=1) if found else np.empty((len(frame), 0))


def _values(frame: pl.DataFrame, j: int) -> NDArray[np.float64]:
    """float64 [n], or [n, width] of lists."""
    series = frame[f"n{j}"]
    if isinstance(series.dtype, pl.Array):
        return series.to_numpy().astype(np.float64)
    return (series if series.dtype == pl.Float64 else series.cast(pl.Float64)).to_numpy()


def buckets(frame: pl.DataFrame, columns: Sequence[NumericColumn]) -> list[pl.Series]:
    """Turn the bucketized columns of a piece into categories, Int64, null for missing."""
    found = []
    for j, column in enumerate(columns):
        if not column.is_category:
            continue
        number = frame[f"n{j}"].cast(pl.Float64)
        values, missing = number.fill_null(0.0).to_numpy(), number.is_null()
        if column.buckets is not None:
            [learned] = column.learned
            edges = np.unique(learned.quantiles[1:-1])
            found.append(pl.Series(np.searchsorted(edges, values, side="right")).cast(pl.Int64).set(missing, None))
            continue
        bucket = np.trunc(values) if column.transform == "fuxictr" else np.floor(values)
        large = values > 2
        bucket[large] = np.floor(np.log(values[large]) ** 2)
        if column.transform == "fuxictr":
            missing = pl.Series(bucket == 0)
        # A negative code beyond 63 bits would not fit; such codes cannot be distinguished anyway.
        found.append(pl.Series(np.maximum(bucket, -(2.0**62)).astype(np.int64)).set(missing, None))
    return found


def dense(frame: pl.DataFrame, columns: Sequence[NumericColumn]) -> NDArray[np.float32] | NDArray[np.int32]:
    """Turn the other numeric columns of a piece into float32 [n, I], indicators of missing numbers last.

    Under ``log``, whose minimum is known at the end of the file only, the integers as int32 [n, I].
    """
    kept = [(j, column) for j, column in enumerate(columns) if not column.is_category]
    if not kept:
        return np.empty((len(frame), 0), np.float32)
    if kept[0][1].transform == "log":
        return np.ascontiguousarray(
            frame.select(pl.col(f"n{j}").fill_null(0).cast(pl.Int32) for j, _ in kept).to_numpy()
        )
    if len(frame) * len(kept) <= _FEW_CELLS and all(column.width is None for _, column in kept):
        return _few_scalars(frame, kept)
    found: list[pl.Expr | pl.Series] = []
    for j, column in kept:
        if column.width is not None:
            continue
        if column.transform in LEARNED:
            scaled = np.clip(_scaled(_values(frame, j), column), -_LARGEST, _LARGEST)
            found.append(pl.Series(f"n{j}", scaled.astype(np.float32)))
        else:
            found.append(_transformed(j, column.transform))
    found += [pl.col(f"n{j}").is_null().cast(pl.Float32).alias(f"missing{j}") for j, column in kept if column.indicator]
    scalars = np.ascontiguousarray(frame.select(found).to_numpy()) if found else np.empty((len(frame), 0), np.float32)
    if all(column.width is None for _, column in kept):
        return scalars
    blocks, place = [], 0
    for j, column in kept:
        blocks.append(scalars[:, place : place + 1] if column.width is None else _list_values(frame, j, column))
        place += column.width is None
    return np.concatenate([*blocks, scalars[:, place:]], axis=1)


def _few_scalars(frame: pl.DataFrame, kept: Sequence[tuple[int, NumericColumn]]) -> NDArray[np.float32]:
    """The dense array of a few rows, bit for bit that of many."""
    values = np.stack([_values(frame, j) for j, _ in kept], axis=1)
    missing = np.isnan(values)
    found = np.where(missing, 0.0, values)
    # math's logarithms are those of the C library, as polars' are; numpy has its own on some processors.
    for transform, logarithm in _LOGARITHMS.items():
        places = [i for i, (_, column) in enumerate(kept) if column.transform == transform]
        some = found[:, places]
        found[:, places] = np.array([logarithm(value) for value in some.ravel().tolist()]).reshape(some.shape)
    for i, (_, column) in enumerate(kept):
        if column.transform in LEARNED:
            found[:, i] = np.clip(_scaled(values[:, i], column), -_LARGEST, _LARGEST)
    indicators = [i for i, (_, column) in enumerate(kept) if column.indicator]
    return np.concatenate([found, missing[:, indicators]], axis=1).astype(np.float32)


def _list_values(frame: pl.DataFrame, j: int, column: NumericColumn) -> NDArray[np.float32]:
    """float32 [n, width]."""
    if column.transform == "none":
        plain: NDArray[np.float32] = frame[f"n{j}"].to_numpy()
        return plain
    mean = np.array([learned.mean for learned in column.learned])
    std = np.array([learned.std or 1.0 for learned in column.learned])
    scaled: NDArray[np.float32] = np.clip((_values(frame, j) - mean) / std, -_LARGEST, _LARGEST).astype(np.float32)
    return scaled


@cache
def _transformed(j: int, transform: str) -> pl.Expr:
    number = pl.col(f"n{j}").fill_null(0).cast(pl.Float64)
    if transform == "log1p":
        number = number.clip(lower_bound=0.0).log1p()
    elif transform == "signed_log1p":
        number = number.sign() * number.abs().log1p()
    return number.cast(pl.Float32)


def _scaled(values: NDArray[np.float64], column: NumericColumn) -> NDArray[np.float64]:
    """float64 [n], transformed with the learned statistics; NaN is missing."""
    [learned] = column.learned
    missing = np.isnan(values)
    if column.transform == "quantile":
        points = np.array(learned.quantiles)
        shares = np.linspace(0, 1, len(points))
        # Equal points: the first share for one direction, the last for the other; their mean counts ties by half.
        found = 0.5 * (np.interp(values, points, shares) - np.interp(-values, -points[::-1], -shares[::-1]))
        found = np.where(values <= points[0], 0.0, np.where(values >= points[-1], 1.0, found))
        return np.where(missing, 0.5, found)
    values = np.where(missing, learned.mean, values)
    if column.transform == "standard":
        return (values - learned.mean) / (learned.std or 1.0)
    low, high = learned.minimum, learned.maximum
    if column.transform == "clip":
        low, high = learned.quantiles[1], learned.quantiles[-2]
        values = np.clip(values, low, high)
    return (values - low) / ((high - low) or 1.0)


def shifted_log(numbers: NDArray[np.int32], minimum: int) -> NDArray[np.float32]:
    """Take the logarithm as TorchRec's ``BinaryCriteoUtils.tsv_to_npys`` does, bit for bit.

    ``numbers`` are int32 [n, I], ``minimum`` is the smallest one of the whole file.
    """
    logs: NDArray[np.float32] = np.log((numbers.astype(np.int64) - (minimum - 2)).astype(np.float32))
    return logs

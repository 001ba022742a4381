"""What becomes of numbers: a dense float32, or a category.

| transform | value x | missing |
| --- | --- | --- |
| log1p | log(1 + max(x, 0)) | 0 |
| signed_log1p | sign(x) log(1 + abs(x)) | 0 |
| log | log(x - m + 2), m the smallest number of the file (missing: 0), as TorchRec's tsv_to_npys | as x = 0 |
| none | x | 0 |
| bucketize | no dense value; an extra category: floor(log(x)^2) above 2, floor(x) up to 2 | a category of its own |
| fuxictr | as bucketize, but x up to 2 is cut towards 0, and 0 counts as missing | as x = 0 |

``fuxictr`` is what the benchmark configurations of FuxiCTR do (``datasets/criteo.py`` with ``fill_na: 0``): a missing
number is filled with 0, and the filler is not a word of the vocabulary.

Shape letters: n rows, I numeric columns that stay dense.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.schema import TRANSFORMS, Schema
from torchrec_deepfm.errors import UserError

# Transforms that make a category of a number.
BUCKETS: Final = ("bucketize", "fuxictr")
# What a transform does not take.
UNFIT: Final = {
    "none": "is beyond the range of float32 (with the transform log1p it would fit)",
    "log": "is not an integer of 32 bits, which the transform log takes, as TorchRec's script does (log1p takes it)",
}
_INT32: Final = np.iinfo(np.int32)


def transforms(schema: Schema, option: str | None) -> tuple[str, ...]:
    """Settle the transform of every numeric column.

    A column's own option goes before the schema's, the schema's before the command's.

    Args:
        schema: The columns.
        option: What the command says; ``None`` for log1p in Criteo's layout and none in a table.

    Returns:
        One name per numeric column.

    Raises:
        UserError: There is no such transform, or ``log`` is mixed with another one.
    """
    if option is not None and option not in TRANSFORMS:
        raise UserError(f"--numeric {option} is not a valid transform; choose one of {', '.join(TRANSFORMS)}")
    fallback = option or ("log1p" if schema.layout == "criteo" else "none")
    chosen = [schema.options(name).transform or schema.numeric_transform or fallback for name in schema.numeric]
    if "log" in chosen and set(chosen) - {"log", *BUCKETS}:
        raise UserError(
            "numeric columns: log shifts all of them by one minimum, so it can't stand beside log1p or none; use log "
            "for all, or for none"
        )
    return tuple(chosen)


def prepared_schema(schema: Schema, chosen: Sequence[str]) -> Schema:
    """Return the schema of the prepared data: bucketized numbers have become the first categorical columns.

    Args:
        schema: The schema of the raw data.
        chosen: What ``transforms`` returned.

    Returns:
        The schema with the remaining numeric columns.
    """
    bucketized = tuple(name for name, transform in zip(schema.numeric, chosen, strict=True) if transform in BUCKETS)
    dense = tuple(name for name in schema.numeric if name not in bucketized)
    columns = {name: options for name, options in schema.columns.items() if name not in bucketized}
    return replace(schema, numeric=dense, categorical=bucketized + schema.categorical, columns=columns)


def settled(schema: Schema, chosen: Sequence[str]) -> Schema:
    """Return the schema with every numeric column's transform named, for the sources: some numbers fit none of it.

    Args:
        schema: The schema of the raw data.
        chosen: What ``transforms`` returned.

    Returns:
        The same columns.
    """
    named = {
        name: replace(schema.options(name), transform=transform)
        for name, transform in zip(schema.numeric, chosen, strict=True)
    }
    return replace(schema, columns={**schema.columns, **named})


def unfit(numbers: pl.Series, transform: str | None) -> NDArray[np.bool_]:
    """Find the numbers that a transform does not take; ``UNFIT`` says why.

    Args:
        numbers: n numbers, finite or null.
        transform: One of ``TRANSFORMS``, or ``None`` where it is not known yet.

    Returns:
        bool [n].

    Example:
        >>> unfit(pl.Series([1.0, 1e39, None]), "none").tolist(), unfit(pl.Series([1.0, 0.5, 3e9]), "log").tolist()
        ([False, True, False], [False, True, True])
    """
    if transform not in UNFIT or (transform == "none" and numbers.dtype.is_integer()):
        return np.zeros(len(numbers), np.bool_)
    values = numbers.cast(pl.Float64).fill_null(0.0).to_numpy()
    if transform == "log":
        # Two at each end are left for the shift by 2.
        found = (values != np.floor(values)) | (values < _INT32.min + 2) | (values > _INT32.max - 2)
    else:
        with np.errstate(over="ignore"):
            found = np.isinf(values.astype(np.float32))
    return np.asarray(found, np.bool_)


def buckets(frame: pl.DataFrame, chosen: Sequence[str]) -> list[pl.Series]:
    """Turn the bucketized columns of a piece into categories.

    Args:
        frame: n rows with ``n0`` ...
        chosen: What ``transforms`` returned.

    Returns:
        Int64 series, null for missing.
    """
    found = []
    for j, transform in enumerate(chosen):
        if transform not in BUCKETS:
            continue
        number = frame[f"n{j}"].cast(pl.Float64)
        values, missing = number.fill_null(0.0).to_numpy(), number.is_null()
        bucket = np.trunc(values) if transform == "fuxictr" else np.floor(values)
        large = values > 2
        bucket[large] = np.floor(np.log(values[large]) ** 2)
        if transform == "fuxictr":
            missing = pl.Series(bucket == 0)
        # A negative code beyond 63 bits would not fit; such codes cannot be distinguished anyway.
        found.append(pl.Series(np.maximum(bucket, -(2.0**62)).astype(np.int64)).set(missing, None))
    return found


def dense(frame: pl.DataFrame, chosen: Sequence[str]) -> NDArray[np.float32] | NDArray[np.int32]:
    """Turn the other numeric columns of a piece into the dense array.

    Args:
        frame: n rows with ``n0`` ..., none of them ``unfit``.
        chosen: What ``transforms`` returned.

    Returns:
        float32 [n, I]; under ``log``, whose minimum is known at the end of the file only, the integers as int32 [n, I].
    """
    kept = [(j, transform) for j, transform in enumerate(chosen) if transform not in BUCKETS]
    if not kept:
        return np.empty((len(frame), 0), np.float32)
    if kept[0][1] == "log":
        return np.ascontiguousarray(
            frame.select(pl.col(f"n{j}").fill_null(0).cast(pl.Int32) for j, _ in kept).to_numpy()
        )
    numbers = {j: pl.col(f"n{j}").fill_null(0).cast(pl.Float64) for j, _ in kept}
    columns = [_transformed(numbers[j], transform).cast(pl.Float32) for j, transform in kept]
    return np.ascontiguousarray(frame.select(columns).to_numpy())


def _transformed(number: pl.Expr, transform: str) -> pl.Expr:
    if transform == "log1p":
        return number.clip(lower_bound=0.0).log1p()
    return number.sign() * number.abs().log1p() if transform == "signed_log1p" else number


def shifted_log(numbers: NDArray[np.int32], minimum: int) -> NDArray[np.float32]:
    """Take the logarithm as TorchRec's ``BinaryCriteoUtils.tsv_to_npys`` does, bit for bit.

    Args:
        numbers: int32 [n, I].
        minimum: The smallest number of the whole file.

    Returns:
        float32 [n, I].
    """
    logs: NDArray[np.float32] = np.log((numbers.astype(np.int64) - (minimum - 2)).astype(np.float32))
    return logs

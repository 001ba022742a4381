"""The columns of the synthetic click logs: distributions, shares of missing values, and random rows.

Shape legend: B rows, I = 13 numeric columns, F = 26 categorical columns.

A category is an id here: 0 for missing, then 1, 2, ... by falling frequency; ``category_values`` gives the raw values.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# How a missing number is marked in arrays of raw values. This value never occurs.
MISSING_NUMBER: Final = -(2**31)

# One row per numeric column I1 ... I13: share of missing values, log-median and log-spread of the counts, and how far
# they reach below zero (I2 alone has negative values, as in Criteo's logs).
_NUMERIC: Final = (
    (0.45, 0.3, 1.1, 0),
    (0.00, 1.6, 2.0, 3),
    (0.21, 1.9, 1.3, 0),
    (0.22, 1.6, 0.9, 0),
    (0.03, 7.8, 2.4, 0),
    (0.23, 3.7, 1.7, 0),
    (0.04, 1.3, 1.3, 0),
    (0.00, 2.0, 1.1, 0),
    (0.04, 3.8, 1.5, 0),
    (0.45, -0.5, 0.8, 0),
    (0.04, 0.5, 1.0, 0),
    (0.77, -0.5, 1.2, 0),
    (0.22, 1.8, 1.0, 0),
)
_LARGEST_NUMBER: Final = 10_000_000

# One row per categorical column C1 ... C26: distinct values, Zipf exponent, share of missing values. The sizes echo
# Criteo's in shape but stay small: every value has to be learnt from about a million rows.
_CATEGORICAL: Final = (
    (240, 1.75, 0.0),
    (120, 1.60, 0.0),
    (1500, 1.75, 0.035),
    (1100, 1.75, 0.035),
    (60, 1.60, 0.0),
    (12, 1.35, 0.13),
    (480, 1.70, 0.0),
    (120, 1.75, 0.0),
    (3, 1.35, 0.0),
    (900, 1.75, 0.0),
    (300, 1.60, 0.0),
    (1500, 1.75, 0.035),
    (240, 1.60, 0.0),
    (24, 1.35, 0.0),
    (480, 1.70, 0.0),
    (1300, 1.75, 0.035),
    (10, 1.35, 0.0),
    (300, 1.70, 0.0),
    (180, 1.75, 0.45),
    (4, 1.10, 0.45),
    (1300, 1.75, 0.035),
    (16, 1.35, 0.78),
    (14, 1.35, 0.0),
    (720, 1.75, 0.035),
    (36, 1.50, 0.45),
    (600, 1.75, 0.45),
)

NUMERIC_COLUMNS: Final = len(_NUMERIC)
CATEGORICAL_COLUMNS: Final = len(_CATEGORICAL)


def category_values(column: int) -> NDArray[np.uint32]:
    """Return the raw 32-bit values of a categorical column, which the text holds as 8 hexadecimal digits.

    Returns [1 + distinct values]: the value of each id, all different. Entry 0 (missing) is unused.
    """
    # MurmurHash3's last step, which maps 32 bits one to one.
    value = np.arange(1 + _CATEGORICAL[column][0], dtype=np.uint32) + np.uint32((column + 1) << 24)
    value ^= value >> np.uint32(16)
    value *= np.uint32(0x85EBCA6B)
    value ^= value >> np.uint32(13)
    value *= np.uint32(0xC2B2AE35)
    value ^= value >> np.uint32(16)
    return value


def draw_rows(generator: np.random.Generator, rows: int) -> tuple[Integers, Integers]:
    """Draw independent features of rows: numbers [B, I], ``MISSING_NUMBER`` where missing, and ids [B, F], 0 there."""
    numbers = np.empty((rows, len(_NUMERIC)), dtype=np.int64)
    for column, (missing, median, spread, below_zero) in enumerate(_NUMERIC):
        counts = np.exp(median + spread * generator.standard_normal(rows))
        numbers[:, column] = np.minimum(counts, _LARGEST_NUMBER).astype(np.int64) - below_zero
        numbers[generator.random(rows) < missing, column] = MISSING_NUMBER
    ids = np.empty((rows, len(_CATEGORICAL)), dtype=np.int64)
    for column in range(len(_CATEGORICAL)):
        cumulated = np.cumsum(shares(column))
        ids[:, column] = np.searchsorted(cumulated[:-1], generator.random(rows), side="right")
    return numbers, ids


def shares(column: int) -> Floats:
    """Return how often each category occurs.

    Returns [1 + distinct values]: probabilities, the missing value's first. The others follow Zipf's law.

    Example:
        >>> shares(8).round(3).tolist()  # C9: three values, never missing
        [0.0, 0.618, 0.242, 0.14]
    """
    distinct, exponent, missing = _CATEGORICAL[column]
    zipf = np.arange(1, distinct + 1) ** -exponent
    return np.concatenate([[missing], (1 - missing) * zipf / zipf.sum()])

"""Mean, deviation and comparison of models over training seeds.

The training differs between seeds, not the rows that it is scored on: the errors do not cover another test split.
"""

import math
import statistics
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n - 1 in the denominator); 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return deviation(values) / math.sqrt(len(values))


def with_deviation(values: Sequence[float], digits: int = 4) -> str:
    """Format mean and deviation, the latter only for several values.

    Example:
        >>> with_deviation([0.5, 0.7], 2), with_deviation([0.5], 2)
        ('0.60 ± 0.14', '0.50')
    """
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {deviation(values):.{digits}f}" if len(values) > 1 else text


def compare(first: Sequence[float], second: Sequence[float]) -> str:
    """Compare the means of two independent samples: better, not worse or worse, with difference and standard error.

    Example:
        >>> compare([0.80, 0.82], [0.79, 0.80])
        'not worse: +0.0150 ± 0.0112'
    """
    error = math.hypot(standard_error(first), standard_error(second))
    return comparison(mean(first) - mean(second), error, known=len(first) + len(second) > 2)


def compare_paired(first: Sequence[float], second: Sequence[float], digits: int = 5) -> str:
    """Compare seed by seed."""
    gaps = [one - other for one, other in zip(first, second, strict=True)]
    return comparison(mean(gaps), standard_error(gaps), known=len(gaps) > 1, digits=digits)


def comparison(difference: float, error: float, *, known: bool, digits: int = 4) -> str:
    """Describe a difference.

    Better: more than two standard errors above zero. Worse: more than one below. Not worse: between.

    Args:
        difference: Of two means.
        error: Its standard error.
        known: False if each sample has one value, so that no error can be computed.
        digits: Decimals.
    """
    if not known:
        return f"{difference:+.{digits}f}, one seed each"
    word = "better" if difference > 2 * error else "not worse" if difference >= -error else "worse"
    return f"{word}: {difference:+.{digits}f} ± {error:.{digits}f}"

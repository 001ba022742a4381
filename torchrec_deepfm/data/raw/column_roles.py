"""Where ``schema infer`` puts a column, from a sample of its values: numeric, categorical, or left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from torchrec_deepfm.data.raw.cells import column_types
from torchrec_deepfm.data.raw.cells import columns as cells
from torchrec_deepfm.data.raw.cells.dates import guessed_format, is_time
from torchrec_deepfm.data.schema import toml_text

# "id" as a word of its own, in snake_case, spaced or camelCase; and names of time.
_ID: Final = re.compile(r"(?:^|[^A-Za-z])(?:id|ids|ID|IDs|Id|Ids)$|[a-z0-9](?:Id|ID|Ids|IDs)$")
_TIME: Final = re.compile(r"(?i)time|date|(?:^|[^a-z])(?:ts|epoch|hour|day)(?:$|[^a-z])")
_FEW: Final = 50  # different integers that are categories whatever their values
_HUGE: Final = 2**31  # integers of this size are hashes
_SEPARATORS: Final = ("|", ";")
# Too few rows to distinguish a key from a category, or to find a column that reveals the label.
_MIN_ROWS, _MIN_PER_CLASS = 100, 10
_LEAK: Final = 0.98  # AUC of one column alone
_UNIQUE: Final = 0.99  # share of different values above which a column is a key of the rows
_REPEATS: Final = 5.0  # rows per value from which frequencies say something
# Rank correlation of the frequencies of neighbouring values: counts have similar ones, ids have not.
_SMOOTH: Final = 0.5
_SKEWED: Final = 3.0
_HEAVY: Final = 30.0  # excess kurtosis of tails on both sides
_ABSENT: Final = 0.01  # share missing from which a number gets an indicator
_LONG_AGO: Final = 10**8  # seconds: three years; times since 1970, or dates such as 20240131
_EXAMPLES: Final = 3
_BUCKETS: Final = 16  # of a number, in a table without categories


@dataclass
class SampledColumn:
    """What is known of one column.

    ``kind``: what the file holds; for a CSV, what its cells look like. ``series``: the sampled values, of a list column
    its elements. ``rows``: of the sample. ``lengths``: elements per row of a list column. ``options`` and ``why`` are
    set by ``sort``.
    """

    name: str
    kind: column_types.Kind
    series: pl.Series
    rows: int
    lengths: tuple[int, ...] = ()
    text: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def comment(self) -> str:
        """What was seen, and the reason for the column's place."""
        given = _given(self.series)
        if not len(given):
            return self.why
        parts = [str(self.kind), f"{given.n_unique():,} distinct"]
        if not self.kind.is_list and (missing := 1 - len(given) / self.rows):
            parts.append(f"{max(missing, 0.0005):.1%} missing")
        numbers = _numbers(self)
        if numbers is not None and self.kind.scalar != "boolean" and not self.kind.is_list:
            values = numbers.to_numpy()
            parts.append(f"{values.min():.15g} to {values.max():.15g}")
        else:
            examples = given.unique(maintain_order=True)[:_EXAMPLES].to_list()
            parts.append(f"such as {', '.join(_short(one) for one in examples)}")
        return f"{', '.join(parts)}: {self.why}"


def sampled(name: str, column: pa.ChunkedArray, *, text: bool) -> SampledColumn:
    """Take the values of a column; ``text``: from a CSV, so that its type follows from its cells."""
    kind = column_types.kind_of(column.type)
    rows = len(column)
    if is_time(column.type):
        times = pl.DataFrame(pl.from_arrow(pa.table({"x": column.cast(column_types.stored(column.type))})))
        return SampledColumn(name, kind, times.to_series(), rows)
    if kind.scalar not in ("boolean", "integer", "float", "text"):
        return SampledColumn(name, kind, pl.Series(dtype=pl.Null), rows)
    if kind.is_list:
        lengths = tuple(pc.fill_null(pc.list_value_length(column), 0).to_pylist())
        elements = cells.scalars(pa.chunked_array([pc.list_flatten(chunk) for chunk in column.chunks]))
        return SampledColumn(name, kind, elements, rows, lengths)
    series = cells.scalars(column)
    if not text:
        return SampledColumn(name, kind, series, rows)
    return SampledColumn(name, column_types.Kind(_looks_like(series)), series, rows, text=True)


def sort(
    columns: Sequence[SampledColumn], labels: NDArray[np.float64], *, keep: bool = False
) -> tuple[list[SampledColumn], list[SampledColumn], list[SampledColumn]]:
    """Divide columns into numeric, categorical and left out ones, and set the reason and the options of each.

    ``labels``: [n] of 0 and 1. ``keep``: leave out only what can't be read. Numbers without any category are also cut
    into buckets.
    """
    places: dict[str, list[SampledColumn]] = {"numeric": [], "categorical": [], "left out": []}
    weights = [column for column in columns if column.kind == column_types.Kind("float", True)]
    for column in columns:
        if column in weights:
            continue
        if parts := _parts_of_time(column, {other.name for other in columns}):
            places["categorical"] += parts
            continue
        place, column.why = _place(column, keep=keep)
        if place != "left out" and not keep and (auc := _label_auc(column, labels)) > _LEAK:
            place, column.why = (
                "left out",
                f"it alone gives the label away (AUC {auc:.3f}); is it known before the label?",
            )
        if place == "left out":
            column.options = {}
        places[place].append(column)
    for weight in weights:
        able = [
            column
            for column in places["categorical"]
            if column.kind.is_list and column.lengths == weight.lengths and "weights" not in column.options
        ]
        if len(able) == 1:
            able[0].options["weights"] = weight.name
            able[0].why += f"; {toml_text(weight.name)} has as many numbers in each row, perhaps its weights"
        else:
            _place_numbers(weight, places)
    scalars = [column for column in places["numeric"] if "width" not in column.options]
    if not places["categorical"]:
        names = {column.name for column in columns}
        places["numeric"] += [
            SampledColumn(
                f"{column.name}_bucket",
                column.kind,
                column.series,
                column.rows,
                options={"of": column.name, "transform": "bucketize", "buckets": _BUCKETS},
                why=f"{_BUCKETS} buckets, since a model needs a category",
            )
            for column in scalars
            if f"{column.name}_bucket" not in names
        ]
    return places["numeric"], places["categorical"], places["left out"]


def _place_numbers(column: SampledColumn, places: Mapping[str, list[SampledColumn]]) -> None:
    """Place lists of decimal numbers that are no list's weights."""
    width = column.lengths[0] if column.lengths else 0
    numbers = _given(column.series)
    if len(set(column.lengths)) == 1 and width > 1 and len(numbers) == len(column.series):
        if column.rows >= _MIN_ROWS and not np.ptp(numbers.to_numpy().reshape(-1, width), axis=0).any():
            column.why = "the same list in every row"
            places["left out"].append(column)
            return
        column.options |= {"width": width, "transform": "standard"}
        column.why = f"{width} numbers in every row, as embeddings have: one field"
        places["numeric"].append(column)
        return
    column.options = {}
    column.why = (
        "lists of decimal numbers, not as many in every row; as the weights of a list column they stand in its options"
    )
    places["left out"].append(column)


def _parts_of_time(column: SampledColumn, names: set[str]) -> list[SampledColumn]:
    """Categories that a column of times becomes: the hour, if it has one, and the weekday; none for other columns."""
    given = _given(column.series)
    if column.kind.is_list or not len(given):
        return []
    options: dict[str, Any] = {"of": column.name}
    parts = ["hour", "weekday"]
    if given.dtype.is_temporal():
        midnight = given.dtype == pl.Date or bool((given.dt.truncate("1d") == given).all())
        parts, seen = parts[midnight:], "dates" if midnight else "times"
        zoned = getattr(given.dtype, "time_zone", None) is not None
    else:
        numbers = _numbers(column)
        if (column.kind.scalar != "text" and numbers is None) or (
            numbers is not None and not numbers.dtype.is_integer()
        ):
            return []
        says_time = _TIME.search(column.name) is not None and _ID.search(column.name) is None
        found = guessed_format(given if numbers is None else numbers, says_time)
        if found is None:
            return []
        if found:
            options["format"] = found
        dates = ("%" in found and "%H" not in found) or (not found and not given.str.contains(r"\d[T ]\d").any())
        parts, seen = parts[dates:], f"times as {found}" if found else "times"
        zoned = bool(found and "%" not in found) or (
            not found and bool(given.str.contains(r"\d(Z|[+-]\d\d:?\d\d)$").any())
        )
    if zoned:
        options["timezone"] = "UTC"
    made = []
    for part in parts:
        if f"{column.name}_{part}" not in names:
            made.append(SampledColumn(f"{column.name}_{part}", column.kind, column.series, column.rows))
            made[-1].options = {**options, "part": part}
            made[-1].why = f"{part} of {seen}"
    return made


def _given(series: pl.Series) -> pl.Series:
    series = series.drop_nulls()
    return series.drop_nans() if series.dtype.is_float() else series


def _numbers(column: SampledColumn) -> pl.Series | None:
    """The given values as numbers, integers as Int64; None for others, integers beyond 64 bits included."""
    if column.kind.is_list or column.kind.scalar not in ("boolean", "integer", "float"):
        return None
    given = _given(column.series)
    if given.dtype == pl.String:
        given = given.str.strip_chars(" ")
    numbers = given.cast(pl.Float64 if column.kind.scalar == "float" else pl.Int64, strict=False).drop_nulls()
    if len(numbers) < len(given) or not len(numbers):
        return None
    return numbers.cast(pl.Int64) if numbers.dtype == pl.Float64 and _is_whole(numbers) else numbers


def _is_whole(numbers: pl.Series) -> bool:
    return bool(((numbers % 1 == 0) & (numbers.abs() < 2**53)).all())


def _looks_like(cells_: pl.Series) -> str:
    """What the cells of a CSV column hold."""
    given = cells_.drop_nulls().str.strip_chars(" ")
    if not len(given):
        return "nothing"
    if given.str.contains("^[-+]?0[0-9]").any():
        return "text"  # zeros before a number, as in 007, mean something
    whole = given.cast(pl.Int64, strict=False)
    if bool((whole.cast(pl.String) == given).fill_null(False).all()) or given.str.contains("^-?[0-9]+$").all():
        return "integer"  # also beyond 64 bits, where a float would merge different ids
    return "text" if given.cast(pl.Float64, strict=False).null_count() else "float"


def _place(column: SampledColumn, *, keep: bool) -> tuple[str, str]:
    """Where a column goes, and why."""
    kind, given = column.kind, _given(column.series)
    if kind.scalar not in column_types.TAKEN:
        return "left out", f"it holds {kind}; convert it to numbers, integers or text"
    if not len(given):
        return "left out", "no value in these rows"
    if kind.is_list:
        column.options["list"] = True
        return "categorical", "lists"
    different = given.n_unique()
    enough = column.rows >= _MIN_ROWS and not keep
    if different == 1 and len(given) == column.rows and enough:
        return "left out", "the same value in every row"
    if kind.scalar == "boolean":
        return "categorical", "booleans"
    key = enough and different >= _UNIQUE * len(given) and len(given) >= _MIN_ROWS
    numbers = _numbers(column)
    if numbers is None:
        if key:
            return "left out", "another value in each row, as a row's key has"
        if kind.scalar == "integer":
            column.options["type"] = "string"
            return "categorical", "some are beyond a 64-bit integer, so taken as text"
        return "categorical", "text" + _list_note(column, given)
    if not numbers.dtype.is_integer():
        return "numeric", _transform(column, numbers)
    place, why = _place_integers(column, numbers, key=key)
    if place == "categorical" and (column.text or kind.scalar == "float"):
        column.options["type"] = "integer"
    return place, why


def _place_integers(column: SampledColumn, numbers: pl.Series, *, key: bool) -> tuple[str, str]:
    values, counts = np.unique(numbers.to_numpy(), return_counts=True)
    low, high, different = int(values[0]), int(values[-1]), len(values)
    fills = 2 * different >= high - low + 1
    is_id = _ID.search(column.name) is not None
    if not is_id and _TIME.search(column.name) and different > _FEW:
        if max(-low, high) >= _LONG_AGO:
            return "left out", "its name speaks of time; make hours, weekdays or ages in days of it"
        return "numeric", f"its name speaks of time; {_transform(column, numbers)}"
    if key and (is_id or fills or max(-low, high) >= _HUGE):
        return "left out", "another value in each row, as a row's key has"
    if is_id:
        return "categorical", "its name ends in id"
    if different <= _FEW:
        return "categorical", "few values"
    if max(-low, high) >= _HUGE:
        return "categorical", "too large for counts"
    smooth = _smoothness(counts)
    tail_has_gaps = 4 * int((values > (low + high) / 2).sum()) < high - low + 1
    if low >= 0 and tail_has_gaps and smooth > _SMOOTH and _skewness(numbers) > _SKEWED:
        return "numeric", f"frequent when small, rare when large, as counts are; {_transform(column, numbers)}"
    if fills:
        return "categorical", "they fill their range, as numbered ids do"
    if len(numbers) >= _REPEATS * different and smooth <= _SMOOTH:
        return "categorical", "they repeat, and neighbouring values differ in frequency, as ids do"
    return "numeric", f"a range with gaps, as counts have; {_transform(column, numbers)}"


def _transform(column: SampledColumn, numbers: pl.Series) -> str:
    """Choose the transform of a numeric column; return the reason."""
    heavy = float(numbers.cast(pl.Float64).kurtosis() or 0.0) > _HEAVY
    long_tail = heavy or abs(_skewness(numbers)) > _SKEWED
    if not long_tail:
        column.options["transform"] = "standard"
    else:
        column.options["transform"] = "log1p" if float(numbers.min()) >= 0 else "signed_log1p"  # type: ignore[arg-type]
    if column.rows - len(numbers) >= _ABSENT * column.rows:
        column.options["missing_indicator"] = True
    return "a long tail" if long_tail else "numbers"


def _skewness(numbers: pl.Series) -> float:
    return float(numbers.cast(pl.Float64).skew() or 0.0)


def _smoothness(counts: NDArray[np.int64]) -> float:
    """Rank correlation between the frequency of each value and of the next larger one."""
    frame = pl.DataFrame({"a": counts[:-1], "b": counts[1:]})
    found = frame.select(pl.corr("a", "b", method="spearman")).item()
    return 0.0 if found is None or np.isnan(found) else float(found)


def _label_auc(column: SampledColumn, labels: NDArray[np.float64]) -> float:
    """AUC of the column alone: of its values by size, or of the click rates of its values in the other half."""
    positives = int(labels.sum())
    if (
        column.kind.is_list
        or len(column.series) < _MIN_ROWS
        or min(positives, len(labels) - positives) < _MIN_PER_CLASS
    ):
        return 0.5
    from sklearn.metrics import roc_auc_score

    series = column.series.fill_nan(None) if column.series.dtype.is_float() else column.series
    codes = series.cast(pl.String).fill_null("").rank("dense").to_numpy().astype(np.int64)
    half = np.random.default_rng(0).random(len(codes)) < 0.5
    rates = np.empty(len(codes))
    for part in (half, ~half):
        rows = np.bincount(codes[~part], minlength=codes.max() + 1)
        ones = np.bincount(codes[~part], weights=labels[~part], minlength=codes.max() + 1)
        rates[part] = ((ones + labels.mean()) / (rows + 1))[codes[part]]
    scores: list[NDArray[Any]] = [rates]
    if _numbers(column) is not None:
        values = (series.str.strip_chars(" ") if series.dtype == pl.String else series).cast(pl.Float64)
        scores += [values.fill_null(fill).to_numpy() for fill in (-np.inf, np.inf)]
    ranks = (pl.Series(score).rank().to_numpy() for score in scores)
    return max(max(auc, 1 - auc) for auc in (float(roc_auc_score(labels, rank)) for rank in ranks))


def _list_note(column: SampledColumn, given: pl.Series) -> str:
    for separator in _SEPARATORS:
        if 2 * int(given.str.contains(separator, literal=True).sum()) < len(given):
            continue
        elements = given.str.split(separator).list.explode()
        if _looks_like(elements.filter(elements != "")) == "float":
            return f"; numbers cut by {separator}: the weights of a list? Then name it there as weights, and not here"
        option = f'{toml_text(column.name)} = {{ list = true, separator = "{separator}" }}'
        return f"; lists cut by {separator}? Then write below [columns]: {option}"
    return ""


def _short(value: Any, most: int = 24) -> str:
    text = toml_text(value) if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."

"""The values of a user's table: from any Arrow type to the few types of a ``Piece``.

A cell that does not fit makes a bad row. Columns of a wrong type were refused before (``column_types.py``).

Shape letters: n rows, m list elements in all of them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from torchrec_deepfm.data.raw.cells.column_types import kind_of, stored
from torchrec_deepfm.data.schema import LabelRule
from torchrec_deepfm.data.values.numeric import UNFIT, unfit

# The longest text of the input that a message repeats.
_SHOWN: Final = 40
_LABEL: Final = "(expected 0 or 1)"
# Above this, two whole numbers can have the same float64, so two ids could have become one.
_EXACT: Final = 2.0**53
_HEX: Final = re.compile("^[0-9a-fA-F]{1,8}$")
_TRUTH: Final = {"true": "1", "false": "0"}
# Up to this many rows, columns of one type are read in one call: the calls cost more than the cells.
_FEW: Final = 1024
# Up to this many cells are converted without polars' engine, whose threads a busy machine runs late.
_FEW_CELLS: Final = 4096
_CELL: Final = pl.col("cell")
_Texts = TypeVar("_Texts", pl.Series, pl.Expr)


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of one column."""

    series: pl.Series
    faults: dict[int, str]


def read_columns(
    columns: Mapping[str, pa.ChunkedArray], read: Callable[[pa.ChunkedArray], Values]
) -> dict[str, Values]:
    """Read columns whose cells follow the same rules.

    ``columns``: of n cells each, by any key. ``read``: ``numbers`` or ``categories``, to which rows mean nothing.
    """
    groups: dict[Any, list[str]] = {}
    for key, column in columns.items():
        groups.setdefault(column.type if len(column) <= _FEW else key, []).append(key)
    found = {}
    for keys in groups.values():
        rows = len(columns[keys[0]])
        joined = read(pa.chunked_array([chunk for key in keys for chunk in columns[key].chunks], columns[keys[0]].type))
        faults: list[dict[int, str]] = [{} for _ in keys]
        for cell, what in joined.faults.items():
            faults[cell // rows][cell % rows] = what
        for place, key in enumerate(keys):
            found[key] = Values(series=joined.series.slice(place * rows, rows), faults=faults[place])
    return found


def labels(column: pa.ChunkedArray, rule: LabelRule | None = None) -> Values:
    """Read labels.

    ``column``: n cells: booleans, numbers, or the cells of a CSV. ``rule``: makes labels of any numbers. Returns n
    values UInt8; without a rule all but 0, 1, true and false are faults, and missing ones always.
    """
    flat = _flat(column)
    numbers = flat_numbers(flat, booleans=True)
    if rule is not None:
        for row in np.flatnonzero(numbers.series.is_null().to_numpy()).tolist():
            numbers.faults.setdefault(row, f"the label is missing (expected a number, for {rule})")
        return Values(series=rule.holds(numbers.series).cast(pl.UInt8), faults=numbers.faults)
    good = (numbers.series == 0) | (numbers.series == 1)
    bad = np.flatnonzero(~good.fill_null(False).to_numpy())
    faults = {}
    for row in bad.tolist():
        value = flat.raw(row)
        faults[row] = (
            f"the label is missing {_LABEL}" if value is None else f"{shown_value(value)} is not a valid label {_LABEL}"
        )
    return Values(series=numbers.series.set(~good.fill_null(False), None).cast(pl.UInt8), faults=faults)


def row_weights(column: pa.ChunkedArray) -> Values:
    """Read the weights of rows, n values Float32; missing and negative ones are faults."""
    values = numbers(column, "none")
    for row in np.flatnonzero(~(values.series >= 0).fill_null(False).to_numpy()).tolist():
        value = values.series[row]
        what = "the weight is missing" if value is None else f"{value:g} is negative"
        values.faults.setdefault(row, f"{what} (expected a number, 0 or more)")
    return Values(series=values.series.cast(pl.Float32), faults=values.faults)


def numbers(column: pa.ChunkedArray, transform: str | None = None) -> Values:
    """Read numbers.

    ``column``: n cells: booleans, numbers, or the cells of a CSV. Returns n values Float64, null for missing and for
    NaN; what is infinite, non-numeric text, and what the transform does not take is a fault.
    """
    flat = _flat(column)
    values = flat_numbers(flat)
    for row in np.flatnonzero(unfit(values.series, transform)).tolist():
        values.faults[row] = f"{shown_value(flat.raw(row))} {UNFIT[str(transform)]}"
    return values


def categories(column: pa.ChunkedArray, wanted: str) -> Values:
    """Read a column of one category per row, as ``string``, ``integer`` or ``hex``: String, Int64 or UInt32."""
    return _categories(_flat(column), wanted)


def lists(
    column: pa.ChunkedArray, wanted: str, separator: str | None, weights: pa.ChunkedArray | None
) -> tuple[Values, Values | None]:
    """Read a categorical column with a list per row, and the weights of its values.

    ``wanted``: ``string`` or ``integer``. Returns n lists of String or Int64, without their missing elements; a missing
    list is null. And n lists Float32 of the weights, as long and missing where the lists are, or ``None`` without
    weights.
    """
    bags = cut_lists(column, separator)
    values = _categories(bags.elements, wanted)
    faults = bags.faults_of(values.faults)
    kept = ~values.series.is_null().to_numpy()
    dtype = pl.Int64 if wanted == "integer" else pl.String
    if weights is None:
        return Values(series=bags.rebuilt(values.series, kept, dtype), faults=faults), None
    other = cut_lists(weights, separator)
    lengths = np.where(bags.missing, 0, other.lengths)
    unequal: dict[int, str] = {}
    for row in np.flatnonzero(lengths != bags.lengths).tolist():
        unequal[row] = f"{bags.lengths[row]} values have {lengths[row]} weights"
    weighed = flat_numbers(other.elements)
    # Weights of a missing list, or of a list of another length, belong to no value: they must not shift the others.
    paired = np.repeat(~bags.missing & (lengths == bags.lengths), other.lengths)
    on_ids = np.repeat(lengths == bags.lengths, bags.lengths)
    series = weighed.series.filter(pl.Series(paired))
    aligned = np.zeros(len(kept), np.float64)
    aligned[on_ids] = series.fill_null(np.nan).to_numpy()
    with np.errstate(over="ignore"):
        narrow = aligned.astype(np.float32)
    wrong: dict[int, str] = {}
    sources = np.flatnonzero(paired)[np.cumsum(on_ids) - 1] if len(series) else np.zeros(len(kept), np.int64)
    for element in np.flatnonzero(kept & ~np.isfinite(narrow)).tolist():
        value = other.elements.raw(int(sources[element]))
        what = "is missing" if value is None else f"{shown_value(value)} is not a finite number"
        wrong.setdefault(int(bags.rows[element]), f"a weight {what}")
    result = bags.rebuilt(pl.Series(narrow), kept, pl.Float32)
    return (
        Values(series=bags.rebuilt(values.series, kept, dtype), faults=faults),
        Values(series=result, faults=wrong | unequal),
    )


def from_hex(texts: _Texts) -> _Texts:
    """Read hexadecimal numbers of at most 8 digits as UInt32; null stays null.

    Example:
        >>> from_hex(pl.Series(["ff", None])).to_list()
        [255, None]
    """
    return texts.str.to_integer(base=16, dtype=pl.UInt32)


def texts(column: pa.ChunkedArray) -> pa.Array:
    """Return the cells of a CSV as text, null where empty; bytes that are not UTF-8 become replacement characters."""
    flat = _flat(column)
    if not flat.undecoded:
        return flat.array
    cells = flat.array.to_pylist()
    for place, raw in flat.undecoded.items():
        cells[place] = raw.decode(errors="replace")
    return pa.array(cells, pa.large_string())


def scalars(column: pa.ChunkedArray) -> pl.Series:
    """Return the unconverted values of a column, for statistics.

    Returns n values: Boolean, an integer type, a float type, or String (decimals without a fraction too); bytes that
    are not UTF-8 become null.
    """
    return _series(_flat(column).array)


# Below: one code for the cells of a column and for the elements of lists.


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """Values of one scalar kind; `undecoded` holds those that are not UTF-8, by place."""

    kind: str
    array: pa.Array
    undecoded: dict[int, bytes]

    def raw(self, place: int) -> Any:
        return self.undecoded.get(place, self.array[place].as_py())


@dataclass(frozen=True, kw_only=True)
class CellLists:
    """n lists: their m elements, how many each has, which are missing, and the row of each element."""

    elements: _Flat
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    missing: np.ndarray[Any, np.dtype[np.bool_]]

    @property
    def rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The row of each element."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def faults_of(self, faults: dict[int, str]) -> dict[int, str]:
        """The first fault of each row."""
        if not faults:
            return {}
        rows = self.rows
        found: dict[int, str] = {}
        for place in sorted(faults):
            found.setdefault(int(rows[place]), faults[place])
        return found

    def rebuilt(self, values: pl.Series, kept: Any, dtype: Any) -> pl.Series:
        """Lists of the kept elements, null where the list is missing."""
        counts = np.bincount(self.rows[kept], minlength=len(self.lengths))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        inner = values.filter(pl.Series(kept, dtype=pl.Boolean)).cast(dtype).to_arrow()
        array = pa.LargeListArray.from_arrays(pa.array(offsets), inner, mask=pa.array(self.missing))
        return _series(array).cast(pl.List(dtype))


def _plain(array: pa.Array) -> pa.Array:
    """Values without extensions, dictionaries and runs."""
    while True:
        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        elif pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        else:
            return array


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array of all chunks."""
    if column.num_chunks == 1:
        return _plain(column.chunk(0))
    plain = [_plain(chunk) for chunk in column.chunks]
    return pa.concat_arrays(plain) if plain else pa.array([], stored(column.type))


def _flat(column: pa.ChunkedArray | pa.Array) -> _Flat:
    array = _whole(column) if isinstance(column, pa.ChunkedArray) else _plain(column)
    kind = kind_of(array.type).scalar
    undecoded: dict[int, bytes] = {}
    if kind == "text":
        raw = array.cast(pa.large_binary())
        try:
            array = raw.cast(pa.large_string())  # checks every byte
        except pa.ArrowInvalid:
            texts: list[str | None] = []
            for place, value in enumerate(raw.to_pylist()):
                try:
                    texts.append(None if value is None else value.decode())
                except UnicodeDecodeError:
                    undecoded[place] = value
                    texts.append(None)
            array = pa.array(texts, pa.large_string())
    elif pa.types.is_decimal(array.type):
        whole = array.type.scale == 0
        # Through text, as Arrow's own cast to a float is not rounded to the nearest.
        array = array.cast(pa.large_string())
        kind = "digits" if whole else "float"
        if not whole:
            array = _series(array).cast(pl.Float64).to_arrow()
    elif pa.types.is_float16(array.type):
        array = array.cast(pa.float64())
    return _Flat(kind=kind, array=array, undecoded=undecoded)


def _series(array: pa.Array) -> pl.Series:
    if len(array):
        return pl.Series(array)
    # Through a table: polars gives a bare array without rows no type.
    return pl.DataFrame(pl.from_arrow(pa.table({"x": array}))).to_series()


def _convert(series: pl.Series, given: pl.Expr, found: pl.Expr) -> tuple[pl.Series, NDArray[np.intp]]:
    """The values of a series, whose cells are ``_CELL``, and the places of given cells without one."""
    frame = pl.DataFrame({"cell": series}).select_seq(_CELL, found.alias("found"))
    bad = frame.select_seq((given & pl.col("found").is_null()).fill_null(False).alias("bad"))
    return frame["found"], np.flatnonzero(bad["bad"].to_numpy())


def _hex_codes(texts: pl.Series) -> tuple[pl.Series, NDArray[np.intp]]:
    if len(texts) > _FEW_CELLS:
        return _convert(texts, _CELL != "", from_hex(pl.when(_CELL.str.contains(_HEX.pattern)).then(_CELL)))
    cells = texts.to_list()
    codes = [int(text, 16) if text and _HEX.fullmatch(text) else None for text in cells]
    bad = [place for place, (text, code) in enumerate(zip(cells, codes, strict=True)) if text and code is None]
    return pl.Series(codes, dtype=pl.UInt32), np.array(bad, np.intp)


def cut_lists(column: pa.ChunkedArray, separator: str | None) -> CellLists:
    """Take n lists, or n texts that a separator cuts into lists, apart."""
    array = _whole(column)
    kind = kind_of(array.type)
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if kind.is_list:
        counted = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64())
        lengths = np.where(missing, 0, counted.to_numpy(zero_copy_only=False))
        return CellLists(elements=_flat(pc.list_flatten(array)), lengths=lengths, missing=missing)
    if kind.scalar == "nothing":
        return CellLists(
            elements=_flat(pa.array([], pa.null())), lengths=np.zeros(len(array), np.int64), missing=missing
        )
    flat = _flat(array)
    # Bytes that are not UTF-8 can't be cut: such a cell is a list of itself, a fault of its one element.
    parts = [None if text is None else [text] for text in flat.array.to_pylist()] if flat.undecoded else None
    if parts is None:
        cut = _series(flat.array).str.split(str(separator)).to_arrow()
    else:
        cut = pa.array([None if part is None else part[0].split(str(separator)) for part in parts])
    lengths = pc.fill_null(pc.list_value_length(cut), 0).cast(pa.int64()).to_numpy(zero_copy_only=False).copy()
    elements = pc.list_flatten(cut).cast(pa.large_string())
    if not flat.undecoded:
        # Nothing between two separators is not a value.
        elements = pc.replace_with_mask(elements, pc.equal(elements, ""), pa.scalar(None, pa.large_string()))
        return CellLists(elements=_flat(elements), lengths=lengths, missing=missing)
    raw: list[bytes | None] = []
    for place, text in enumerate(flat.array.to_pylist()):
        if place in flat.undecoded:
            raw.append(flat.undecoded[place])
            lengths[place] = 1
        elif text is not None:
            raw += [part.encode() or None for part in text.split(str(separator))]
    return CellLists(elements=_flat(pa.array(raw, pa.large_binary())), lengths=lengths, missing=missing)


def flat_numbers(flat: _Flat, *, booleans: bool = False) -> Values:
    """Read the numbers of cells or elements; what is infinite or not a number is a fault by place."""
    series = _series(flat.array)
    faults = {row: f"{shown_value(value)} is not UTF-8" for row, value in flat.undecoded.items()}
    if flat.kind in ("text", "digits"):
        text = _CELL.str.strip_chars(" ")
        if booleans:
            text = text.str.to_lowercase().replace(_TRUTH)
        series, bad = _convert(series, text != "", text.cast(pl.Float64, strict=False))
        for row in bad.tolist():
            faults[row] = f"{shown_value(flat.raw(row))} is not a number"
    found = series.cast(pl.Float64).to_numpy()  # NaN for null
    infinite = np.isinf(found)
    if infinite.any():
        for row in np.flatnonzero(infinite).tolist():
            faults[row] = f"{shown_value(flat.raw(row))} is not finite"
        found = np.where(infinite, np.nan, found)
    return Values(series=pl.Series(found, dtype=pl.Float64, nan_to_null=True), faults=faults)


def _categories(flat: _Flat, wanted: str) -> Values:
    series = _series(flat.array)
    faults = {row: f"{shown_value(value)} is not UTF-8" for row, value in flat.undecoded.items()}
    if flat.kind == "boolean":
        series = series.cast(pl.Int64)
    if wanted == "string":
        return Values(series=series.cast(pl.String), faults=faults)
    if wanted == "hex" and flat.kind in ("text", "digits"):
        found, bad = _hex_codes(series)
        for row in bad.tolist():
            faults[row] = f"{shown_value(series[row])} is not a hexadecimal number of at most 8 digits"
        return Values(series=found, faults=faults)
    if wanted == "hex":
        values = _categories(flat, "integer")
        codes = values.series.cast(pl.UInt32, strict=False)
        if codes.null_count() > values.series.null_count():
            for row in np.flatnonzero((codes.is_null() & values.series.is_not_null()).to_numpy()).tolist():
                shown = shown_value(flat.raw(row))
                faults[row] = f"{shown} is not an integer of 32 bits, which a hexadecimal category is"
        return Values(series=codes, faults=values.faults | faults)
    if series.dtype.is_integer() and series.dtype != pl.UInt64:
        return Values(series=series.cast(pl.Int64), faults=faults)
    given, whole = _CELL.is_not_null(), _CELL.cast(pl.Int64, strict=False)
    if flat.kind in ("text", "digits"):
        stripped = _CELL.str.strip_chars(" ")
        given, whole = stripped != "", stripped.cast(pl.Int64, strict=False)
    elif flat.kind == "float":
        series = series.cast(pl.Float64).fill_nan(None)
        exact = (_CELL.floor() == _CELL) & (_CELL.abs() <= _EXACT)
        whole = pl.when(exact).then(_CELL).cast(pl.Int64, strict=False)
    found, bad = _convert(series, given, whole)
    for row in bad.tolist():
        faults[row] = f"{shown_value(flat.raw(row))} {_integer_fault(flat.raw(row))}"
    return Values(series=found, faults=faults)


def _integer_fault(value: object) -> str:
    digits = str(value).strip(" ").removeprefix("-").removeprefix("+")
    large = isinstance(value, float) and value == value // 1
    if large or (not isinstance(value, float) and digits.isascii() and digits.isdigit()):
        return "is beyond a 64-bit integer" if not large else "is too large for an exact integer"
    return "is not an integer"


def shown_value(value: object) -> str:
    """Return a value as messages show it."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN + 2 else shown[:_SHOWN] + "..."

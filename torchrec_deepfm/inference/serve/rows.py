"""Rows of requests in JSON, checked against the columns of the model; those of a batch become one Arrow table.

Every column has one Arrow type, whatever a request holds, so that rows of different requests can be scored together.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import pyarrow as pa
from pydantic import ConfigDict, Field, StrictBool, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.errors import did_you_mean, shown

MAX_TEXT: Final = 1024  # characters
MAX_LIST: Final = 1024  # values
_MOST_FAULTS: Final = 10
_INT64: Final = 2**63
Row = dict[str, Any]  # by column


@dataclass(frozen=True)
class Fault:
    """What is wrong with a request; rows count from 1."""

    message: str
    row: int | None = None
    column: str | None = None


class RequestError(Exception):
    """A request that can't be answered: its HTTP status, 4xx, and what is wrong."""

    def __init__(self, status: int, *faults: Fault) -> None:
        super().__init__(faults[0].message)
        self.status, self.faults = status, faults


@dataclass(frozen=True)
class _Kind:
    """How the values of a column look in JSON, and in Arrow."""

    json: Any
    words: str
    arrow: pa.DataType
    convert: Callable[[Any], Any]


_TEXT: Final = Annotated[str, Field(strict=True, max_length=MAX_TEXT)]
_INTEGER: Final = Annotated[int, Field(strict=True, ge=-_INT64, lt=_INT64)]
_DIGITS: Final = Annotated[str, Field(strict=True, pattern=r"^[+-]?[0-9]{1,19}$")]
_CODE: Final = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
_HEX: Final = Annotated[str, Field(strict=True, pattern=r"^[0-9a-fA-F]{0,8}$")]
_NUMBER: Final = Annotated[float, Field(strict=True, allow_inf_nan=False)]

_KINDS: Final = {
    "number": _Kind(_NUMBER | StrictBool, "a finite number", pa.float64(), float),
    "integer": _Kind(_INTEGER | StrictBool | _DIGITS, "an integer of 64 bits", pa.int64(), int),
    "string": _Kind(
        _TEXT | _INTEGER | StrictBool,
        f"a text of at most {MAX_TEXT:,} characters, or an integer",
        pa.large_string(),
        lambda value: value if isinstance(value, str) else str(int(value)),
    ),
    "hex": _Kind(
        _HEX | _CODE,
        "a text of at most 8 hexadecimal digits, or the integer of 32 bits that it stands for",
        pa.large_string(),
        lambda value: value if isinstance(value, str) else f"{value:x}",
    ),
    "time": _Kind(_TEXT, "a time as text", pa.large_string(), str),
    "coded time": _Kind(_TEXT | _INTEGER | _NUMBER, "a time as in training, text or number", pa.large_string(), str),
}


@dataclass(frozen=True)
class RequestColumn:
    """A column of a request.

    ``kind`` is a key of ``_KINDS``. ``separator`` splits a text into several values; ``width`` is how many there are,
    if in every row, where none may be missing.
    """

    name: str
    kind: str
    is_list: bool = False
    separator: str | None = None
    width: int | None = None

    @property
    def most(self) -> int:
        """Most values of a list."""
        return self.width or MAX_LIST

    @property
    def json(self) -> Any:
        """The type of a cell, for pydantic."""
        kind = _KINDS[self.kind].json
        if not self.is_list:
            return kind | None
        if self.width is not None:
            exactly = Annotated[list[kind], Field(min_length=self.width, max_length=self.width)]  # type: ignore[valid-type]
            return exactly if self.separator is None else exactly | _TEXT
        several = Annotated[list[kind | None], Field(max_length=MAX_LIST)]  # type: ignore[valid-type]
        return several | None if self.separator is None else several | _TEXT | None

    @property
    def hint(self) -> str:
        """What a cell may hold, in a word or two for a form."""
        word = {"string": "text", "hex": "hexadecimal"}.get(self.kind, self.kind)
        return word if not self.is_list else f"list of {word}, by {self.separator or ','}"

    @property
    def words(self) -> str:
        """What a cell may hold."""
        one = _KINDS[self.kind].words
        if self.width is not None:
            return f"a list of {self.width:,} finite numbers"
        if self.is_list:
            cut = "" if self.separator is None else f", or text with {self.separator!r} between them"
            one = f"a list of at most {MAX_LIST:,} values, each {one} or null{cut}"
        return f"{one}, or null"

    def array(self, values: Sequence[Any]) -> pa.Array:
        """Convert the checked cells of all rows; refused where some are lists, some text."""
        kind = _KINDS[self.kind]
        if not self.is_list:
            try:
                return pa.array([None if value is None else kind.convert(value) for value in values], kind.arrow)
            except OverflowError as error:  # digits in a text, of which pydantic has checked the number only
                raise self._too_large(values) from error
        given = [value for value in values if value is not None]
        if given and all(isinstance(value, str) for value in given):
            return pa.array(values, pa.large_string())
        for row, value in enumerate(values, 1):
            if isinstance(value, str):
                raise RequestError(
                    422, Fault("is text, where other rows hold a list; give one of them", row, self.name)
                )
        cells = [
            None if value is None else [None if one is None else kind.convert(one) for one in value] for value in values
        ]
        try:
            return pa.array(cells, pa.large_list(kind.arrow))
        except OverflowError as error:
            raise self._too_large(cells) from error

    def _too_large(self, cells: Sequence[Any]) -> RequestError:
        for row, cell in enumerate(cells, 1):
            for value in cell if isinstance(cell, list) else [cell]:
                if value is not None and not -_INT64 <= int(value) < _INT64:
                    return RequestError(422, Fault(f"expected {self.words}, not {shown(str(value))}", row, self.name))
        raise AssertionError(self.name)


def columns_of(encoder: RowEncoder) -> tuple[RequestColumn, ...]:
    """Return the columns that rows of a request have: those that a table must have, without the label."""
    schema, kinds = encoder.raw_schema, dict(zip(encoder.raw_schema.categorical, encoder.types, strict=True))
    weights = {schema.options(name).weights: schema.options(name).separator for name in schema.weighted}
    found = []
    for source in schema.features_read:
        if source in weights:
            found.append(RequestColumn(source, "number", True, weights[source]))
            continue
        readers = [name for name in (*schema.numeric, *schema.categorical) if schema.source(name) == source]
        values = [name for name in readers if schema.options(name).part is None]
        if not values:  # only parts of this time are used, or it ends an age
            timed = [name for name in (*schema.numeric, *schema.categorical) if schema.options(name).until == source]
            written = any(schema.options(name).format for name in (*readers, *timed))
            found.append(RequestColumn(source, "coded time" if written else "time"))
            continue
        used = {"number" if name in schema.numeric else kinds[name] or "string" for name in values}
        kind = used.pop() if len(used) == 1 else "integer"  # what is a category and a number at once
        options = schema.options(values[-1])
        is_list = options.list or options.width is not None
        found.append(RequestColumn(source, kind, is_list, options.separator, options.width))
    return tuple(found)


def as_table(columns: Sequence[RequestColumn], rows: Sequence[Row]) -> pa.Table:
    """Convert checked rows of a request, or of several of one form; a number that is too large is refused."""
    # Cells of one kind become one array, which is cut: for few rows a call costs more than the cells.
    arrays: dict[str, pa.Array] = {}
    kinds: dict[str, list[RequestColumn]] = {}
    for column in columns:
        if column.is_list:
            arrays[column.name] = column.array([row[column.name] for row in rows])
        else:
            kinds.setdefault(column.kind, []).append(column)
    for same in kinds.values():
        try:
            joined = same[0].array([row[column.name] for column in same for row in rows])
        except RequestError:  # says which column
            arrays |= {column.name: column.array([row[column.name] for row in rows]) for column in same}
            continue
        for place, column in enumerate(same):
            arrays[column.name] = joined.slice(place * len(rows), len(rows))
    return pa.table({column.name: arrays[column.name] for column in columns})


class JsonRows:
    """Reads requests in JSON: ``{"rows": [{column: value, ...}, ...]}``.

    Example:
        >>> columns = [RequestColumn("price", "number"), RequestColumn("user", "string")]
        >>> body = b'{"rows": [{"price": 5, "user": "anna"}, {"price": null, "user": 7}]}'
        >>> as_table(columns, JsonRows(columns, most=2).read(body)).to_pylist()
        [{'price': 5.0, 'user': 'anna'}, {'price': None, 'user': '7'}]
    """

    def __init__(self, columns: Sequence[RequestColumn], most: int) -> None:
        self._columns = {column.name: column for column in columns}
        self._lists = [column.name for column in columns if column.is_list and column.separator is not None]
        self._most = most
        closed = with_config(ConfigDict(extra="forbid"))
        row = closed(TypedDict("Row", {column.name: column.json for column in columns}))  # type: ignore[operator]
        rows = Annotated[list[row], Field(min_length=1, max_length=most)]  # type: ignore[valid-type]
        self.type = TypeAdapter(closed(TypedDict("Rows", {"rows": rows})))  # type: ignore[operator]

    def read(self, body: bytes) -> list[Row]:
        """Check the n rows of a request; ``as_table`` converts those of a batch.

        RequestError: it is not JSON (400), has too many rows (413), or a cell does not fit (422).
        """
        try:
            return self.type.validate_json(body)["rows"]  # type: ignore[no-any-return]
        except ValidationError as error:
            raise self._explain(error) from error

    def form(self, rows: Sequence[Row]) -> Hashable:
        """Whether the lists of a request are written as texts; requests of one form may share a table."""
        return tuple(any(isinstance(row[name], str) for row in rows) for name in self._lists)

    def _explain(self, error: ValidationError) -> RequestError:
        faults: dict[tuple[int | None, str | None], Fault] = {}
        for one in error.errors(include_url=False, include_context=True):
            place, kind = one["loc"], one["type"]
            if kind == "json_invalid":
                return RequestError(400, Fault(f"the body is not valid JSON: {one['ctx']['error']}"))
            if kind == "too_long" and place == ("rows",):
                return RequestError(413, Fault(f"more than {self._most:,} rows; send them in several requests"))
            if len(place) < 2:
                faults.setdefault((None, None), Fault(_about_rows(kind, place)))
                continue
            row = int(place[1]) + 1
            column = str(place[2]) if len(place) > 2 else None
            if (row, column) not in faults:
                faults[row, column] = Fault(self._about_cell(kind, column, one["input"]), row, column)
        return RequestError(422, *list(faults.values())[:_MOST_FAULTS])

    def _about_cell(self, kind: str, column: str | None, value: Any) -> str:
        if column is None:
            return f"expected an object with a value per column, not {shown(value)}"
        if kind == "missing":
            return "the column is absent; give it, or null where the value is missing"
        if kind == "extra_forbidden":
            return f"unknown column{did_you_mean(column, self._columns)}"
        return f"expected {self._columns[column].words}, not {shown(value)}"


def _about_rows(kind: str, place: tuple[int | str, ...]) -> str:
    if kind == "too_short":
        return "rows is empty; give at least one row"
    if kind == "extra_forbidden":
        return f"unknown key {shown(str(place[0]))}; expected rows only"
    return 'expected {"rows": [{column: value, ...}, ...]}'

"""The options of one column, and how its name and texts are written in TOML."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from torchrec_deepfm.errors import UserError, one_of

TRANSFORMS: Final = (
    "standard", "minmax", "clip", "quantile", "log1p", "signed_log1p", "log", "bucketize", "fuxictr", "none",
)  # fmt: skip
BUCKETS: Final = ("bucketize", "fuxictr")  # make a category of a number
TYPES: Final = ("string", "integer")

PARTS: Final = ("hour", "weekday", "day", "month", "age")
# Parts of a second, by the name of the format.
UNITS: Final = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}

_MAX_NUM_EMBEDDINGS: Final = 2**31 - 1
_MAX_BUCKETS: Final = 1000
_MAX_WIDTH: Final = 16_384
WIDE: Final = ("none", "standard")  # transforms of lists of numbers
LIST_ONLY: Final = ("separator", "weights")


@dataclass(frozen=True, kw_only=True)
class Column:
    """Options of one column; an option that is left out keeps its default.

    Args:
        list: A categorical column with several values per row (multi-hot).
        separator: Text between the values of a list, for CSV cells and text columns.
        weights: Name of the column that holds a weight for each value of this list.
        type: ``string`` or ``integer``; ``None`` derives it from the file.
        min_count: Values of this column seen less often in training share id 0.
        num_embeddings: Ids of this column when values are hashed.
        transform: Transform of the numbers of this column: one of ``TRANSFORMS``.
        buckets: With the transform ``bucketize``: number of buckets that hold equally many training rows each.
        width: A numeric column with a list of so many numbers per row, such as a text's embedding: one field.
        missing_indicator: Whether another numeric column, ``NAME_missing``, holds 1 where the number is missing.
        of: The column of the table that this one is made of; ``None`` for the one of its own name.
        part: Part of a date or time: one of ``PARTS``; ``age`` is the days from it until ``until``.
        format: How a number or text stands for a time: ``s``, ``ms``, ``us``, ``ns`` since 1970, or a pattern such as
            ``%Y%m%d``; ``None`` for dates, timestamps and ISO 8601 text.
        timezone: Where hours and days are counted; ``None`` for UTC.
        until: A date (ISO 8601), or the column of the table that holds the time at which an age is counted.
        cross: Categorical columns whose values together are a value of this one.

    Raises:
        UserError: An option has the wrong type or value.

    Example:
        >>> Column(list=True, separator="|").to_json()
        {'list': True, 'separator': '|'}
    """

    list: bool = False
    separator: str | None = None
    weights: str | None = None
    type: str | None = None
    min_count: int | None = None
    num_embeddings: int | None = None
    transform: str | None = None
    buckets: int | None = None
    width: int | None = None
    missing_indicator: bool = False
    of: str | None = None
    part: str | None = None
    format: str | None = None
    timezone: str | None = None
    until: str | None = None
    cross: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options one by one."""
        for key in ("list", "missing_indicator"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{getattr(self, key)!r} is not true or false", where=key, remedy="give one of them")
        for key in ("separator", "weights", "of", "format", "timezone", "until"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                raise UserError(f"{value!r} is not a text", where=key, remedy="give a non-empty string")
            if key in LIST_ONLY and value is not None and not (self.list or (key == "separator" and self.width)):
                raise UserError("only valid for a list column", where=key, remedy="add list = true, or remove it")
        self._check_time()
        self._check_cross()
        check_choice("type", self.type, TYPES)
        check_choice("transform", self.transform, TRANSFORMS)
        _check_count("min_count", self.min_count, 1)
        _check_count("num_embeddings", self.num_embeddings, 2)
        _check_count("buckets", self.buckets, 2, _MAX_BUCKETS)
        self._check_width()

    def _check_width(self) -> None:
        _check_count("width", self.width, 2, _MAX_WIDTH)
        if self.width is None:
            return
        for key in ("list", "part", "buckets", "missing_indicator"):
            if getattr(self, key):
                raise UserError(
                    "not valid beside width, which is for lists of numbers", where=key, remedy="remove one of them"
                )
        if self.transform not in (None, *WIDE):
            what = f"{self.transform} is not valid for lists of numbers (width)"
            raise UserError(what, where="transform", remedy=f"choose {one_of(WIDE, '')}")

    def _check_time(self) -> None:
        check_choice("part", self.part, PARTS)
        for key in ("format", "timezone", "until"):
            if getattr(self, key) is not None and (self.part is None or (key == "until" and self.part != "age")):
                which = '"age"' if key == "until" else one_of(PARTS, "")
                raise UserError(
                    "only valid for a part of a time", where=key, remedy=f"add part = {which}, or remove it"
                )
        if self.part == "age" and self.until is None:
            raise UserError(
                "is missing",
                where="until",
                remedy='give a date such as "2024-01-31", or the column with the time of the row',
            )
        if self.part is not None and (self.list or self.type is not None):
            raise UserError(
                "not valid for a list or with a type", where="part", remedy=f"remove {'list' if self.list else 'type'}"
            )
        if self.timezone not in (None, "UTC"):
            try:
                ZoneInfo(str(self.timezone))
            except (ZoneInfoNotFoundError, ValueError, OSError) as error:
                raise UserError(
                    f"{self.timezone!r} is not a time zone of this machine",
                    where="timezone",
                    remedy="give one such as Europe/Berlin",
                ) from error

    def _check_cross(self) -> None:
        given: Any = self.cross
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
            raise UserError(f"{given!r} is not a list of columns", where="cross", remedy="give two or more")
        object.__setattr__(self, "cross", tuple(given))
        if given and (len(set(given)) < len(given) or len(given) < 2):
            raise UserError(
                f"{list(given)!r} does not name two different columns", where="cross", remedy="give two or more"
            )
        others = [key for key in ("list", "of", "part", "type") if getattr(self, key)]
        if given and others:
            raise UserError(f"not valid beside {others[0]}", where="cross", remedy="remove one of them")

    def to_json(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as JSON values that ``Column(**values)`` reads back."""
        default = asdict(Column())
        given = {key: value for key, value in asdict(self).items() if value != default[key]}
        return given | ({"cross": list(self.cross)} if self.cross else {})


def check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless a value is absent or one of the choices."""
    if value is not None and value not in choices:
        raise UserError(f"{value!r} is not valid", where=key, remedy=f"choose {one_of(choices, value)}")


def _check_count(key: str, value: object, least: int, most: int = _MAX_NUM_EMBEDDINGS) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(
            f"{value!r} is not a valid count", where=key, remedy=f"give a whole number from {least} to {most}"
        )


def is_date(text: str) -> bool:
    """Return whether a text is a date or time in ISO 8601.

    Example:
        >>> is_date("2024-01-31"), is_date("timestamp")
        (True, False)
    """
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def toml_text(value: str | float) -> str:
    r"""Write a number, or a text, also one with quotes and control characters, as TOML on one line.

    Example:
        >>> toml_text('a "b"')
        '"a \\"b\\""'
    """
    # TOML accepts JSON's escapes and requires one more character to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    """Write a column's name as a TOML key: as it is where TOML allows that, else in quotes.

    Example:
        >>> toml_key("price"), toml_key("user id")
        ('price', '"user id"')
    """
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_text(name)

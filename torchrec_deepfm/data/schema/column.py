"""The options of one column, and how its name and texts are written in TOML."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from torchrec_deepfm.errors import UserError, one_of

TRANSFORMS: Final = ("log1p", "signed_log1p", "log", "bucketize", "fuxictr", "none")
TYPES: Final = ("string", "integer")

_MAX_NUM_EMBEDDINGS: Final = 2**31 - 1
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

    def __post_init__(self) -> None:
        """Check the options one by one."""
        if not isinstance(self.list, bool):
            raise UserError(f"list: {self.list!r} is not true or false; give one of them")
        for key in ("separator", "weights"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                raise UserError(f"{key}: {value!r} is not a text; give a non-empty string")
            if value is not None and not self.list:
                raise UserError(f"{key}: only valid for a list column; add list = true, or remove it")
        check_choice("type", self.type, TYPES)
        check_choice("transform", self.transform, TRANSFORMS)
        _check_count("min_count", self.min_count, 1)
        _check_count("num_embeddings", self.num_embeddings, 2)

    def to_json(self) -> dict[str, Any]:
        """Return the options that differ from their defaults.

        Returns:
            Plain JSON values, which ``Column(**values)`` reads back.
        """
        default = asdict(Column())
        return {key: value for key, value in asdict(self).items() if value != default[key]}


def check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless a value is absent or one of the choices."""
    if value is not None and value not in choices:
        raise UserError(f"{key}: {value!r} is not valid; choose {one_of(choices, value)}")


def _check_count(key: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_NUM_EMBEDDINGS:
        raise UserError(
            f"{key}: {value!r} is not a valid count; give a whole number from {least} to {_MAX_NUM_EMBEDDINGS}"
        )


def toml_text(text: str) -> str:
    r"""Quote a text as a TOML string.

    Args:
        text: Any text, also one with quotes and control characters.

    Returns:
        A TOML basic string, on one line.

    Example:
        >>> toml_text('a "b"')
        '"a \\"b\\""'
    """
    # TOML accepts JSON's escapes and requires one more character to be escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    """Write a column's name as a TOML key.

    Args:
        name: Any name.

    Returns:
        The name itself where TOML allows that, else in quotes.

    Example:
        >>> toml_key("price"), toml_key("user id")
        ('price', '"user id"')
    """
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_text(name)

"""The type of a column of a user's table, and whether it fits the schema.

Nothing is guessed row by row: a column's type follows from the types of the file and the schema, and a column that does
not fit is an error for the whole file. ``columns.py`` reads the values.
"""

from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from torchrec_deepfm.data.schema import Column, toml_key
from torchrec_deepfm.errors import UserError

TAKEN: Final = ("boolean", "integer", "float", "text", "nothing")


@dataclass(frozen=True)
class Kind:
    """What a column of a file holds.

    ``scalar``: ``boolean``, ``integer``, ``float``, ``text`` or ``nothing`` (all missing); else ``lists`` or the name
    of a type that is not supported.
    """

    scalar: str
    is_list: bool = False

    def __str__(self) -> str:
        """Return the type in words."""
        words = {"boolean": "booleans", "integer": "integers", "float": "decimal numbers", "nothing": "nothing"}
        word = words.get(self.scalar, self.scalar)
        return f"lists of {word}" if self.is_list else word


def kind_of(arrow: pa.DataType) -> Kind:
    """Return what a column of an Arrow type holds.

    Example:
        >>> kind_of(pa.list_(pa.int16()))
        Kind(scalar='integer', is_list=True)
    """
    arrow = stored(arrow)
    types = pa.types
    if (
        types.is_list(arrow)
        or types.is_large_list(arrow)
        or types.is_fixed_size_list(arrow)
        or types.is_list_view(arrow)
        or types.is_large_list_view(arrow)
    ):
        inner = kind_of(arrow.value_type)
        return Kind("lists" if inner.is_list else inner.scalar, True)
    if types.is_boolean(arrow):
        return Kind("boolean")
    if types.is_integer(arrow) or (types.is_decimal(arrow) and arrow.scale == 0):
        return Kind("integer")
    if types.is_floating(arrow) or types.is_decimal(arrow):
        return Kind("float")
    if _is_text(arrow):
        return Kind("text")
    return Kind("nothing" if types.is_null(arrow) else str(arrow))


def check_label(kind: Kind) -> None:
    """Raise unless labels can be read from a column."""
    if kind.is_list or kind.scalar not in ("boolean", "integer", "float", "nothing"):
        raise UserError(f"it holds {kind}, but a label is a boolean or a number 0 or 1", remedy="convert it")


def check_number(kind: Kind) -> None:
    """Raise unless numbers can be read from a column."""
    if kind.is_list or kind.scalar not in ("boolean", "integer", "float", "nothing"):
        remedy = "list it under categorical" if kind.scalar == "text" or kind.is_list else "convert it to a number"
        raise UserError(f"it holds {kind}, not numbers", remedy=remedy)


def category_type(kind: Kind, options: Column, name: str, *, csv: bool) -> str | None:
    """Choose ``string`` or ``integer`` for the categories of a column; ``None`` where all are missing, so both fit."""
    at = f"[columns.{toml_key(name)}]"
    if kind.scalar == "lists":
        raise UserError(f"it holds {kind}", remedy="write one flat list of text or integers per row")
    if kind.scalar not in TAKEN:
        raise UserError(f"it holds {kind}", remedy="convert it to text or an integer, or remove it from the schema")
    if kind.is_list and not options.list:
        raise UserError(f"it holds {kind}", remedy=f"set list = true under {at}")
    if options.list and not kind.is_list and kind.scalar not in ("text", "nothing"):
        raise UserError(f"it holds {kind}, one per row", remedy=f"remove list = true under {at}")
    if options.list and not kind.is_list and kind.scalar == "text" and options.separator is None:
        where = "a CSV's cells" if csv else "it holds text, which"
        raise UserError(f"{where} must be cut into lists", remedy=f'set separator, such as "|", under {at}')
    if kind.scalar == "float" and options.type != "integer":
        raise UserError(
            f"it holds {kind}, which are not categories",
            remedy=f'list it under numeric, or set type = "integer" under {at} if they are whole',
        )
    if options.type is not None or kind.scalar == "nothing":
        return options.type
    return "string" if kind.scalar == "text" else "integer"


def check_weights(kind: Kind, *, cut: bool) -> None:
    """Raise unless the weights of a list can be read from a column; with ``cut`` texts are cut into lists."""
    if kind.scalar == "nothing" or (cut and kind == Kind("text")):
        return
    if not kind.is_list or kind.scalar not in ("integer", "float"):
        raise UserError(f"it holds {kind}, but weights are lists of numbers", remedy="convert it")


def stored(arrow: pa.DataType) -> pa.DataType:
    """Return the type below extensions, dictionaries and runs.

    Example:
        >>> stored(pa.dictionary(pa.int8(), pa.string()))
        DataType(string)
    """
    while True:
        if isinstance(arrow, pa.BaseExtensionType):
            arrow = arrow.storage_type
        elif pa.types.is_dictionary(arrow) or pa.types.is_run_end_encoded(arrow):
            arrow = arrow.value_type
        else:
            return arrow


def _is_text(arrow: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(arrow)
        or types.is_large_string(arrow)
        or types.is_string_view(arrow)
        or types.is_binary(arrow)
        or types.is_large_binary(arrow)
        or types.is_binary_view(arrow)
    )

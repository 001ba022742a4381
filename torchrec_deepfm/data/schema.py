"""The columns of a data set: built-in schemas, and those that a user writes as TOML. Standard library only.

Shape letters: I numeric columns, F categorical columns.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError, did_you_mean, one_of
from torchrec_deepfm.files import parse_toml, read_text

TRANSFORMS: Final = ("log1p", "signed_log1p", "log", "bucketize", "fuxictr", "none")
MISSING: Final = ("value", "rare")
LAYOUTS: Final = ("criteo", "table")
TYPES: Final = ("string", "integer")

# A larger file was named by mistake: most likely a data file.
_MAX_TOML_BYTES: Final = 1 << 20
_MAX_NUM_EMBEDDINGS: Final = 2**31 - 1
_LIST_ONLY: Final = ("separator", "weights")


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
        _check_choice("type", self.type, TYPES)
        _check_choice("transform", self.transform, TRANSFORMS)
        _check_count("min_count", self.min_count, 1)
        _check_count("num_embeddings", self.num_embeddings, 2)

    def to_json(self) -> dict[str, Any]:
        """Return the options that differ from their defaults.

        Returns:
            Plain JSON values, which ``Column(**values)`` reads back.
        """
        default = asdict(Column())
        return {key: value for key, value in asdict(self).items() if value != default[key]}


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a click log: one label, I numeric ones and F categorical ones.

    Criteo's text has them in this order; in a table they are found by name. I may be 0, F may not.

    Args:
        label: Name of the 0/1 column.
        numeric: Names of the I numeric columns, in the order of the dense array.
        categorical: Names of the F categorical columns, in the order of the sparse array.
        columns: Options by column name; a column without any may be left out.
        layout: ``criteo`` (tab separated text without a header, hexadecimal categories) or ``table`` (Parquet or CSV
            with named columns).
        numeric_transform: Transform of the numeric columns without a ``transform`` option; ``None`` leaves it to the
            command.
        delimiter: Character between the cells of a CSV; ``None`` derives it from the file's name (``.csv`` a comma,
            ``.tsv`` a tab).
        missing: With a vocabulary, ``value`` counts a missing value as a separate value; ``rare`` gives it id 0, as for
            rare values. Hashing always gives it id 0.

    Raises:
        UserError: A name is empty or used twice, there is no categorical column, or an option does not fit its column.

    Example:
        >>> Schema(label="click", numeric=("price",), categorical=("user", "item")).names
        ('click', 'price', 'user', 'item')
    """

    label: str
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    columns: Mapping[str, Column] = field(default_factory=dict, hash=False)
    layout: str = "criteo"
    numeric_transform: str | None = None
    delimiter: str | None = None
    missing: str = "value"

    def __post_init__(self) -> None:
        """Check the names, then the options against them."""
        if not self.categorical:
            raise UserError("no categorical column; name at least one under 'categorical'", where="schema")
        seen: set[str] = set()
        for name in self.names:
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{name!r} is not a valid column name; give every column a non-empty name", where="schema"
                )
            if name in seen:
                raise UserError(f"column {name!r} appears twice; give every column a different name", where="schema")
            seen.add(name)
        try:
            _check_choice("layout", self.layout, LAYOUTS)
            _check_choice("numeric_transform", self.numeric_transform, TRANSFORMS)
            _check_choice("missing", self.missing, MISSING)
        except UserError as error:
            raise UserError(error.what, where="schema") from error
        if self.delimiter is not None and (
            not isinstance(self.delimiter, str)
            or len(self.delimiter) != 1
            or not self.delimiter.isascii()
            or self.delimiter in '"\r\n'
        ):
            raise UserError(
                f"delimiter: {self.delimiter!r} is not valid; give one ASCII character, not a quote or newline",
                where="schema",
            )
        # A copy, so that the caller's mapping may change.
        object.__setattr__(self, "columns", dict(self.columns))
        for name, column in self.columns.items():
            self._check_column(name, column)

    def _check_column(self, name: str, column: Column) -> None:
        place = f"columns.{toml_key(name)}"
        if name not in self.names:
            weights = [other for other, options in self.columns.items() if options.weights == name]
            hint = f"; put options of the list at {weights[0]!r}" if weights else did_you_mean(name, self.names)
            raise UserError(
                f"{place}: {name!r} is not among label, numeric and categorical; name it there{hint}", where="schema"
            )
        given = column.to_json()
        if name not in self.categorical:
            for key in ("list", *_LIST_ONLY, "type", "min_count", "num_embeddings"):
                if key in given:
                    raise UserError(f"{place}.{key}: only valid for a categorical column; remove it", where="schema")
        if name not in self.numeric and "transform" in given:
            raise UserError(f"{place}.transform: only valid for a numeric column; remove it", where="schema")
        if self.layout == "criteo":
            for key in ("list", "type"):
                if key in given:
                    raise UserError(
                        f'{place}.{key}: not valid for Criteo\'s text; set layout = "table"', where="schema"
                    )
        if column.weights in self.names:
            raise UserError(
                f"{place}.weights: {column.weights!r} is also listed as a column; remove it there", where="schema"
            )
        if column.weights is not None:
            lists = [other for other, options in self.columns.items() if options.weights == column.weights]
            if len(lists) > 1:
                raise UserError(
                    f"{place}.weights: {column.weights!r} serves {len(lists)} lists; give each a separate column",
                    where="schema",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """All 1 + I + F names in file order: label, numeric, categorical."""
        return (self.label, *self.numeric, *self.categorical)

    @property
    def multi_hot(self) -> tuple[str, ...]:
        """The categorical columns that hold lists, in order."""
        return tuple(name for name in self.categorical if self.options(name).list)

    @property
    def one_hot(self) -> tuple[str, ...]:
        """The categorical columns with one value per row, in order."""
        return tuple(name for name in self.categorical if not self.options(name).list)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The list columns whose values carry weights, in order."""
        return tuple(name for name in self.multi_hot if self.options(name).weights is not None)

    @property
    def columns_read(self) -> tuple[str, ...]:
        """All columns that a table must have: ``names`` and those that hold weights."""
        return (*self.names, *(str(self.options(name).weights) for name in self.weighted))

    def options(self, name: str) -> Column:
        """Return the options of a column.

        Args:
            name: A column of the schema.

        Returns:
            Its options; the defaults where none were given.

        Example:
            >>> CRITEO_KAGGLE.options("C1") == Column()
            True
        """
        return self.columns.get(name, _DEFAULTS)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values; options that have their default are left out.

        Returns:
            A dictionary that ``from_json`` reads back.

        Example:
            >>> Schema.from_json(CRITEO_KAGGLE.to_json()) == CRITEO_KAGGLE
            True
        """
        value: dict[str, Any] = {
            "label": self.label,
            "numeric": list(self.numeric),
            "categorical": list(self.categorical),
            "layout": self.layout,
        }
        for key in ("numeric_transform", "delimiter"):
            if getattr(self, key) is not None:
                value[key] = getattr(self, key)
        if self.missing != "value":
            value["missing"] = self.missing
        columns = {name: column.to_json() for name, column in self.columns.items()}
        if any(columns.values()):
            value["columns"] = {name: options for name, options in columns.items() if options}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Schema":
        """Build a schema from the result of ``to_json``.

        Args:
            value: The keys ``label``, ``numeric`` and ``categorical``; optionally the others of the class.

        Returns:
            The schema.

        Raises:
            UserError: A key is missing, unknown or of the wrong type, or the names do not form a valid schema.
        """
        return _build(value, layout="criteo")


def _build(value: Mapping[str, Any], *, layout: str) -> Schema:
    """A schema from parsed JSON or TOML; messages begin with ``schema: KEY: ``."""
    if not isinstance(value, Mapping):
        raise UserError("not a table of keys; give label, numeric and categorical", where="schema")
    known = tuple(Schema.__dataclass_fields__)
    for key in value:
        if key not in known:
            raise UserError(f"{toml_key(key)}: unknown key; choose {one_of(known, key)}", where="schema")
    for key in ("label", "numeric", "categorical"):
        if key not in value:
            raise UserError(f"{key!r} is missing; give label, numeric and categorical", where="schema")
    if not isinstance(value["label"], str):
        raise UserError(f"label: {value['label']!r} is not a valid column name; give a text", where="schema")
    for key in ("numeric", "categorical"):
        if not isinstance(value[key], list) or not all(isinstance(name, str) for name in value[key]):
            raise UserError(
                f"{key}: numeric and categorical must be lists of column names; give text in [ ]", where="schema"
            )
    tables = value.get("columns", {})
    if not isinstance(tables, Mapping):
        raise UserError("columns: not a table; write [columns.NAME] and the options below it", where="schema")
    columns = {name: _column(name, options) for name, options in tables.items()}
    rest = {key: value[key] for key in ("layout", "numeric_transform", "delimiter", "missing") if key in value}
    return Schema(
        label=value["label"],
        numeric=tuple(value["numeric"]),
        categorical=tuple(value["categorical"]),
        columns=columns,
        **{"layout": layout} | rest,
    )


def _column(name: str, options: object) -> Column:
    if not isinstance(options, Mapping):
        raise UserError(
            f"columns.{toml_key(name)}: not a table; write [columns.NAME] and the options below it", where="schema"
        )
    known = tuple(Column.__dataclass_fields__)
    for key in options:
        if key not in known:
            raise UserError(
                f"columns.{toml_key(name)}.{toml_key(key)}: unknown option; choose {one_of(known, key)}", where="schema"
            )
    try:
        return Column(**options)
    except UserError as error:
        raise UserError(f"columns.{toml_key(name)}.{error}", where="schema") from error


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
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


_DEFAULTS: Final = Column()


_NUMERIC: Final = tuple(f"I{i}" for i in range(1, 14))
_CATEGORICAL: Final = tuple(f"C{i}" for i in range(1, 27))
_FRAPPE: Final = (
    "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city",
)  # fmt: skip


def _criteo() -> Schema:
    return Schema(label="label", numeric=_NUMERIC, categorical=_CATEGORICAL)


# Both publications have the same columns. They have separate names because their day files and splits differ.
CRITEO_KAGGLE = _criteo()
CRITEO_TERABYTE = _criteo()

# The benchmark data of BARS (reczoo/Datasets): CSV files with a header, as its configurations of FuxiCTR read them.
# Criteo_x1 is AFN's: the numbers are scaled, the categories numbered already.
CRITEO_X1 = Schema(
    label="label",
    numeric=_NUMERIC,
    categorical=_CATEGORICAL,
    layout="table",
    numeric_transform="none",
    columns={name: Column(type="integer") for name in _CATEGORICAL},
)
# Criteo_x4 has the challenge's raw values. FuxiCTR gives missing values the id of rare values.
CRITEO_X4 = Schema(
    label="Label",
    numeric=_NUMERIC,
    categorical=_CATEGORICAL,
    layout="table",
    numeric_transform="fuxictr",
    missing="rare",
    columns={name: Column(type="string") for name in _CATEGORICAL},
)
FRAPPE_X1 = Schema(
    label="label",
    numeric=(),
    categorical=_FRAPPE,
    layout="table",
    columns={name: Column(type="integer") for name in _FRAPPE},
)

_NAMED = {
    "criteo-kaggle": CRITEO_KAGGLE,
    "criteo-terabyte": CRITEO_TERABYTE,
    "criteo-x1": CRITEO_X1,
    "criteo-x4": CRITEO_X4,
    "frappe-x1": FRAPPE_X1,
}


def read_schema(path: Path | str) -> Schema:
    """Read a schema that a user wrote as TOML; ``docs/tables.md`` lists its keys.

    Args:
        path: A TOML file of at most 1 MiB.

    Returns:
        The schema; its layout is ``table`` unless the file sets another.

    Raises:
        UserError: The file can't be read, is not TOML, or is not a valid schema. The message names file and key.
    """
    path = Path(path)
    text = read_text(path, most=_MAX_TOML_BYTES, what="schema", instead="name a TOML file, or write one: schema infer")
    value = parse_toml(path, text)
    try:
        return _build(value, layout="table")
    except UserError as error:
        raise UserError(error.what, where=path) from error


def load_schema(name_or_path: str) -> Schema:
    """Return a built-in schema, or read a ``.toml`` file.

    Args:
        name_or_path: ``criteo-kaggle``, ``criteo-terabyte``, ``criteo-x1``, ``criteo-x4`` or ``frappe-x1``, or the path
            of a TOML file.

    Returns:
        The schema.

    Raises:
        UserError: The schema or file does not exist, or the file is not a valid schema.

    Example:
        >>> load_schema("criteo-terabyte") is CRITEO_TERABYTE
        True
    """
    if name_or_path in _NAMED:
        return _NAMED[name_or_path]
    if name_or_path.lower().endswith(".toml"):
        return read_schema(name_or_path)
    hint = did_you_mean(name_or_path, _NAMED)
    raise UserError(
        f"--schema: unknown schema {name_or_path!r}; choose one of {', '.join(_NAMED)}, or name a .toml file{hint}"
    )

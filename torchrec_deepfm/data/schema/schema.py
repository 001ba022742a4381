"""The columns of a data set.

Shape letters: I numeric columns, F categorical columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from torchrec_deepfm.data.schema.column import BUCKETS, LIST_ONLY, TRANSFORMS, Column, check_choice, is_date, toml_key
from torchrec_deepfm.data.schema.label_rule import LabelRule
from torchrec_deepfm.errors import UserError, did_you_mean, one_of

MISSING: Final = ("value", "rare")
LAYOUTS: Final = ("criteo", "table")
_DEFAULTS: Final = Column()


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a click log: one label, I numeric ones and F categorical ones.

    Criteo's text has them in this order; in a table they are found by name. F may be 0 if a number becomes categories
    (``bucketize``).

    Args:
        label: Name of the 0/1 column, or a comparison such as ``rating >= 4``.
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
        weight: Name of the column with the weight of each row in the loss and in the metrics; ``None`` for equal ones.
        header: The names of all columns of a CSV without a first row of names, in its order.

    Raises:
        UserError: A name is empty or used twice, there is no category at all, or an option does not fit its column.

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
    weight: str | None = None
    header: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the names, then the options against them."""
        seen: set[str] = set()
        for name in self.names:
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{name!r} is not a valid column name", where="schema", remedy="give every column a non-empty name"
                )
            if name in seen:
                raise UserError(
                    f"column {name!r} appears twice", where="schema", remedy="give every column a different name"
                )
            seen.add(name)
        try:
            check_choice("layout", self.layout, LAYOUTS)
            check_choice("numeric_transform", self.numeric_transform, TRANSFORMS)
            check_choice("missing", self.missing, MISSING)
        except UserError as error:
            raise error.within("schema") from error
        if self.delimiter is not None and (
            not isinstance(self.delimiter, str)
            or len(self.delimiter) != 1
            or not self.delimiter.isascii()
            or self.delimiter in '"\r\n'
        ):
            raise UserError(
                f"{self.delimiter!r} is not valid",
                where="schema: delimiter",
                remedy="give one ASCII character, not a quote or newline",
            )
        header: Any = self.header
        if isinstance(header, str) or not all(isinstance(name, str) and name for name in header):
            raise UserError(
                f"{header!r} is not a list of column names", where="schema: header", remedy="give text in [ ]"
            )
        object.__setattr__(self, "header", tuple(header))
        if header and (self.layout != "table" or len(set(header)) < len(header)):
            what = "only valid for a CSV" if self.layout != "table" else "names a column twice"
            raise UserError(what, where="schema: header", remedy="correct it")
        # A copy, so that the caller's mapping may change.
        object.__setattr__(self, "columns", dict(self.columns))
        for name, column in self.columns.items():
            self._check_column(name, column)
        self._check_sources()
        if len(set(self.dense_names)) < len(self.dense_names):
            raise UserError(
                "a numeric column has a name such as 'x[0]' beside a list 'x'", where="schema", remedy="rename it"
            )
        if not self.categorical and not any(
            (self.options(name).transform or self.numeric_transform) in BUCKETS
            for name in self.numeric
            if self.options(name).width is None
        ):
            raise UserError(
                "no categorical column",
                where="schema",
                remedy="name at least one under 'categorical', or give a number transform = \"bucketize\"",
            )

    def _check_column(self, name: str, column: Column) -> None:
        place = f"columns.{toml_key(name)}"
        if name not in self.names:
            weights = [other for other, options in self.columns.items() if options.weights == name]
            hint = f"; put options of the list at {weights[0]!r}" if weights else did_you_mean(name, self.names)
            raise UserError(
                f"{name!r} is not among label, numeric and categorical",
                where=f"schema: {place}",
                remedy=f"name it there{hint}",
            )
        given = column.to_json()
        if name not in self.categorical:
            for key in ("list", *LIST_ONLY, "type", "min_count", "num_embeddings", "cross"):
                if key in given and not (key == "separator" and column.width):
                    raise UserError(
                        "only valid for a categorical column", where=f"schema: {place}.{key}", remedy="remove it"
                    )
        if name not in self.numeric:
            for key in ("transform", "buckets", "width", "missing_indicator"):
                if key in given:
                    raise UserError(
                        "only valid for a numeric column", where=f"schema: {place}.{key}", remedy="remove it"
                    )
        if self.layout == "criteo":
            for key in ("list", "type", "of", "part", "cross", "width"):
                if key in given:
                    raise UserError(
                        "not valid for Criteo's text", where=f"schema: {place}.{key}", remedy='set layout = "table"'
                    )
        if column.weights in self.names:
            raise UserError(
                f"{column.weights!r} is also listed as a column",
                where=f"schema: {place}.weights",
                remedy="remove it there",
            )
        if column.weights is not None:
            lists = [other for other, options in self.columns.items() if options.weights == column.weights]
            if len(lists) > 1:
                raise UserError(
                    f"{column.weights!r} serves {len(lists)} lists",
                    where=f"schema: {place}.weights",
                    remedy="give each a separate column",
                )

    def _check_sources(self) -> None:
        """Check the columns that others are made of."""
        for name in (*self.numeric, *self.categorical):
            options = self.options(name)
            place = f"columns.{toml_key(name)}"
            if self.source(name) == self.label_column:
                raise UserError(
                    f"{self.label_column!r} is the label, and would give itself away as a feature",
                    where="schema",
                    remedy="remove it from numeric and categorical",
                )
            for other in options.cross:
                if other not in self.one_hot or self.options(other).cross:
                    raise UserError(
                        f"{other!r} is not a categorical column with one value per row",
                        where=f"schema: {place}.cross",
                        remedy=f"list it under categorical{did_you_mean(other, self.one_hot)}",
                    )
        if self.weight is not None:
            self._check_weight()
        if self.layout == "criteo" and self.label_rule is not None:
            raise UserError(f"{self.label!r} needs named columns", where="schema: label", remedy='set layout = "table"')

    def _check_weight(self) -> None:
        weight: Any = self.weight
        if not isinstance(weight, str) or not weight:
            raise UserError(f"{weight!r} is not a valid column name", where="schema: weight", remedy="give a text")
        if self.layout != "table":
            raise UserError("only valid for named columns", where="schema: weight", remedy='set layout = "table"')
        if weight in (self.label_column, *self.features_read):
            raise UserError(f"{weight!r} is also label or feature", where="schema: weight", remedy="remove it there")

    @cached_property
    def label_rule(self) -> LabelRule | None:
        """How the label follows from a number; ``None`` where it is a column of 0 and 1."""
        return LabelRule.parse(self.label)

    @property
    def label_column(self) -> str:
        """The column that the label is read from."""
        return self.label if self.label_rule is None else self.label_rule.column

    def source(self, name: str) -> str | None:
        """The column of the table that a column is made of; ``None`` for a cross."""
        options = self.options(name)
        return None if options.cross else options.of or name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All 1 + I + F names in file order: label, numeric, categorical."""
        return (self.label, *self.numeric, *self.categorical)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How many columns of the dense array each numeric column has: 1, or the ``width`` of its lists."""
        return tuple(self.options(name).width or 1 for name in self.numeric)

    @cached_property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the columns of the dense array: those of lists are ``NAME[0]``, ``NAME[1]`` and so on."""
        return dense_names(self.numeric, self.widths)

    def dense_slice(self, name: str) -> slice:
        """The columns of the dense array that a numeric column has."""
        j = self.numeric.index(name)
        start = sum(self.widths[:j])
        return slice(start, start + self.widths[j])

    @cached_property
    def multi_hot(self) -> tuple[str, ...]:
        """The categorical columns that hold lists, in order."""
        return tuple(name for name in self.categorical if self.options(name).list)

    @cached_property
    def one_hot(self) -> tuple[str, ...]:
        """The categorical columns with one value per row, in order."""
        return tuple(name for name in self.categorical if not self.options(name).list)

    @cached_property
    def weighted(self) -> tuple[str, ...]:
        """The list columns whose values carry weights, in order."""
        return tuple(name for name in self.multi_hot if self.options(name).weights is not None)

    @cached_property
    def columns_read(self) -> tuple[str, ...]:
        """All columns that a table with labels must have, the label's first."""
        return (self.label_column, *([] if self.weight is None else [self.weight]), *self.features_read)

    @cached_property
    def features_read(self) -> tuple[str, ...]:
        """The columns that features are made of, and weights of lists: what new rows must have."""
        sources = [self.source(name) for name in (*self.numeric, *self.categorical)]
        ends = [self.options(name).until for name in (*self.numeric, *self.categorical)]
        weights = [self.options(name).weights for name in self.weighted]
        columns = [name for name in (*sources, *ends, *weights) if name is not None and not is_date(name)]
        return tuple(dict.fromkeys(name for name in columns if name != self.label_column))

    def options(self, name: str) -> Column:
        """Return the options of a column.

        Args:
            name: A column of the schema.

        Returns:
            Its options; the defaults where none were given.

        Example:
            >>> from torchrec_deepfm.data.schema import CRITEO_KAGGLE
            >>> CRITEO_KAGGLE.options("C1") == Column()
            True
        """
        return self.columns.get(name, _DEFAULTS)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values; options that have their default are left out.

        Returns:
            A dictionary that ``from_json`` reads back.

        Example:
            >>> from torchrec_deepfm.data.schema import CRITEO_KAGGLE
            >>> Schema.from_json(CRITEO_KAGGLE.to_json()) == CRITEO_KAGGLE
            True
        """
        value: dict[str, Any] = {
            "label": self.label,
            "numeric": list(self.numeric),
            "categorical": list(self.categorical),
            "layout": self.layout,
        }
        for key in ("numeric_transform", "delimiter", "weight"):
            if getattr(self, key) is not None:
                value[key] = getattr(self, key)
        if self.missing != "value":
            value["missing"] = self.missing
        if self.header:
            value["header"] = list(self.header)
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
        return build_schema(value, layout="criteo")


def dense_names(numeric: Sequence[str], widths: Sequence[int]) -> tuple[str, ...]:
    """Name the columns of the dense array.

    Example:
        >>> dense_names(("price", "title"), (1, 2))
        ('price', 'title[0]', 'title[1]')
    """
    return tuple(
        name if width == 1 else f"{name}[{place}]"
        for name, width in zip(numeric, widths, strict=True)
        for place in range(width)
    )


def build_schema(value: Mapping[str, Any], *, layout: str) -> Schema:
    """A schema from parsed JSON or TOML; messages begin with ``schema: KEY: ``."""
    if not isinstance(value, Mapping):
        raise UserError("not a table of keys", where="schema", remedy="give label, numeric and categorical")
    known = tuple(Schema.__dataclass_fields__)
    for key in value:
        if key not in known:
            raise UserError("unknown key", where=f"schema: {toml_key(key)}", remedy=f"choose {one_of(known, key)}")
    for key in ("label", "numeric", "categorical"):
        if key not in value:
            raise UserError(f"{key!r} is missing", where="schema", remedy="give label, numeric and categorical")
    if isinstance(value["label"], list):
        raise UserError(
            f"{value['label']!r} are several, and a model here learns one",
            where="schema: label",
            remedy="name one, and train a model for each",
        )
    if not isinstance(value["label"], str):
        raise UserError(f"{value['label']!r} is not a valid column name", where="schema: label", remedy="give a text")
    for key in ("numeric", "categorical"):
        if not isinstance(value[key], list) or not all(isinstance(name, str) for name in value[key]):
            raise UserError(
                "numeric and categorical must be lists of column names",
                where=f"schema: {key}",
                remedy="give text in [ ]",
            )
    tables = value.get("columns", {})
    if not isinstance(tables, Mapping):
        raise UserError("not a table", where="schema: columns", remedy="write [columns.NAME] and the options below it")
    columns = {name: _column(name, options) for name, options in tables.items()}
    rest = {
        key: value[key]
        for key in ("layout", "numeric_transform", "delimiter", "missing", "weight", "header")
        if key in value
    }
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
            "not a table",
            where=f"schema: columns.{toml_key(name)}",
            remedy="write [columns.NAME] and the options below it",
        )
    known = tuple(Column.__dataclass_fields__)
    for key in options:
        if key not in known:
            raise UserError(
                "unknown option",
                where=f"schema: columns.{toml_key(name)}.{toml_key(key)}",
                remedy=f"choose {one_of(known, key)}",
            )
    try:
        return Column(**options)
    except UserError as error:
        raise UserError(
            error.what, where=f"schema: columns.{toml_key(name)}.{error.where}", remedy=error.remedy
        ) from error

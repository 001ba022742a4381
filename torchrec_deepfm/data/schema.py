"""Which columns a data set has (standard library only).

A table of the user's own will be described by a TOML file; its reader belongs here, beside ``named_schema``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrec_deepfm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a click log: one label, I numeric ones and F categorical ones.

    In raw text they stand in this order. I may be 0, F may not.

    Args:
        label: Name of the 0/1 column.
        numeric: Names of the I numeric columns, in the order of the dense array.
        categorical: Names of the F categorical columns, in the order of the sparse array.

    Raises:
        UserError: A name is empty or used twice, or there is no categorical column.

    Example:
        >>> Schema(label="click", numeric=("price",), categorical=("user", "item")).columns
        ('click', 'price', 'user', 'item')
    """

    label: str
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the names."""
        if not self.categorical:
            raise UserError("schema: no categorical column; name at least one under 'categorical'")
        seen: set[str] = set()
        for name in self.columns:
            if not isinstance(name, str) or not name:
                raise UserError(f"schema: {name!r} is no column name; give every column a non-empty name")
            if name in seen:
                raise UserError(f"schema: column {name!r} appears twice; give every column a name of its own")
            seen.add(name)

    @property
    def columns(self) -> tuple[str, ...]:
        """All 1 + I + F names in file order: label, numeric, categorical."""
        return (self.label, *self.numeric, *self.categorical)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values.

        Returns:
            A dictionary that ``from_json`` reads back.

        Example:
            >>> Schema.from_json(CRITEO_KAGGLE.to_json()) == CRITEO_KAGGLE
            True
        """
        return {"label": self.label, "numeric": list(self.numeric), "categorical": list(self.categorical)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Schema":
        """Build a schema from what ``to_json`` returned.

        Args:
            value: The keys ``label``, ``numeric`` and ``categorical``.

        Returns:
            The schema.

        Raises:
            UserError: A key is missing or of the wrong kind, or the names are no valid schema.
        """
        try:
            label, numeric, categorical = value["label"], value["numeric"], value["categorical"]
        except (KeyError, TypeError) as error:
            raise UserError(f"schema: {error} is missing; give label, numeric and categorical") from error
        if not isinstance(numeric, list) or not isinstance(categorical, list):
            raise UserError("schema: numeric and categorical must be lists of column names")
        return cls(label=label, numeric=tuple(numeric), categorical=tuple(categorical))


def _criteo() -> Schema:
    return Schema(
        label="label",
        numeric=tuple(f"I{i}" for i in range(1, 14)),
        categorical=tuple(f"C{i}" for i in range(1, 27)),
    )


# Both publications of the data have the same columns. They are told apart because their day files and splits differ.
CRITEO_KAGGLE = _criteo()
CRITEO_TERABYTE = _criteo()

_NAMED = {"criteo-kaggle": CRITEO_KAGGLE, "criteo-terabyte": CRITEO_TERABYTE}


def named_schema(name: str) -> Schema:
    """Return a built-in schema.

    Args:
        name: ``criteo-kaggle`` or ``criteo-terabyte``.

    Returns:
        The schema of that name.

    Raises:
        UserError: There is no such schema.

    Example:
        >>> len(named_schema("criteo-kaggle").columns)
        40
    """
    if name not in _NAMED:
        raise UserError(f"--schema: there is no schema {name!r}; choose one of {', '.join(_NAMED)}")
    return _NAMED[name]

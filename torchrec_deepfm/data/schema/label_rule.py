"""A label made of a number: ``rating >= 4``."""

import operator
import re
from dataclasses import dataclass
from typing import Any, Final

_OPERATORS: Final = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_RULE: Final = re.compile(r"(.*?\S)\s*(>=|<=|==|!=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class LabelRule:
    """A comparison of a column with a number; a row for which it holds is a positive one.

    Example:
        >>> LabelRule.parse("rating >= 4")
        LabelRule(column='rating', operator='>=', number=4.0)
        >>> LabelRule.parse("clicked") is None
        True
    """

    column: str
    operator: str
    number: float

    @classmethod
    def parse(cls, label: str) -> "LabelRule | None":
        """Read the label of a schema; ``None`` where it is the name of a column."""
        found = _RULE.fullmatch(label)
        return None if found is None else cls(found[1], found[2], float(found[3]))

    def holds(self, numbers: Any) -> Any:
        """Compare numbers, or a series of them."""
        return _OPERATORS[self.operator](numbers, self.number)

    def __str__(self) -> str:
        """Return the comparison."""
        return f"{self.column} {self.operator} {self.number:g}"

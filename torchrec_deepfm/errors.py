"""The one exception a user of this package is meant to read, and helpers for its message. Standard library only."""

import difflib
import math
from collections.abc import Iterable
from typing import ClassVar


class UserError(ValueError):
    """A mistake in the input, in one line: what, where, and what to do.

    The command line prints the message alone and exits with code 2; in a library call it is an ordinary ``ValueError``.
    Anything else that is raised is a defect of this package and keeps its traceback.

    Attributes:
        what: what is wrong; the whole line where the others are empty.
        where: the file, row, column, key or option.
        remedy: what to do.
        exit_code: of the command line.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, where: object = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, str(where), remedy
        super().__init__(str(self))  # what other libraries show of an exception is its first argument

    def within(self, where: object) -> "UserError":
        """The same error with a place put before its own, by a caller that knows the file, column or option."""
        return UserError(self.what, where=f"{where}: {self.where}" if self.where else where, remedy=self.remedy)

    def __str__(self) -> str:
        """The line."""
        return (f"{self.where}: " if self.where else "") + self.what + (f"; {self.remedy}" if self.remedy else "")


class WorseThanConstantError(UserError):
    """A training has ended, and its model is worse than a constant prediction. The run is complete; exit code 3."""

    exit_code = 3


# Exit codes of a process that ended with one line for the user; a restart would end the same way.
USER_ERROR_EXIT_CODES = (UserError.exit_code, WorseThanConstantError.exit_code)


def flag(field: str) -> str:
    """Return the option of the command line that sets a field: ``--batch-size`` for ``batch_size``."""
    return f"--{field.replace('_', '-')}"


def check_range(field: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuse the number of an option, named by its field, that is out of its range; None is not given."""
    if value is not None and not least <= value <= most:
        what = f"least {least:,}" if value < least else f"most {most:,}"
        raise UserError(f"must be at {what}", where=f"{flag(field)} {value}")


def shown(value: object, most: int = 60) -> str:
    """Write a value that is wrong for a message: its ``repr``, cut to ``most`` characters.

    Example:
        >>> shown([1, "a"]), shown("long" * 100, most=8)
        ("[1, 'a']", "'long...")
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(wrong: object, choices: Iterable[str]) -> str:
    """Hint in parentheses, after a space, at the choice that a mistyped word may stand for; empty if none is close.

    Example:
        >>> did_you_mean("row_wize", ["row_wise", "table_wise"])
        " (did you mean 'row_wise'?)"
    """
    close = difflib.get_close_matches(wrong, list(choices), n=1) if isinstance(wrong, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(choices: Iterable[str], wrong: object) -> str:
    """List what may be given instead of a wrong word, and the closest of it.

    Example:
        >>> one_of(["sgd", "adam"], "adan")
        "one of sgd, adam (did you mean 'adam'?)"
    """
    listed = list(choices)
    return f"one of {', '.join(listed)}{did_you_mean(wrong, listed)}"

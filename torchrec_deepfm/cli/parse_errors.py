"""tyro's parse errors as one line instead of a box."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tyro import _errors as tyro_errors  # private, and the only structured way to them; pinned by our tests

from torchrec_deepfm.errors import UserError


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn tyro's parse errors into ``UserError``, for a command as typed; parse inside.

    A kind of error that is not known here falls through to tyro's own report, which exits with code 2 as well.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        line = _explain(event)
        if line is not None:
            raise UserError(f"{line}", remedy=f"{prog} --help lists the options")

    with tyro_errors.on_parse_error(refuse):
        yield


def _explain(event: tyro_errors.ParseErrorEvent) -> str | None:
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return f"unknown option {event.tokens[0]}"
    if isinstance(event, tyro_errors.MissingArgs):
        if event.unrecognized_tokens:
            return f"unknown option {event.unrecognized_tokens[0]}"
        return f"option {_name(event.missing_arguments[0].arg)} is missing"
    if isinstance(event, tyro_errors.InvalidChoice):
        choices = sorted(set(event.choices) - {"None"})
        return f"option {_name(event.argument)} takes no {event.value!r}; choose one of {', '.join(choices)}"
    if isinstance(event, tyro_errors.BadValue):
        return f"option {_name(event.argument)} lacks a value"
    if isinstance(event, tyro_errors.InstantiationFailure):
        message = _plain(" ".join(event.message.split()))
        return message if event.argument is None else f"option {_name(event.argument)}: {message}"
    return None


def _plain(message: str) -> str:
    """Python's own words for a value that is not a number, in the user's.

    Example:
        >>> _plain("invalid literal for int() with base 10: 'eight'")
        "'eight' is not a whole number"
    """
    found = re.search(r"(int\(\) with base 10|string to float): ('.*')", message)
    if found is None:
        return message
    return f"{found[2]} is not a {'whole ' if found[1].startswith('int') else ''}number"


def _name(argument: Any) -> str:
    return str(argument.lowered.name_or_flags[-1]).rpartition(".")[2]  # a subcommand's own name, without its parent's

"""Small files that a user writes: read whole, with one line about what is wrong. Standard library only."""

import tomllib
from pathlib import Path
from typing import Any

from torchrec_deepfm.errors import UserError


def read_text(path: Path, *, most: int, what: str, instead: str) -> str:
    """Read a text in UTF-8.

    Args:
        path: the file.
        most: bytes that it may have.
        what: what it is, for messages: "schema".
        instead: what to do if it is not there or none, for messages: "name a TOML file".

    Returns:
        The text, without a byte order mark.

    Raises:
        UserError: it can't be read, is larger, or is no UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; {instead}") from error
    except OSError as error:
        raise UserError(f"{path}: this can't be read ({error.strerror}); {instead}") from error
    if len(content) > most:
        raise UserError(f"{path}: larger than {most:,} bytes, which no {what} is; {instead}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save it as UTF-8, or {instead}") from error


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Parse TOML.

    Args:
        path: where the text is from, for messages.
        text: the text; lines may end as on Windows.

    Returns:
        The top table.

    Raises:
        UserError: it is no TOML.
    """
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: this is no TOML ({' '.join(str(error).split())}); correct it there") from error

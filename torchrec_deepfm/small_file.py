"""Small files, read whole and written whole, with one line about what is wrong. Standard library only."""

import errno
import os
import tomllib
from collections.abc import Iterable
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
    except (ValueError, RecursionError) as error:  # a plain ValueError: a number of thousands of digits
        raise UserError(f"{path}: this is no TOML ({' '.join(str(error).split())}); correct it there") from error


def check_target(option: str, path: Path, *, like: str, inputs: Iterable[Path] = ()) -> None:
    """Check that a file may be written, before the work that it is for.

    Args:
        option: the option that names it, for messages: "--output".
        path: the file; one that is there would be replaced.
        like: a name that would do, for messages.
        inputs: files that the work reads or writes besides, which must not be replaced.

    Raises:
        UserError: this is a folder or a device, there is no folder for it, or it is one of the inputs.
    """
    what = ""
    if path.is_dir():
        what = "this is a folder"
    elif path.exists() and not path.is_file():
        what = "this is no regular file"
    elif not path.absolute().parent.is_dir():
        what = "there is no such folder to write it to"
    elif any(path.absolute() == one.absolute() or _same_file(path, one) for one in inputs):
        what = "this command reads or writes that file already"
    if what:
        raise UserError(f"{option} {path}: {what}; name a file, such as {like}")


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def write_text(path: Path, text: str, *, what: str) -> None:
    """Write a file that is there whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        text: what it shall hold, written in UTF-8.
        what: what it is, for messages: "plan".

    Raises:
        UserError: it can't be written.
        UnicodeError: there is half of a surrogate pair in the text.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # /dev/null would be gone for everybody
            raise UserError(f"{path}: the {what} can't be written (no regular file); name another file")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the {what} can't be written ({error.strerror}); name another file") from error

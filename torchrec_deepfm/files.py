"""Small files, read and written as a whole, with one-line errors. Standard library only.

Every file that the package writes is opened with ``regular_file``: a folder may come from another user, and a symbolic
link in it must not redirect a write to another file.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError, shown
from torchrec_deepfm.units import format_bytes

_PARTIAL: Final = re.compile(r"\..*\.[0-9a-f]{16}\.partial", re.DOTALL)
_SEAL: Final = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')
_NOT_PARQUET: Final = frozenset(
    (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".html", ".arrow", ".feather", ".ipc", ".orc", ".gz", ".zst")
)
_UNSEALED: Final = "0" * 64
# pathlib makes one slash of the two in s3://bucket, and one letter before the colon is a drive.
_ADDRESS: Final = re.compile(r"((?:^|::)[A-Za-z][A-Za-z0-9+.-]+:)/+")


def check_local(path: Path) -> Path:
    """Refuse an address such as ``s3://bucket/out`` where only a local file or folder works.

    Taken as a path, it would create a local folder ``s3:``.

    Example:
        >>> check_local(Path("runs/a")).name
        'a'
    """
    if _ADDRESS.search(str(path)):
        address = _ADDRESS.sub(r"\1//", str(path))
        raise UserError(
            "only a local path works here, not an address", where=address, remedy="name a local file or folder"
        )
    return path


def as_path(value: object, what: str) -> Path:
    """Take a path as a caller in Python gives it: text, or an object that has a path.

    Example:
        >>> as_path("runs/a", "a run").name
        'a'
    """
    if isinstance(value, str | os.PathLike) and isinstance(name := os.fspath(value), str):
        return Path(name)
    raise UserError("not a path", where=shown(value), remedy=f"name the folder of {what}")


def check_parquet_name(option: str, path: Path) -> None:
    """Refuse the name of another kind of file for one that will be Parquet."""
    if path.suffix.lower() in _NOT_PARQUET:
        raise UserError(
            "this will be Parquet", where=f"{option} {path}", remedy=f"name it {path.with_suffix('.parquet').name}"
        )


def read_text(path: Path, *, most: int, what: str, instead: str) -> str:
    """Read a UTF-8 text file of at most ``most`` bytes, without a byte order mark."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError as error:
        raise UserError("no such file", where=path, remedy=instead) from error
    except OSError as error:
        raise UserError(f"this can't be read ({error.strerror})", where=path, remedy=instead) from error
    if len(content) > most:
        raise UserError(f"larger than {format_bytes(most)}, not a {what}", where=path, remedy=instead)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not valid UTF-8", where=path, remedy=f"save it as UTF-8, or {instead}"
        ) from error


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Parse TOML."""
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # a plain ValueError: a number of thousands of digits
        raise UserError(
            f"not valid TOML ({' '.join(str(error).split())})", where=path, remedy="correct it there"
        ) from error


def check_target(option: str, path: Path, *, like: str, inputs: Iterable[Path] = ()) -> None:
    """Check that a file, named by ``option``, may be written and is none of the ``inputs``, before the work for it."""
    check_local(path)
    what = ""
    if path.is_dir():
        what = "this is a folder"
    elif path.exists() and not path.is_file():
        what = "this is not a regular file"
    elif not path.absolute().parent.is_dir():
        what = "its folder does not exist"
    elif any(path.absolute() == one.absolute() or _same_file(path, one) for one in inputs):
        what = "this command reads or writes that file already"
    if what:
        raise UserError(what, where=f"{option} {path}", remedy=f"name a file, such as {like}")


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


class NotRegularError(OSError):
    """A FIFO, a device or a socket has the name of a file."""


def regular_file(path: str, flags: int) -> int:
    """Open a regular file and nothing else: an ``opener`` for Python's ``open``.

    A symbolic link is read through, but never written through. A FIFO or a device, on which ``open`` alone could block
    forever, is refused.

    ``flags``: of ``os.open``. Raises ``OSError``: it can't be opened, is not a regular file, or is a symbolic link that
    would be written through.
    """
    writes, name = flags & (os.O_WRONLY | os.O_RDWR), Path(path).name
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and writes:
            raise OSError(errno.ELOOP, f"{name} is a symbolic link", path) from error
        if error.errno == errno.ENXIO:  # a FIFO without a reader
            raise NotRegularError(errno.EINVAL, f"{name} is not a regular file", path) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder", path)
        raise NotRegularError(errno.EINVAL, f"{name} is not a regular file", path)
    return descriptor


def read_bytes(path: Path, *, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes; anything else is an ``OSError``."""
    with open(path, "rb", opener=regular_file) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
    return content


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, even if the machine stops.

    ``path``: the file; an existing one, or a symbolic link of that name, is replaced. Raises ``OSError``: it can't be
    written.
    """
    partial = path.with_name(f".{path.name[:32]}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb", opener=regular_file) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a name is that of a file that ``write_bytes`` left behind when it was killed."""
    return _PARTIAL.fullmatch(name) is not None


def seal(content: Mapping[str, Any]) -> bytes:
    """Serialise a JSON object that ends in its own checksum.

    ``content``: the object; a key ``sha256`` is replaced. Returns JSON whose last key ``sha256`` is the digest of these
    bytes with 64 zeros in place of the digest.

    Example:
        >>> len(json.loads(seal({"rows": 3}))["sha256"])
        64
    """
    keys = {key: value for key, value in content.items() if key != "sha256"}
    text = (json.dumps({**keys, "sha256": _UNSEALED}, indent=2) + "\n").encode()
    return text[: -len(_UNSEALED) - 4] + hashlib.sha256(text).hexdigest().encode() + text[-4:]


def check_seal(content: bytes) -> bool:
    """Check bytes that ``seal`` made against their checksum.

    ``content``: all bytes of the file. Returns false if any of them has changed.

    Example:
        >>> content = seal({"rows": 3})
        >>> check_seal(content), check_seal(content.replace(b"3", b"4", 1))
        (True, False)
    """
    found = _SEAL.search(content)
    if found is None:
        return False
    unsealed = content[: found.start(1)] + _UNSEALED.encode() + content[found.end(1) :]
    return hashlib.sha256(unsealed).hexdigest().encode() == found[1]


def write_text(path: Path, text: str, *, what: str) -> None:
    """Write a file that the user named; it appears complete or not at all.

    Raises ``UnicodeError``: the text holds half of a surrogate pair.
    """
    content = text.encode()
    check_local(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # replacing /dev/null would break every other program
            raise UserError(f"the {what} can't be written (not a regular file)", where=path, remedy="name another file")
        write_bytes(path, content)
    except OSError as error:
        raise UserError(
            f"the {what} can't be written ({error.strerror})", where=path, remedy="name another file"
        ) from error

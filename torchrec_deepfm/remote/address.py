"""Addresses that fsspec knows (``s3://...``, ``memory://...``), and one-line errors of the drivers behind them."""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.registry import known_implementations

from torchrec_deepfm.errors import UserError

# pathlib makes one slash of the two in s3://bucket, and one letter before the colon is a drive.
_ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)/+")
# gcsfs logs the traceback of each error that it raises.
logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)
_CHECK: Final = "check address, network and credentials, then run the same command again"


def address_of(path: str | Path) -> str | None:
    """Return the address that a path stands for; None for a local path.

    Example:
        >>> address_of(Path("s3://bucket/run")), address_of("runs/a")
        ('s3://bucket/run', None)
    """
    text = str(path)
    return None if _ADDRESS.match(text) is None else _ADDRESS.sub(r"\1//", text, count=1).rstrip("/")


def one_line(error: BaseException) -> str:
    r"""Return what an error says, on one line and not too long.

    Example:
        >>> one_line(ValueError("two\nlines"))
        'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def open_address(named: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it.

    UserError: the protocol is unknown, or its driver is not installed or can't connect.
    """
    protocol = named.partition("::")[0].partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(named)
        return filesystem, str(path)
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or known_implementations[protocol]["class"]
        package = driver.partition(".")[0]
        raise UserError(
            f"{protocol}:// needs the package {package}, which is not installed",
            where=named,
            remedy=f"run: pip install {package}",
        ) from error
    except ValueError as error:
        raise UserError(
            one_line(error), where=named, remedy="give a local path or an address that fsspec knows, such as s3://"
        ) from error
    # Some drivers connect at once, and raise errors of their own: pyarrow's over hdfs:// without Java is an OSError.
    except Exception as error:
        java = "libjvm" in str(error) or "libhdfs" in str(error)
        remedy = (
            "set JAVA_HOME and HADOOP_HOME, or copy the file to a disk" if java else "check address and credentials"
        )
        raise UserError(f"{protocol}:// can't be opened ({one_line(error)})", where=named, remedy=remedy) from error


@contextmanager
def reported(where: str) -> Iterator[None]:
    """Report any error of a driver in one line; the driver has tried again by then, as often as it is set to."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("nothing exists at this address", where=where, remedy="check it") from error
    except Exception as error:  # of each driver's own kind: botocore's, aiohttp's, ...
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"can't be reached ({reason})", where=where, remedy=_CHECK) from error


class AddressFile:
    """An opened file of an fsspec file system, whose errors are all ``OSError``: callers handle those of disks."""

    def __init__(self, filesystem: Any, path: str) -> None:
        try:
            self._file = filesystem.open(path, "rb")
        except Exception as error:
            raise as_os_error(error) from error

    def read(self, size: int = -1) -> bytes:
        """Read as a file does."""
        try:
            content: bytes = self._file.read(size)
        except Exception as error:
            raise as_os_error(error) from error
        return content

    def __getattr__(self, name: str) -> Any:
        """Everything else is the file's."""
        return getattr(self._file, name)

    def __enter__(self) -> "AddressFile":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self._file.close()


def as_os_error(error: BaseException) -> BaseException:
    """Convert an error of a driver that is not an ``OSError``, such as botocore's; return others unchanged."""
    drivers = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "azure", "adlfs")
    one: BaseException | None = None if isinstance(error, OSError) else error
    while one is not None:  # adlfs raises a RuntimeError from azure's own
        if type(one).__module__.partition(".")[0] in drivers:
            return OSError(errno.EIO, one_line(one))
        one = one.__cause__
    return error


@contextmanager
def os_errors() -> Iterator[None]:
    """Turn an error of a driver into an ``OSError``."""
    try:
        yield
    except Exception as error:
        found = as_os_error(error)
        if found is error:
            raise
        raise found from error

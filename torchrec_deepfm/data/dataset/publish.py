"""Publishing a finished prepared folder: checksums, digests, and the rename."""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.checksums import file_checksums
from torchrec_deepfm.data.dataset.npy_mmap import map_npy
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_local


def check_free(output: Path) -> None:
    """Check that an output folder does not exist yet, or is empty."""
    check_local(output)
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError("the output folder is not empty", where=output, remedy="name another one or remove it")
    elif output.exists() or output.is_symlink():
        raise UserError("the output exists and is not a folder", where=output, remedy="name another one")


def digest(path: Path) -> dict[str, int | str]:
    """Return the manifest entry of a file: ``bytes`` and ``sha256``."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@dataclass(frozen=True, kw_only=True)
class FileParts:
    """Positions of the parts of an array in its file.

    ``path``: the ``.npy`` file. ``borders``: int64 [parts + 1] bytes from the array's first one on, where a part ends
    and the next one begins.
    """

    path: Path
    header: int
    borders: NDArray[np.int64]
    overlap: int


def find_parts(path: Path, rows: NDArray[np.int64]) -> FileParts:
    """Find the parts of an array in its file. Not thread-safe: numpy parses the header with ``ast``.

    ``path``: the ``.npy`` file. ``rows``: int64 [parts + 1] rows where a part ends and the next one begins, from 0. An
    array with one row more than the last border holds offsets, and each part includes the offset after its last row.
    """
    array = map_npy(path, "prepare the data again")
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return FileParts(
        path=path,
        header=path.stat().st_size - len(array) * row_bytes,
        borders=rows * row_bytes,
        overlap=(len(array) - int(rows[-1])) * row_bytes,
    )


def digest_parts(parts: FileParts) -> tuple[dict[str, int | str], NDArray[np.uint64]]:
    """Return what ``digest`` does of an array's file, and the checksums of its parts, uint64, reading it once."""
    sha256 = hashlib.sha256()
    with parts.path.open("rb") as file:
        sha256.update(file.read(parts.header))
        found = file_checksums(file, parts.borders.tolist(), parts.overlap, sha256.update)
        return {"bytes": file.tell(), "sha256": sha256.hexdigest()}, found


def appear(folder: Path, output: Path) -> None:
    """Give a finished folder its final name."""
    check_free(output)
    folder.rename(output.resolve())


def sync(path: Path) -> None:
    """Sync a written file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Write into a temporary sibling of ``output``, which is renamed at the end.

    Yields the temporary folder. When the block raises, it is removed and ``output`` stays as it was.
    """
    check_free(output)
    output = output.resolve()
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")
    try:
        with disk_errors(output):
            partial.mkdir(parents=True)
            yield partial
            appear(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class OutOfRoomError(UserError):
    """The disk or the memory is full. This is not an error of the input: finished work stays valid."""


@contextmanager
def disk_errors(output: Path, kept: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Report a failed write in one line.

    ``kept``: returns the folder of finished work to resume from, ``None`` if none exists. Raises ``OutOfRoomError``:
    The disk is full, or DuckDB had to stop.
    """

    def resume() -> str:
        folder = kept()
        return "" if folder is None else f"; finished work is kept in {folder}, run the same command to resume"

    try:
        yield
    except (OSError, pl.exceptions.ComputeError) as error:
        number = getattr(error, "errno", None)
        if number is None and (named := re.search(r"\(os error (\d+)\)", str(error))):  # of Polars
            number = int(named[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            raise OutOfRoomError(
                "no space left on the device", where=output, remedy=f"free some or name another output{resume()}"
            ) from error
        if number in (errno.EMFILE, errno.ENFILE):
            raise OutOfRoomError(
                f"{os.strerror(number)}", where=output, remedy=f"raise the limit with ulimit -n{resume()}"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"the folder can't be written ({os.strerror(number)})", where=output, remedy="name another output"
            ) from error
        raise
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        reason = str(error).splitlines()[0]
        raise OutOfRoomError(
            f"DuckDB stopped ({reason})", where=output, remedy=f"free disk, or give more --memory{resume()}"
        ) from error

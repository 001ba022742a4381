"""An .npy file that grows by appending, and that is resumed after its last recorded row.

Not a memory map: its written pages would count as this process's memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from torchrec_deepfm.files import regular_file

# numpy pads a header so that its first axis can grow in place; for our shapes that always makes 128 bytes.
_HEADER_BYTES: Final = 128


class GrowingArray:
    """A C-ordered .npy file whose rows arrive in pieces.

    ``row``: shape of a row: ``(26,)`` for an array [N, 26], ``()`` for one of [N]. ``rows``: number of good rows; the
    rest is truncated.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.npy")
        ...     with GrowingArray(path, (2,), np.int32) as array:
        ...         array.append(np.zeros((3, 2), np.int32))
        ...     np.load(path).shape
        (3, 2)
    """

    def __init__(self, path: Path, row: tuple[int, ...], dtype: DTypeLike, *, rows: int = 0) -> None:
        self._dtype, self._row, self.rows = np.dtype(dtype), row, rows
        self._file = os.fdopen(regular_file(os.fspath(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), "r+b")
        good = _HEADER_BYTES + rows * int(np.prod(row, dtype=np.int64)) * self._dtype.itemsize
        size = os.fstat(self._file.fileno()).st_size
        assert size >= good or rows == 0, (path, size, good)
        self._file.truncate(good)
        self._file.seek(good)

    def __enter__(self) -> "GrowingArray":
        """Return this array."""
        return self

    def append(self, values: NDArray[Any]) -> None:
        """Write rows of the right shape and type at the end."""
        assert values.dtype == self._dtype, values.dtype
        assert values.shape[1:] == self._row, values.shape
        self._file.write(np.ascontiguousarray(values).data)
        self.rows += len(values)

    def flush(self) -> None:
        """Sync all rows to the disk."""
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; write its header unless the block raised."""
        if error is None:
            self._file.seek(0)
            header = {
                "shape": (self.rows, *self._row),
                "fortran_order": False,
                "descr": np.lib.format.dtype_to_descr(self._dtype),
            }
            np.lib.format.write_array_header_1_0(self._file, header)
            assert self._file.tell() == _HEADER_BYTES, self._file.tell()
        self._file.close()


def read_rows(path: Path, row: tuple[int, ...], dtype: DTypeLike, *, piece: int = 1 << 18) -> Iterator[NDArray[Any]]:
    """Read a file that ``GrowingArray`` wrote, at most ``piece`` rows at a time."""
    width = int(np.prod(row, dtype=np.int64))
    with path.open("rb") as file:
        file.seek(_HEADER_BYTES)
        while width and len(values := np.fromfile(file, dtype, piece * width)):
            yield values.reshape(-1, *row)

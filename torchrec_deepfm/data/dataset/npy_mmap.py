"""Numpy arrays on disk, mapped read-only: ``.npy`` files and the members of an uncompressed ``.npz``.

``numpy.load`` can't map a member of an archive, and it does not expose the mapping, which the loader needs to release
pages and to detect a file that shrinks. Pickles are never read.

Shape letters: N rows, E elements per row.
"""

import ctypes
import errno
import mmap
import os
import resource
import struct
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.remote_rows import RemoteFile, chunks_of
from torchrec_deepfm.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip: signature, length of its name and of its extras
_MAX_MEMBERS = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


# Limit of descriptors kept open: fstat takes half the time of stat.
_MOST_DESCRIPTORS = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
_descriptors: set[int] = set()


class FileMap:
    """A whole file, mapped read-only; only the first files mapped keep a file descriptor.

    A folder may have more files than a process may open, and Python's ``mmap`` keeps a descriptor of each (from 3.13 on
    it need not: ``trackfd=False``). The mapping lasts as long as this object, or an array on its ``view``.

    Raises ``OSError``: It is empty, or it can't be mapped.

    Attributes:
        view: Its bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._path = file.name
        stat = os.fstat(file.fileno())
        self._inode = (stat.st_dev, stat.st_ino)
        address = _libc.mmap(None, stat.st_size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._address: int = address
        self._descriptor = os.dup(file.fileno()) if len(_descriptors) < _MOST_DESCRIPTORS else None
        if self._descriptor is not None:
            _descriptors.add(self._descriptor)
        mapped = (ctypes.c_ubyte * stat.st_size).from_address(address)
        # Not at interpreter exit: a thread may still be reading.
        weakref.finalize(mapped, _unmap, address, stat.st_size, self._descriptor).atexit = False
        self.view = memoryview(mapped).cast("B").toreadonly()

    def __len__(self) -> int:
        """Return the size of the file when it was mapped."""
        return len(self.view)

    def is_whole(self) -> bool:
        """Whether the file has kept its size. A file that was replaced or removed stays mapped."""
        try:
            stat = os.stat(self._path if self._descriptor is None else self._descriptor)  # noqa: PTH116
        except FileNotFoundError:
            return True
        return stat.st_size >= len(self) or (stat.st_dev, stat.st_ino) != self._inode

    def advise(self, advice: int, start: int, length: int) -> None:
        """Advise the system how a range that begins at a page will be used."""
        _libc.madvise(self._address + start, min(length, len(self) - start), advice)


class MappedRows:
    """The rows of one array on disk. Rows are copied on request; the array itself stays on disk.

    It can be used where numpy expects an array (``np.asarray``, ``rows[3:5]``).

    ``where``: the name for messages: the file, and the array in it if it holds several.

    Attributes:
        remote: The file at an address that this one is a copy of, with holes; ``None`` for a local file.
    """

    remote: RemoteFile | None = None

    def __init__(
        self, path: Path, where: str, memory: FileMap, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        self.path = path
        self.where = where
        self.dtype = dtype
        self.shape = shape
        self.memory = memory
        self._offset = offset
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self._aligned = offset % dtype.itemsize == 0
        self._array: NDArray[Any] = np.empty(shape, dtype)  # an array without elements has no bytes on disk
        self._take_from = self._array
        if self._array.size:
            self._array = np.frombuffer(memory.view, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
            # Members of a zip are not aligned, and take() would first copy the whole array; it does not with bytes.
            self._take_from = self._array
            if not self._aligned:
                raw = np.frombuffer(memory.view, np.uint8, count=shape[0] * self._row_bytes, offset=offset)
                self._take_from = raw.reshape(shape[0], self._row_bytes)

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the array for numpy, on disk unless a copy or another type is wanted."""
        return np.array(self._array, dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        """Index the array on disk."""
        return self._array[index]

    @property
    def raw(self) -> tuple[memoryview, int, int]:
        """The file's bytes, where the first row begins in them, and the bytes of a row."""
        return self.memory.view, self._offset, self._row_bytes

    def bytes_of(self, start: int, stop: int) -> memoryview:
        """Return the bytes of the rows from ``start`` to one before ``stop``, on disk; fewer where the file ends."""
        return self.memory.view[self._offset + start * self._row_bytes : self._offset + stop * self._row_bytes]

    @property
    def array(self) -> NDArray[Any]:
        """The array on disk, read-only; maybe not aligned."""
        return self._array

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows by number, int64 [n]; more than twice as fast as indexing."""
        copied = self._take_from.take(rows, axis=0)
        return copied if self._aligned else copied.view(self.dtype).reshape(len(rows), *self.shape[1:])

    def stretch(self, start: int, stop: int) -> NDArray[Any]:
        """Copy the neighbouring rows ``[start, stop)``, [stop - start] or [stop - start, E]."""
        return self._array[start:stop].copy()

    @contextmanager
    def ends(self) -> Iterator[None]:
        """Keep the first and the last row on the local disk while they are read."""
        if self.remote is None:
            yield
            return
        chunks = chunks_of(np.array([0, len(self) - 1]))
        with self.remote.copy.held([(self.remote, chunks)]):
            yield

    def check_whole(self) -> None:
        """Check that the file has not become shorter: reading past its end would kill the process by a signal."""
        if not self.memory.is_whole():
            raise UserError(
                "the file became shorter while it was read", where=self.where, remedy="do not change it, start again"
            )

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to read the rows ``[start, stop)`` from the disk soon, without waiting for it."""
        first = self._offset + start * self._row_bytes
        first -= first % mmap.PAGESIZE
        self._advise("MADV_WILLNEED", first, self._offset + stop * self._row_bytes - first)

    def release(self) -> None:
        """Release the file's pages; they stay in the page cache, but no longer count as memory of this process."""
        self._advise("MADV_DONTNEED", 0, len(self.memory))

    def _advise(self, advice: str, start: int, length: int) -> None:
        if hasattr(mmap, advice) and length > 0:  # Linux only
            self.memory.advise(getattr(mmap, advice), start, length)


def _unmap(address: int, length: int, descriptor: int | None) -> None:
    _libc.munmap(address, length)
    if descriptor is not None:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def map_npy(path: Path, remedy: str) -> MappedRows:
    """Map an ``.npy`` file; ``remedy`` ends the message where it can't be used."""
    with _opened(path, remedy) as file:
        return _map(path, str(path), file, _memory(path, file, remedy), 0, path.stat().st_size, remedy)


def map_npz(path: Path, remedy: str) -> Mapping[str, MappedRows]:
    """Map the members of an uncompressed ``.npz``.

    A compressed member is refused: it can't be read row by row, and unpacked it could exceed the memory.

    ``remedy``: what to do if it can't be used; the end of the message. Returns the rows of each array by its name in
    the archive.
    """
    with _opened(path, remedy) as file:
        try:
            members = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"not a complete .npz archive ({_reason(error)})", where=path, remedy=remedy) from error
        if len(members) > _MAX_MEMBERS or len({member.filename for member in members}) < len(members):
            raise UserError(
                f"the archive has two arrays of one name, or more than {_MAX_MEMBERS} arrays", where=path, remedy=remedy
            )
        memory = _memory(path, file, remedy)
        arrays = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            where = f"{path}[{name}]"
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(
                    "the array is compressed and can't be read row by row",
                    where=where,
                    remedy="write the archive with numpy.savez instead of savez_compressed",
                )
            start = _start(memory, member, where, remedy)
            arrays[name] = _map(path, where, file, memory, start, member.file_size, remedy)
        return arrays


def _opened(path: Path, remedy: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise UserError("the file is missing", where=path, remedy=remedy) from error
    except OSError as error:
        what = "raise the limit with ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE) else remedy
        raise UserError(f"the file can't be read ({error.strerror})", where=path, remedy=what) from error


def _memory(path: Path, file: BinaryIO, remedy: str) -> FileMap:
    try:
        return FileMap(file)
    except OSError as error:
        if error.errno == errno.ENOMEM:  # limit of address space, or of the number of mappings
            raise UserError(
                f"the file can't be mapped ({error.strerror})",
                where=path,
                remedy="raise the limit with sysctl vm.max_map_count",
            ) from error
        # An empty file, or one that is not a regular file.
        raise UserError(f"not a complete .npy array ({_reason(error)})", where=path, remedy=remedy) from error


def _start(memory: FileMap, member: zipfile.ZipInfo, where: str, remedy: str) -> int:
    """Position of an uncompressed member's bytes. Only its local header gives the header's length."""
    header = memory.view[member.header_offset : member.header_offset + 30]
    if len(header) == 30:
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        start = int(member.header_offset + 30 + name + extra)
        encrypted = member.flag_bits & 1
        if signature == b"PK\3\4" and start + member.file_size <= len(memory) and not encrypted:
            return start
    raise UserError("not a complete .npz archive (the member lies outside the file)", where=where, remedy=remedy)


def _map(path: Path, where: str, file: BinaryIO, memory: FileMap, start: int, size: int, remedy: str) -> MappedRows:
    file.seek(start)
    try:
        version = npy.read_magic(file)
        if version not in (
            (1, 0),
            (2, 0),
        ):  # 3.0 is for field names outside Latin-1, which arrays of numbers do not have
            raise ValueError(f"version {version} of the format")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    except Exception as error:  # numpy parses the header as Python and passes on every error of the parser
        raise UserError(f"not a complete .npy array ({_reason(error)})", where=where, remedy=remedy) from error
    length = dtype.itemsize
    for extent in shape:
        length *= int(extent)
    offset = file.tell()
    fault = None
    if dtype.hasobject:
        fault = "it holds pickled objects, which are never read"
    elif dtype.kind not in "iuf" or not dtype.isnative:
        fault = f"its type is {dtype}"
    elif len(shape) not in (1, 2) or any(not 0 <= extent < 2**62 for extent in shape):
        fault = f"its shape is {shape}"
    elif fortran_order:
        fault = "it is in Fortran order, store numpy.ascontiguousarray of it"
    elif offset + length > start + size:
        fault = f"{start + size - offset} of {length} bytes"
    if fault is not None:
        raise UserError(f"not a complete .npy array ({fault})", where=where, remedy=remedy)
    return MappedRows(path, where, memory, offset, dtype, tuple(shape))


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

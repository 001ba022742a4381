"""A prepared folder at an address: rows are fetched when they are read, and kept on the local disk up to a limit.

The local copy has every file of the folder, with holes in place of what was not fetched, so that the files are mapped
as those of a local folder. A process has a copy of its own. A chunk is ``CHUNK_ROWS`` neighbouring rows of one array;
its mark, a byte in a file beside the copy, says whether it is there, so that a start after a kill fetches nothing
twice.

Where the copy would exceed its limit, the chunks that were not used since the last time this happened are removed
again. ``held`` keeps those of a request while they are copied.
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import write_bytes
from torchrec_deepfm.remote import cache
from torchrec_deepfm.remote.address import one_line
from torchrec_deepfm.remote.objects import Objects

CHUNK_ROWS: Final = 1024  # a block of the loader's order
_AT_ONCE: Final = 32 << 20  # bytes of a request to the store
_ABSENT, _HERE, _USED = 0, 1, 2
_PUNCH_HOLE: Final = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
_copies: dict[tuple[str, str], "RemoteCopy"] = {}  # of this process, by address and state


class RemoteFile:
    """One array's file in a copy, with the position of its first row and the bytes of a row."""

    def __init__(self, copy: "RemoteCopy", name: str, first: int, row_bytes: int, rows: int) -> None:
        self.copy, self.name = copy, name
        self.first, self.chunk_bytes = first, CHUNK_ROWS * row_bytes
        self.end = first + rows * row_bytes
        self.path = copy.folder / name
        marks = copy.entry / "marks" / name
        chunks = max(-(-rows // CHUNK_ROWS), 1)
        if not marks.exists():
            marks.parent.mkdir(exist_ok=True)
            write_bytes(marks, bytes(chunks))
        # Without memmap's class, which costs time at each access.
        self.marks = np.asarray(np.memmap(marks, np.uint8, "r+", shape=(chunks,)))

    def span(self, chunk: int) -> tuple[int, int]:
        """The bytes of a chunk."""
        start = self.first + chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.end)


class RemoteCopy:
    """The local copy of a prepared folder for this process; ``entry`` is the cache's folder that it lies in."""

    def __init__(self, address: str, manifest: bytes, sizes: Mapping[str, int], version: str) -> None:
        self.address, self._objects = address, Objects(address)
        # Pages that were not written back are lost when the machine restarts, but marks may have been.
        boot = Path("/proc/sys/kernel/random/boot_id")
        key = cache.entry_name("copy", "rows", address, version, boot.read_text() if boot.exists() else "")
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._limit = cache.cache_limit() // local_ranks
        cache.make_room(min(sum(sizes.values()), self._limit), address)
        held = (cache.hold(f"{key}-{slot}", exclusive=True) for slot in count())
        self.entry = next(entry for entry in held if entry is not None)
        self.folder = self.entry / "folder"
        self._whole = self.entry / "whole"
        self._lock, self._request = threading.RLock(), threading.RLock()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._files: dict[str, RemoteFile] = {}
        if not (self.folder / "manifest.json").exists():
            self.folder.mkdir(exist_ok=True)
            self._whole.mkdir(exist_ok=True)
            for name, size in sizes.items():
                with (self.folder / name).open("wb") as file:
                    file.truncate(size)
            write_bytes(self.folder / "manifest.json", manifest)
        self._bytes = cache.used_bytes(self.entry)

    def file(self, name: str, first: int, row_bytes: int, rows: int) -> RemoteFile:
        """Return the file of an array; the same one each time, as marks of one process must agree."""
        if name not in self._files:
            self._files[name] = RemoteFile(self, name, first, row_bytes, rows)
        return self._files[name]

    def whole(self, name: str) -> None:
        """Fetch a whole file, if it is not there yet."""
        mark = self._whole / name
        with self._request:
            if not mark.exists():
                self._objects.fetch([name], self.folder)
                mark.touch()

    def head(self, name: str, length: int) -> None:
        """Fetch the first bytes of a file, where the header of its array is."""
        with self._request:
            size = min(length, (self.folder / name).stat().st_size)
            with (self.folder / name).open("r+b") as file:
                if not file.read(1).strip(b"\0"):
                    (content,) = self._objects.ranges([(name, 0, size)])
                    file.seek(0)
                    file.write(content)

    @contextmanager
    def held(self, wanted: "Wanted") -> Iterator[None]:
        """Fetch those of some chunks that are not there, and keep all of them until the end."""
        while True:
            self._fetch(wanted)
            with self._lock:
                # Another thread may have removed some in between.
                if self._use(wanted):
                    yield
                    return

    def fetch_ahead(self, wanted: "Wanted") -> None:
        """Begin to fetch chunks without waiting; errors are left to whoever reads them."""

        def work() -> None:
            with suppress(UserError):
                self._fetch(wanted)

        self._ahead.submit(work)

    def _use(self, wanted: "Wanted") -> bool:
        """Mark chunks that are there as used; return whether all are."""
        whole = True
        for file, chunks in wanted:
            here = file.marks[chunks] != _ABSENT
            file.marks[chunks[here]] = _USED
            whole = whole and bool(here.all())
        return whole

    def _fetch(self, wanted: "Wanted") -> None:
        spans = [
            (file, first, last)
            for file, chunks in wanted
            for first, last in _runs(chunks[file.marks[chunks] == _ABSENT], max(_AT_ONCE // file.chunk_bytes, 1))
        ]
        while spans:
            piece: list[tuple[RemoteFile, int, int]] = []
            size = 0
            while spans and size < _AT_ONCE:
                piece.append(spans.pop(0))
                size += (piece[-1][2] - piece[-1][1]) * piece[-1][0].chunk_bytes
            self._fetch_piece(piece, wanted)

    def _fetch_piece(self, piece: list[tuple[RemoteFile, int, int]], wanted: "Wanted") -> None:
        """Fetch runs of chunks by one request to the store; the others that are wanted stay."""
        with self._request:
            piece = [one for one in piece if (one[0].marks[one[1] : one[2]] == _ABSENT).any()]
            if not piece:
                return
            parts = [(file.name, file.span(first)[0], file.span(last - 1)[1]) for file, first, last in piece]
            contents = self._objects.ranges(parts)
            with self._lock:
                self._make_room(sum(map(len, contents)), wanted)
                for (file, first, last), (_, start, _), content in zip(piece, parts, contents, strict=True):
                    self._write(file.path, start, content)
                    file.marks[first:last] = _USED

    def _write(self, path: Path, start: int, content: bytes) -> None:
        try:
            with path.open("r+b") as file:
                file.seek(start)
                file.write(content)
        except OSError as error:
            raise UserError(
                f"the cache can't be written ({one_line(error)})",
                where=path,
                remedy=f"free the disk, or lower {cache.LIMIT}",
            ) from error
        self._bytes += len(content)

    def _make_room(self, needed: int, wanted: "Wanted") -> None:
        """Remove the chunks that are not wanted and were not used since the last call that removed any."""
        if self._bytes + needed <= self._limit:
            return
        self._use(wanted)
        for file in self._files.values():
            unused = np.flatnonzero(file.marks == _HERE)
            for first, last in _runs(unused, len(file.marks)):
                start, stop = file.span(first)[0], file.span(last - 1)[1]
                file.marks[first:last] = _ABSENT
                _punch(file.path, start, stop)
            file.marks[file.marks == _USED] = _HERE
        self._bytes = cache.used_bytes(self.entry)


Wanted = Sequence[tuple[RemoteFile, NDArray[np.int64]]]


def chunks_of(rows: NDArray[np.int64] | tuple[int, int]) -> NDArray[np.int64]:
    """The chunks of some rows, or of the rows from one to before another, in any file."""
    if isinstance(rows, tuple):
        start, stop = rows
        return np.arange(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)) if start < stop else np.empty(0, np.int64)
    return np.unique(rows // CHUNK_ROWS)


def open_copy(address: str, manifest_name: str, remedy: str) -> RemoteCopy:
    """Open the copy of a prepared folder; the same one each time in one process.

    ``remedy``: what to do where the address holds no manifest.
    """
    objects = Objects(address)
    entries = objects.entries()
    content = objects.read(manifest_name) if manifest_name in entries else None
    if content is None:
        raise UserError(f"not a prepared folder, {manifest_name} is missing", where=address, remedy=remedy)
    version = "\n".join(f"{name} {one.bytes} {one.version}" for name, one in entries.items())
    if (address, version) not in _copies:
        sizes = {name: one.bytes for name, one in entries.items() if name != manifest_name and "/" not in name}
        _copies[address, version] = RemoteCopy(address, content, sizes, version)
    return _copies[address, version]


def _runs(chunks: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """Join neighbours: (first, one past the last), of at most so many."""
    if not len(chunks):
        return []
    borders = np.flatnonzero(np.diff(chunks) != 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(chunks, borders)]
    return [(at, min(at + most, last)) for first, last in runs for at in range(first, last, most)]


def _punch(path: Path, start: int, stop: int) -> None:
    """Give a range of a file back to the disk; it reads as zeros."""
    with path.open("r+b") as file:
        if _libc.fallocate(file.fileno(), _PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(stop - start)):
            reason = os.strerror(ctypes.get_errno())
            raise UserError(
                f"this file system can't free a part of a file ({reason})",
                where=path,
                remedy=f"name another folder with {cache.FOLDER}, or raise {cache.LIMIT}",
            )

"""The files below one address: listed, fetched and stored. They can't be renamed; one last file completes others."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote.address import open_address, reported

_TRANSFERS: Final = 8  # files at a time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file at an address: its size, and a text that changes with its content where the store gives one."""

    bytes: int
    version: str


class Objects:
    """The files below one address; every error names the address and is one line.

    ``address``: such as ``s3://bucket/run``; need not exist yet.
    """

    def __init__(self, address: str) -> None:
        if "::" in address:
            raise UserError("a chain of addresses can't be used here", where=address, remedy="name the last one alone")
        self.address = address.rstrip("/")
        self._fs, root = open_address(self.address)
        self._root = root.rstrip("/")

    def entries(self) -> dict[str, Entry]:
        """Return all files by name, those of folders below as ``folder/name``; none if nothing is there."""
        with reported(self.address):
            self._fs.invalidate_cache()  # fsspec caches listings
            try:
                found: dict[str, Any] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        versions = ("ETag", "etag", "LastModified", "created", "mtime")
        return {
            path.removeprefix(self._root).lstrip("/"): Entry(
                bytes=int(info["size"] or 0), version=str(next((info[key] for key in versions if info.get(key)), ""))
            )
            for path, info in sorted(found.items())
            if info["type"] == "file"
        }

    def read(self, name: str) -> bytes | None:
        """Return a small file's content; None if it does not exist."""
        with reported(f"{self.address}/{name}"):
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return content

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a local folder under the same names, several at a time."""

        def one(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with reported(f"{self.address}/{name}"):
                self._fs.get_file(self._path(name), str(folder / name))

        _each(one, names)

    def store(self, folder: Path, names: Iterable[str]) -> None:
        """Copy local files to the address under the same names, several at a time; each appears whole or not at all."""

        def one(name: str) -> None:
            with reported(f"{self.address}/{name}"):
                self._fs.put_file(str(folder / name), self._path(name))

        _each(one, names)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that do not exist are left out."""
        for name in names:
            with reported(f"{self.address}/{name}"):
                try:
                    self._fs.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def ranges(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read parts of files, each (name, first byte, one past the last), several at a time and all of them."""
        names, starts, ends = zip(*parts, strict=True)
        with reported(self.address):
            found = self._fs.cat_ranges(
                [self._path(name) for name in names], list(starts), list(ends), on_error="raise"
            )
        for (name, start, end), content in zip(parts, found, strict=True):
            if len(content) != end - start:
                raise UserError(
                    "the file became shorter while it was read",
                    where=f"{self.address}/{name}",
                    remedy="do not change it, start again",
                )
        return list(found)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def _each(work: Any, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise

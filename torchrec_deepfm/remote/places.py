"""What commands take where a folder or file may lie at an address: a local copy to read, or to write and store."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from filelock import FileLock

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote import cache
from torchrec_deepfm.remote.address import address_of
from torchrec_deepfm.remote.names import show_as
from torchrec_deepfm.remote.objects import Entry, Objects

_LOCK_SECONDS: Final = 10.0  # a holder that was just killed may not have ended yet
_copies: dict[Path, Objects] = {}  # local folders of this process by what they are copies of


def fetched(path: Path, wanted: Callable[[str], bool], *, also: Callable[[str], bool] = lambda name: False) -> Path:
    """Return a local folder with the files at an address; a local path is returned as it is.

    A copy is shared by the processes of a host, and serves as long as the files at the address stay the same.

    ``wanted``: whether to copy a file. ``also``: whether to copy one that may change while the copy serves.
    """
    address = address_of(path)
    if address is None:
        return path
    objects = Objects(address)
    found = objects.entries()
    entries = {name: one for name, one in found.items() if wanted(name)}
    state = [f"{name} {one.bytes} {one.version}" for name, one in entries.items()]
    entry = cache.hold(cache.entry_name("copy", address, *state), exclusive=False)
    if entry is None:
        raise UserError("its copy is being removed from the cache", where=address, remedy="run the same command again")
    folder = entry / address.rpartition("/")[2]
    with FileLock(entry / "fetching"):
        if not (entry / "complete").exists():
            cache.make_room(sum(one.bytes for one in entries.values()), address)
            folder.mkdir(exist_ok=True)
            objects.fetch(entries, folder)
            (entry / "complete").touch()
        objects.fetch([name for name in found if also(name)], folder)
    show_as(folder, address)
    _copies[folder] = objects
    return folder


def store_back(path: Path) -> None:
    """Store a file that was written into a folder of ``fetched`` at its address too."""
    for folder, objects in _copies.items():
        if path.is_relative_to(folder):
            objects.store(folder, [path.relative_to(folder).as_posix()])


class Output:
    """A folder or file that a command writes: at a local path, or at an address by way of a local copy.

    What is written to ``local`` becomes visible in the order in which it is stored; readers go by the last file.
    ``address`` is None for a local path. ``kept``: the local copy may hold what exists nowhere else. UserError: the
    ranks do not share a disk.
    """

    def __init__(self, path: Path) -> None:
        self.address = address_of(path)
        self.local = path
        self.kept = True
        self._sent: dict[str, tuple[int, int]] = {}
        if self.address is None:
            return
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
            raise UserError(
                "ranks on several hosts need a folder that all of them see",
                where=f"--output {self.address}",
                remedy="name one, and store it afterwards (train --checkpoints takes an address)",
            )
        self.objects = Objects(self.address)
        self.entry = cache.cache_folder() / cache.entry_name("work", self.address)
        self.local = self.entry / self.address.rpartition("/")[2]
        show_as(self.local, self.address)

    def hold(self) -> bool:
        """Keep the local copy for this process, on the first rank alone; return whether the output is at an address.

        Raises ``UserError``: another process of this host is writing it.
        """
        if self.address is None:
            return False
        until = time.monotonic() + _LOCK_SECONDS
        while cache.hold(self.entry.name, exclusive=True) is None:
            if time.monotonic() > until:
                raise UserError(
                    "another process of this host is writing it",
                    where=f"--output {self.address}",
                    remedy="wait for its end, or name another one",
                )
            time.sleep(0.2)
        return True

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        """Replace the local copy by files from the address."""
        shutil.rmtree(self.local, ignore_errors=True)
        names = [name for name in self.objects.entries() if wanted(name)]
        if names:
            self.objects.fetch(names, self.local)
        self._sent = {name: _state(self.local / name) for name in names}

    def store(self, wanted: Callable[[str], bool], *, last: Iterable[str] = ()) -> None:
        """Store the files that are new or have changed since; those named in ``last`` make the others visible."""
        last = tuple(last)
        changed = {
            name: state
            for name, state in sorted(_files(self.local).items())
            if wanted(name) and self._sent.get(name) != state
        }
        for names in ([name for name in changed if name not in last], [name for name in last if name in changed]):
            self.objects.store(self.local, names)
            self._sent |= {name: changed[name] for name in names}

    def close(self, *, done: bool) -> None:
        """Give the local copy up; with ``done``, or where it holds nothing, it is removed."""
        if self.address is not None:
            empty = not any(path.name != ".lock" for path in self.entry.rglob("*") if not path.is_dir())
            cache.release(self.entry, remove=done or empty or not self.kept)


class FileOutput(Output):
    """A single file."""

    def begin(self) -> None:
        """Fetch what is at the address already."""
        if self.hold() and self.objects.entries():
            self._parent.fetch([self.local.name], self.entry)
            self.kept = False

    def finish(self) -> None:
        """Store the file."""
        if self.address is not None and self.kept:
            self._parent.store(self.entry, [self.local.name])

    @property
    def _parent(self) -> Objects:
        assert self.address is not None
        return Objects(self.address.rpartition("/")[0])


class PreparedOutput(Output):
    """The folder that ``prepare`` writes: its manifest is stored last."""

    def __init__(self, path: Path, manifest: str) -> None:
        super().__init__(path)
        self._manifest = manifest

    def begin(self) -> None:
        """Find out what is at the address already.

        Raises ``UserError``: it holds something that this host did not begin to store.
        """
        if not self.hold():
            return
        entries, manifest = self.objects.entries(), self._manifest
        if manifest in entries:  # for prepare to decide whether this very call has made it
            shutil.rmtree(self.local, ignore_errors=True)
            self.objects.fetch([manifest], self.local)
            for name, one in entries.items():
                if name != manifest:
                    _hole(self.local / name, one)
            self._sent, self.kept = _files(self.local), False
            return
        stored = self._record.read_text().splitlines() if self._record.exists() and self.local.is_dir() else []
        if set(entries) - set(stored):
            raise UserError(
                "it is not empty", where=f"--output {self.address}", remedy="name another one or remove what is there"
            )
        self._sent = {name: _state(self.local / name) for name in stored if name in entries}

    def finish(self) -> None:
        """Store the finished folder; a call that was killed while it did so resumes."""
        if self.address is None:
            return
        for name in sorted(set(_files(self.local)) - {self._manifest}):
            if name not in self._sent:
                with self._record.open("a") as record:  # before it is stored, or the next call would not know it
                    record.write(f"{name}\n")
                self.store(lambda one, name=name: one == name)  # type: ignore[misc]
        self.store(lambda name: name == self._manifest)

    @property
    def _record(self) -> Path:
        return self.entry / "stored"


def _hole(path: Path, entry: Entry) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(entry.bytes)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a folder that are complete, with their states."""
    return {
        path.relative_to(folder).as_posix(): _state(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".partial", ".lock"))
    }


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns

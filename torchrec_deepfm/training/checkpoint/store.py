"""The checkpoints of a run: folders below a path or URL, each complete or invisible, each with checksums.

    step_00000120/            a complete checkpoint
        checkpoint.json       its manifest: step, position, plan, versions, and every other file's size and SHA-256
        .metadata, *.distcp   written by torch.distributed.checkpoint
    step_00000140.partial/    one that is being written

On a local file system a folder is written beside its place and renamed, so a folder without a manifest counts as a
damaged checkpoint. Object stores cannot rename; there the manifest is written last, and a folder without one is an
interrupted save.

Only FileNotFoundError means that something is absent. Any other error of a file system (EIO, ESTALE, EACCES, a lost
network) proves nothing: it ends the command, and nothing is removed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from torchrec_deepfm.distributed.disk_errors import unreadable
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import NotRegularError, check_seal, regular_file, seal, write_bytes
from torchrec_deepfm.remote.address import os_errors

MANIFEST: Final = "checkpoint.json"
FORMAT_VERSION: Final = 1
MANIFEST_LIMIT: Final = 64 * 2**20  # bytes
_NAME = re.compile(r"step_(\d{8,})")
_FILE = re.compile(r"\.?\w[\w.-]*")
_NOT_A_FILE = (IsADirectoryError, NotADirectoryError, NotRegularError)
_HEX = re.compile(r"[0-9a-f]{64}")


class Damaged(Exception):  # noqa: N818 - it describes the checkpoint
    """A checkpoint does not match its manifest; the text names the file."""


def unseal(content: bytes) -> dict[str, Any]:
    """Parse the bytes of a manifest that ``seal`` wrote; Damaged where they are not JSON or their checksum differs."""
    try:
        manifest = json.loads(content.decode("utf-8"), parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not valid JSON") from error
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise Damaged(f"{MANIFEST} has no checksum of its own")
    if not check_seal(content):
        raise Damaged(f"{MANIFEST} is not what was written (its checksum differs)")
    return manifest


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class Store:
    """The checkpoints below one path or URL.

    ``target``: a folder or an fsspec URL (``s3://bucket/run``); need not exist yet.

    Attributes:
        target: as given.
        local: whether it is a folder of this machine's file system.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        try:
            self._fs, self._root = url_to_fs(target)
        except (ValueError, ImportError) as error:  # unknown protocol, or its package is not installed
            raise UserError(
                str(error).splitlines()[0], where=f"--checkpoints {target}", remedy="name a path or an fsspec URL"
            ) from error
        self.local = isinstance(self._fs, LocalFileSystem)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, the newest first; on a local file system also of damaged ones."""
        found = [_NAME.fullmatch(name) for name in self._names()]
        steps = sorted((int(match[1]) for match in found if match), reverse=True)
        return steps if self.local else [step for step in steps if self._is_there(f"{self.path(step)}/{MANIFEST}")]

    def path(self, step: int) -> str:
        """Return the path of a step's checkpoint for fsspec's file system."""
        return f"{self._root}/step_{step:08d}"

    def shown(self, step: int) -> str:
        """Return the path of a step's checkpoint for messages, below ``target``."""
        return f"{self.target.rstrip('/')}/step_{step:08d}"

    def begin(self, step: int) -> str:
        """Return the path, with its protocol, to write the checkpoint of a step to."""
        path = f"{self.path(step)}.partial" if self.local else self.path(step)
        return path if self.local else str(self._fs.unstrip_protocol(path))

    def where(self, step: int) -> str:
        """Return the path, with its protocol, to read the checkpoint of a step from."""
        return self.path(step) if self.local else str(self._fs.unstrip_protocol(self.path(step)))

    def clean(self) -> None:
        """Remove the remains of interrupted saves and removals. Call it before the first save, on one rank."""
        for name in self._names():
            head, _, tail = name.partition(".")
            match = _NAME.fullmatch(head)
            if not match or tail not in ("", "partial", "deleted"):
                continue
            if tail:
                self._discard(f"{self._root}/{name}")
            elif not self._is_there(f"{self._root}/{name}/{MANIFEST}"):
                if self.local:
                    self.set_aside(int(match[1]))
                else:
                    self._discard(f"{self._root}/{name}")

    def commit(self, step: int, files: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
        """Make a checkpoint visible once all its other ``files``, with ``bytes`` and ``sha256``, are written."""
        content = seal({"format_version": FORMAT_VERSION, "step": step, **meta, "files": dict(files)})
        if not self.local:
            with os_errors(), self._fs.open(f"{self.path(step)}/{MANIFEST}", "wb") as file:
                file.write(content)
            return
        partial, final = Path(f"{self.path(step)}.partial"), Path(self.path(step))
        write_bytes(partial / MANIFEST, content)
        _sync_folder(partial)
        # A checkpoint of the same step is the one that this start resumed from: damaged ones are set aside by then.
        replaced = self.set_aside(step) if os.path.lexists(final) else None
        partial.rename(final)
        _sync_folder(final.parent)
        if replaced:
            self._discard(replaced)

    def abandon(self, step: int) -> None:
        """Remove the files of a checkpoint that could not be written."""
        with contextlib.suppress(OSError), os_errors():
            self._discard(f"{self.path(step)}.partial" if self.local else self.path(step))

    def remove(self, step: int) -> None:
        """Remove a checkpoint; if interrupted, its remains do not count as a checkpoint."""
        if self.local:
            gone = f"{self.path(step)}.deleted"
            self._discard(gone)
            Path(self.path(step)).rename(gone)
            self._discard(gone)
            return
        with os_errors():
            self._fs.rm(f"{self.path(step)}/{MANIFEST}")
            self._fs.rm(self.path(step), recursive=True)

    def set_aside(self, step: int) -> str:
        """Rename a checkpoint to ``step_N.refused``, out of the way of the next save of its step; return that path."""
        path, number = self.path(step), 1
        aside = f"{path}.refused"
        while self._is_there(aside):
            number += 1
            aside = f"{path}.refused.{number}"
        self._fs.mv(path, aside, recursive=True)
        return aside

    def forget_newer(self, step: int) -> None:
        """Set aside all checkpoints newer than the one to resume from; all of them are damaged."""
        for newer in self.steps():
            if newer > step:
                self.set_aside(newer)

    def retain(self, keep_last: int, also: Collection[int]) -> None:
        """Remove all but the newest checkpoints."""
        steps = self.steps()
        for step in steps[keep_last:]:
            if step not in also:
                self.remove(step)

    def manifest(self, step: int) -> dict[str, Any]:
        """Read and check the manifest of a checkpoint.

        Returns the manifest; ``files`` holds plain names, sizes and digests. Raises ``Damaged``: it is missing, or not
        the manifest of this checkpoint.
        """
        with self._reading(step, MANIFEST) as file:
            content = file.read(MANIFEST_LIMIT + 1)
        if len(content) > MANIFEST_LIMIT:
            raise Damaged(f"{MANIFEST} is larger than {MANIFEST_LIMIT // 2**20} MiB")
        manifest = unseal(content)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise Damaged(f"{MANIFEST} has format_version {manifest.get('format_version')!r}, not {FORMAT_VERSION}")
        if manifest.get("step") != step:
            raise Damaged(f"{MANIFEST} is of step {manifest.get('step')!r}")
        files = manifest.get("files")
        if not isinstance(files, dict) or not files:
            raise Damaged(f"{MANIFEST} names no files")
        for name, entry in files.items():
            if not _FILE.fullmatch(name) or ".." in name:
                raise Damaged(f"{MANIFEST} names {name!r}, which is not a file of its folder")
            if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
                raise Damaged(f"{MANIFEST} has no size of {name}")
            if not isinstance(entry.get("sha256"), str) or not _HEX.fullmatch(entry["sha256"]):
                raise Damaged(f"{MANIFEST} has no checksum of {name}")
        return manifest

    def verify(self, step: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare files of a checkpoint, all or some, with the manifest.

        Damaged: a file is missing, is not a regular file, or has other bytes. UserError: it can't be read.
        """
        for name, entry in files.items():
            digest, size = hashlib.sha256(), 0
            with self._reading(step, name) as file:
                while block := file.read(4 * 2**20):
                    digest.update(block)
                    size += len(block)
            if size != entry["bytes"]:
                raise Damaged(f"{name} has {size} bytes, {entry['bytes']} were written")
            if digest.hexdigest() != entry["sha256"]:
                raise Damaged(f"{name} is not what was written (its checksum differs)")

    def _names(self) -> list[str]:
        """The names at the root; none if the root does not exist."""
        self._fs.invalidate_cache()
        try:
            with _report_io_errors(self.target):
                entries = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]

    def _is_there(self, path: str) -> bool:
        """Whether a path exists; fsspec's own ``exists`` returns False on every error."""
        try:
            with _report_io_errors(path):
                self._fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @contextlib.contextmanager
    def _reading(self, step: int, name: str) -> Iterator[IO[bytes]]:
        """Open a file of a checkpoint."""
        path = f"{self.path(step)}/{name}"
        try:
            with (
                _report_io_errors(f"{self.shown(step)}/{name}"),
                open(path, "rb", opener=regular_file) if self.local else self._fs.open(path, "rb") as file,
            ):
                yield file
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        except _NOT_A_FILE as error:
            raise Damaged(f"{name} is not a regular file") from error

    def _discard(self, path: str) -> None:
        """Remove a folder with its content; of a link, only the link."""
        if self.local and Path(path).is_symlink():
            Path(path).unlink()
            return
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)


class FinalWeights(Store):
    """The folder of weights that a finished training keeps: a store with one checkpoint, whose step is 0."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder.parent))
        self._folder = folder

    def path(self, step: int) -> str:
        """Return the path of the folder."""
        return str(self._folder.absolute())

    def shown(self, step: int) -> str:
        """Return the path of the folder for messages."""
        return str(self._folder)

    def set_aside(self, step: int) -> str:
        """Remove the folder: it holds the same weights, saved by a run that was killed before its summary."""
        self.remove(step)
        return ""


@contextlib.contextmanager
def _report_io_errors(where: str) -> Iterator[None]:
    """Pass on errors of a missing or irregular file; turn any other one into a UserError."""
    try:
        with os_errors():
            yield
    except (FileNotFoundError, *_NOT_A_FILE):
        raise
    except OSError as error:
        raise unreadable(where, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot sync folders; the files themselves are synced
        pass
    finally:
        os.close(descriptor)

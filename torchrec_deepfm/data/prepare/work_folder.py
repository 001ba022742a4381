"""The folder that an unfinished ``prepare`` works in, beside its output, and the records that it resumes from.

``.NAME.partial/`` holds ``job.json`` (the job), ``out/`` (the future output), ``staged/`` (values without ids
yet) and ``records/`` (finished work). A record is written atomically, after the data it records; work after the last
record is repeated. So a process may be killed anywhere.
"""

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO

import polars as pl

from torchrec_deepfm.data.dataset.publish import OutOfRoomError
from torchrec_deepfm.data.raw.source import Source
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import read_bytes, regular_file, write_bytes
from torchrec_deepfm.units import format_bytes

MAX_RECORD_BYTES: Final = 64 << 20
# Bytes of finished work from which on an error of the input or the options keeps it; less is removed. (Kills and full
# disks always keep finished work.)
WORTH_KEEPING: Final = 64 << 20
# Seconds to wait for the holder of the lock.
LOCK_SECONDS: Final = 5.0
# Of the estimate of the disk space: for vocabularies, spilling and its own error.
MARGIN: Final = 1.15
_HEAD_PIECES: Final = 16


class WorkFolder:
    """Paths and records of one unfinished output; ``out`` will be renamed to it, ``staged`` has no ids yet."""

    def __init__(self, output: Path) -> None:
        output = output.resolve()  # a symbolic link to a folder: beside the folder itself, on its disk
        self.output = output
        self.path = output.with_name(f".{output.name}.partial")
        self.out = self.path / "out"
        self.staged = self.path / "staged"
        # One per process: DuckDB names its files by process id, which two hosts may share.
        self.spill = self.path / "spill" / uuid.uuid4().hex
        self._records = self.path / "records"
        self._locks: list[TextIO] = []

    def enter(self, job: Mapping[str, Any]) -> bool:
        """Take the folder for a job: create it, or resume in it. Returns whether it already had finished work."""
        self._make()
        # A rank that was just killed and restarted may still hold them.
        limit = time.monotonic() + LOCK_SECONDS
        while not (self._lock("lock", fcntl.LOCK_EX) and self._lock("worker", fcntl.LOCK_EX)):
            self.leave()
            if time.monotonic() >= limit:
                raise UserError(
                    "another process is preparing it", where=self.output, remedy="wait for it, or name another output"
                )
            time.sleep(0.05)
        self._locks.pop().close()  # the workers share this one
        shutil.rmtree(self.spill.parent, ignore_errors=True)
        for removed in self.path.parent.glob(f"{self.path.name}.removed-*"):
            shutil.rmtree(removed, ignore_errors=True)
        path = self.path / "job.json"
        if not path.exists():
            write_bytes(path, json.dumps(dict(job)).encode())
            return False
        begun = _read_json(path)
        different = sorted(key for key in {*begun, *job} if begun.get(key) != json.loads(json.dumps(job.get(key))))
        if different:
            raise UserError(
                f"an unfinished prepare of {self.output.name} differs in {', '.join(different)}",
                where=self.path,
                remedy="run it with its own options, or remove this folder to start again",
            )
        if not self.out.is_dir():  # it was renamed to the output, which was removed since
            self.forget("*")
            shutil.rmtree(self.staged, ignore_errors=True)
        for folder in (self.out, self.staged, self._records):
            folder.mkdir(exist_ok=True)
        return True

    def share(self) -> None:
        """Lock the folder for the life of this process; every process calls it after entering."""
        self._lock("worker", fcntl.LOCK_SH)
        self.spill.mkdir(parents=True, exist_ok=True)  # DuckDB makes the last folder of a path only

    def _make(self) -> None:
        try:
            if os.path.ismount(self.output):
                raise UserError(
                    "a mount point can't be created by a rename", where=self.output, remedy="name a folder in it"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = not (self.path / "job.json").exists()
            for folder in (self.out, self.staged, self._records) if fresh or self.out.is_dir() else ():
                folder.mkdir(exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the folder can't be written ({error.strerror})", where=self.output, remedy="name another output"
            ) from error

    def _lock(self, name: str, kind: int) -> bool:
        file = open(self.path / name, "w", encoding="utf-8", opener=regular_file)  # noqa: SIM115 - until leave()
        self._locks.append(file)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # some network file systems have no locks
        return True

    def leave(self) -> None:
        """Release the folder; finished work stays."""
        shutil.rmtree(self.spill, ignore_errors=True)
        while self._locks:
            self._locks.pop().close()

    def record(self, name: str) -> dict[str, Any] | None:
        """Read a record; ``None`` if it does not exist."""
        path = self._records / f"{name}.json"
        return _read_json(path) if path.exists() else None

    def write_record(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a record atomically."""
        write_bytes(self._records / f"{name}.json", json.dumps(content).encode())

    def forget(self, pattern: str) -> None:
        """Remove records."""
        for path in self._records.glob(f"{pattern}.json"):
            path.unlink()

    def begun(self) -> Path | None:
        """The folder if it records any finished piece, else ``None``."""
        return self.path if any(self._records.glob("stage_*.json")) else None

    def worth_keeping(self) -> bool:
        """Whether the finished work exceeds a few seconds."""
        files = (path for folder in (self.out, self.staged) for path in folder.rglob("*") if path.is_file())
        return self.begun() is not None and sum(path.stat().st_size for path in files) >= WORTH_KEEPING

    def remove(self) -> None:
        """Remove the folder, renaming it first, so that nobody resumes from a half of it."""
        removed = self.path.with_name(f"{self.path.name}.removed-{uuid.uuid4().hex}")
        with suppress(OSError):
            self.path.rename(removed)
        self.leave()
        shutil.rmtree(removed, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, most=MAX_RECORD_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the file is damaged ({error})", where=path, remedy=f"remove {path.parent} to start again"
        ) from error
    assert isinstance(content, dict)
    return content


def estimate_bytes(heads: Sequence[tuple[Source, float]], schema: Schema, *, staged: bool, log: bool) -> int:
    """Estimate how much disk a ``prepare`` takes at its peak, the work folder included.

    ``heads``: sources, opened so that their pieces are small, and the multiple of its bytes that each represents.
    ``staged``: whether values are staged on disk for the vocabulary. Returns bytes: 4 for each number, id and label,
    the staged values and numbers, and a margin.
    """
    total = 0.0
    for source, scale in heads:
        rows, values, waiting, done = 0, 0.0, 0, 0.0
        with suppress(UserError):  # errors of a source are raised when it is read
            for count, piece in enumerate(source.pieces(start=0, line=0, skip_bad=True)):
                # Where a file is read in larger blocks than pieces, `done` does not change within a block.
                if count == _HEAD_PIECES or (count and piece.done > done):
                    break
                done = piece.done
                rows += len(piece.frame)
                columns = [name for name in piece.frame.columns if name[0] in "cw"]
                waiting += int(piece.frame.select(columns).estimated_size())
                for name in columns:
                    if isinstance(piece.frame.schema[name], pl.List):
                        length = int(piece.frame[name].list.len().sum() or 0)
                        values += (
                            length + 2 * len(piece.frame) if name.startswith("c") else length
                        )  # 8 bytes per offset
        if not rows:
            continue
        each = 1 + len(schema.dense_names) * (2 if log else 1) + len(schema.one_hot) + values / rows
        total += scale * rows / max(done, 1e-12) * (4 * each + (waiting / rows if staged else 0))
    return int(total * MARGIN)


def check_room(output: Path, needed: int, work: Path) -> None:
    """Check that the output's disk has enough free space besides what the work folder has taken of it."""
    place = output.resolve()
    while not place.exists():
        place = place.parent
    have = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.exists() else 0
    free = shutil.disk_usage(place).free
    if needed - have > free:
        raise OutOfRoomError(
            f"needs about {format_bytes(needed - have)} of disk, {format_bytes(free)} are free",
            where=output,
            remedy="free some, or name an output on another disk",
        )

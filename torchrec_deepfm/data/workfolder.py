"""The folder that an unfinished ``prepare`` works in, beside its output, and the records that it goes on from.

``.NAME.partial/`` holds ``job.json`` (what is being made), ``out/`` (what will be the output), ``staged/`` (values that
wait for their vocabulary) and ``records/`` (what is done). A record is written whole or not at all, after what it
records; whatever lies behind the last record is done again. So a process may be killed anywhere.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from torchrec_deepfm.errors import UserError

# Bytes of finished work that are kept when a mistake in the input or the options stops a prepare. With less, it leaves
# nothing behind. (Kills and full disks always leave what is done.)
WORTH_KEEPING: Final = 64 << 20


class WorkFolder:
    """Paths and records of one unfinished output.

    Args:
        output: The folder that is to appear.

    Attributes:
        path: The work folder.
        out: What will be renamed to the output.
        staged: Values before they have ids.
    """

    def __init__(self, output: Path) -> None:
        output = output.absolute()
        self.output = output
        self.path = output.with_name(f".{output.name}.partial")
        self.out = self.path / "out"
        self.staged = self.path / "staged"
        self.spill = self.path / "spill"
        self._records = self.path / "records"
        self._lock: TextIO | None = None

    def enter(self, job: Mapping[str, Any]) -> bool:
        """Take the folder for a job: make it, or go on in it.

        Args:
            job: JSON values that determine the output.

        Returns:
            Whether there was one already.

        Raises:
            UserError: It belongs to another job, or another process works in it.
        """
        resumed = self.path.is_dir()
        try:
            for folder in (self.path, self.out, self.staged, self._records):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{self.output}: the folder can't be written ({error.strerror}); name another output"
            ) from error
        self._lock = (self.path / "lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.output}: another process is preparing it; wait for it, or name another output"
            ) from error
        path = self.path / "job.json"
        if not path.exists():
            write_json(path, dict(job))
            return resumed
        begun = _read_json(path)
        different = sorted(key for key in {*begun, *job} if begun.get(key) != json.loads(json.dumps(job.get(key))))
        if different:
            raise UserError(
                f"{self.path}: an unfinished prepare of {self.output.name} differs in {', '.join(different)}; "
                "run it with its own options, or remove this folder to begin anew"
            )
        return resumed

    def leave(self) -> None:
        """Let go of the folder; what is done stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def record(self, name: str) -> dict[str, Any] | None:
        """Read a record.

        Args:
            name: Its name.

        Returns:
            Its content, ``None`` where there is none.
        """
        path = self._records / f"{name}.json"
        return _read_json(path) if path.exists() else None

    def write_record(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all.

        Args:
            name: Its name.
            content: JSON values.
        """
        write_json(self._records / f"{name}.json", content)

    def forget(self, pattern: str) -> None:
        """Remove records.

        Args:
            pattern: A glob of their names.
        """
        for path in self._records.glob(f"{pattern}.json"):
            path.unlink()

    def begun(self) -> Path | None:
        """The folder, where any piece of a source is recorded in it; else ``None``."""
        return self.path if any(self._records.glob("stage_*.json")) else None

    def worth_keeping(self) -> bool:
        """Whether more is done than a few seconds' work."""
        files = (path for folder in (self.out, self.staged) for path in folder.rglob("*") if path.is_file())
        return self.begun() is not None and sum(path.stat().st_size for path in files) >= WORTH_KEEPING

    def remove(self) -> None:
        """Remove the folder."""
        self.leave()
        shutil.rmtree(self.path, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a written file to the disk itself.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all, also if the machine stops.

    Args:
        path: The file.
        content: JSON values.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the file is damaged ({error}); remove {path.parent} to begin anew") from error
    assert isinstance(content, dict)
    return content

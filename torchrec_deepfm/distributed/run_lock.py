"""One training at a time in a run folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_local, read_bytes, regular_file
from torchrec_deepfm.launch.processes import is_ending

NAME = ".lock"
# A holder that looks alive may just have been killed, or asked to stop and not have noticed.
SECONDS_FOR_ANY_HOLDER = 5.0
# A restarted rank may come before the kernel, or a network file system's server, has noticed its predecessor's death.
SECONDS_FOR_A_PREDECESSOR = 120.0


class RunLock:
    """A lock on a run folder that ends with its process, in whatever way that ends.

    It is ``flock`` on a file in the folder, so a dead process leaves no stale lock. On NFS (version 4, or 3 with its
    lock daemon) and on Lustre mounted with ``flock`` it holds between hosts too; on a file system without locks the
    training is refused. A holder that is stopping or was killed is waited for, up to two minutes.

    Args:
        folder: the run folder; created if missing, and removed by ``release`` if it is empty then.

    Raises:
        UserError: another training holds the lock, or the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = check_local(folder)
        self._made = not folder.exists()
        path = folder / NAME
        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=self._acquired)
        self._since = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            open(path, "a", opener=regular_file).close()  # refuses a link and a pipe in its place
            self._lock.acquire(poll_interval=0.2, cancel_check=self._check_owner)
        except OSError as error:
            self._remove_empty()
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise UserError(
                    "this file system has no locks, so two trainings could write into one folder",
                    where=f"--output {folder}",
                    remedy="name a folder elsewhere, and --checkpoints for where the checkpoints go",
                ) from error
            reason = f"the folder can't be made or written ({error.strerror})"
            raise UserError(reason, where=f"--output {folder}", remedy="name another one") from error

    def release(self) -> None:
        """Release the lock and remove its file."""
        if not self._lock.is_locked:
            return
        with contextlib.suppress(OSError):
            (self._folder / NAME).unlink()  # while it is held: a process that waits for it then sees it vanish
        self._lock.release()
        self._remove_empty()

    def stopping(self) -> None:
        """Record, for those who wait for the lock, that its holder has been asked to stop."""
        if self._lock.is_locked:
            self._write(stopping=True)

    def _acquired(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._write(stopping=False)

    def _write(self, *, stopping: bool) -> None:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "job": _job(), "stopping": stopping}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(about).encode(), 0)  # one write, as a signal may come at any time

    def _check_owner(self) -> bool:
        """Keep waiting, unless the holder has been waited for long enough."""
        owner = _owner(self._folder / NAME)
        patience = SECONDS_FOR_A_PREDECESSOR if _soon_gone(owner) else SECONDS_FOR_ANY_HOLDER
        if time.monotonic() - self._since >= patience:
            who = f"process {owner.get('pid', '?')} on {owner.get('host', 'another host')}"
            raise UserError(
                f"another training is writing there ({who})",
                where=f"--output {self._folder}",
                remedy="wait for its end, or name another folder",
            )
        return False

    def _remove_empty(self) -> None:
        if self._made:
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def is_held(folder: Path) -> bool:
    """Whether a training is writing to a run folder now, as far as this host's locks show."""
    try:
        with open(folder / NAME, "rb", opener=regular_file) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # mostly: there is no such file
        return False
    return False


def _job() -> str:
    """The id of this torchrun start, the same in all its restarts; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def _soon_gone(owner: dict[str, Any]) -> bool:
    """Whether the lock's holder is this job before a restart, is stopping, or was killed."""
    if owner.get("job") == _job() != "" or owner.get("stopping"):
        return True
    pid = owner.get("pid")
    return owner.get("host") == socket.gethostname() and isinstance(pid, int) and is_ending(pid)


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(read_bytes(path, most=4096))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}

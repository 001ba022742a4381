"""The cache on the local disk: copies of what lies at an address, and work that will be stored there.

Each entry is a folder of the cache. ``copy-...`` holds what can be fetched again; the least recently used ones are
removed where the cache would exceed its limit. ``work-...`` holds what exists nowhere else and is never removed here.
A process keeps the entries that it uses by a lock, which ends with it in whatever way that ends.
"""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import Final, Literal

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.units import format_bytes, parse_bytes

FOLDER: Final = "TORCHREC_DEEPFM_CACHE"
LIMIT: Final = "TORCHREC_DEEPFM_CACHE_LIMIT"
_LOCK: Final = ".lock"
_held: dict[str, int] = {}  # descriptors of the locks of this process, by entry


def cache_folder() -> Path:
    """Return the folder of the cache: that of the environment's ``TORCHREC_DEEPFM_CACHE``, or one in ``~/.cache``."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else Path.home() / ".cache" / "torchrec_deepfm"


def cache_limit() -> int:
    """Return how many bytes copies may take: ``TORCHREC_DEEPFM_CACHE_LIMIT``, by default 50 GB."""
    return parse_bytes(f"{LIMIT}:", os.environ.get(LIMIT) or "50GB")


def entry_name(kind: Literal["copy", "work"], *of: str) -> str:
    """Name the entry of an address, or of one state of it."""
    return f"{kind}-{hashlib.sha256(chr(0).join(of).encode()).hexdigest()[:20]}"


def hold(name: str, *, exclusive: bool) -> Path | None:
    """Create or find an entry and keep it, perhaps alone, for this process; None if another process holds it."""
    folder = cache_folder() / name
    if str(folder) in _held:
        return folder
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:  # not removed in between
                    break
            except BlockingIOError:
                os.close(descriptor)
                return None
            os.close(descriptor)
        os.utime(folder)
    except OSError as error:
        raise UserError(
            f"can't be written ({error.strerror})", where=folder, remedy=f"name another folder with {FOLDER}"
        ) from error
    _held[str(folder)] = descriptor
    return folder


def release(folder: Path, *, remove: bool = False) -> None:
    """Give up an entry that this process holds; nothing happens to others."""
    descriptor = _held.pop(str(folder), None)
    if descriptor is not None:
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def make_room(needed: int, what: str) -> None:
    """Remove the least recently used copies that no process holds, until some more bytes fit under the limit.

    ``what``: the address that needs them. Raises ``UserError``: they are more than the limit.
    """
    if needed > cache_limit():
        raise UserError(
            f"needs {format_bytes(needed)} of the cache, whose limit is {format_bytes(cache_limit())}",
            where=what,
            remedy=f"raise it with {LIMIT}",
        )
    root = cache_folder()
    copies = sorted(root.glob("copy-*"), key=lambda path: path.stat().st_mtime) if root.is_dir() else []
    sizes = {folder: used_bytes(folder) for folder in copies}
    total = sum(sizes.values())
    for folder in copies:
        if total + needed <= cache_limit():
            return
        if str(folder) not in _held and hold(folder.name, exclusive=True) is not None:
            release(folder, remove=True)
            total -= sizes[folder]


def used_bytes(folder: Path) -> int:
    """Return what a folder takes on the disk; files with holes take less than their size."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))

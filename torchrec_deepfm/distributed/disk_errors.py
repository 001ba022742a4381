"""One-line errors for files that a disk refuses to write or read."""

import errno
from pathlib import Path

from torchrec_deepfm.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CONNECTION = "check address, network and credentials"
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def refused(where: str | Path, error: OSError, remedy: str = "") -> UserError:
    """Explain why a file, folder or URL could not be written; ``remedy`` is what to do once the disk is writable.

    Example:
        >>> str(refused("runs/a", OSError(errno.ENOSPC, "No space left on device"), "run the same command again"))
        'runs/a: no space is left on the device; free some, then run the same command again'
    """
    then = f", then {remedy}" if remedy else ""
    if "://" in str(where):
        return UserError(f"can't be written ({_reason(error)})", where=where, remedy=f"{_CONNECTION}{then}")
    if error.errno in _FULL:
        return UserError("no space is left on the device", where=where, remedy=f"free some{then}")
    if error.errno == errno.ELOOP:
        return UserError(
            f"not written through a symbolic link ({error.strerror})", where=where, remedy=f"remove the link{then}"
        )
    if error.errno in _CLOSED:
        return UserError(f"writing is not allowed ({error.strerror})", where=where, remedy=f"make it writable{then}")
    return UserError(f"can't be written ({error.strerror or error})", where=where, remedy=f"check the disk{then}")


def unreadable(where: str | Path, error: OSError) -> UserError:
    """Explain why a file, folder or URL could not be read; it may exist all the same.

    Example:
        >>> str(unreadable("runs/a", OSError(errno.EIO, "Input/output error")))
        "runs/a: can't be read (Input/output error); nothing was changed; check the disk and permissions, then retry"
    """
    check = _CONNECTION if "://" in str(where) else "check the disk and permissions"
    return UserError(
        f"can't be read ({_reason(error)}); nothing was changed", where=where, remedy=f"{check}, then retry"
    )


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split()) or type(error).__name__

"""Processes that start fast and end together: ranks with their launcher, a launcher with the torchx that runs it."""

import ctypes
import gc
import importlib
import os
import sys
from pathlib import Path

# The launcher's process id, for its ranks; torchx's, for the launchers that its scheduler local_cwd starts. Whoever
# reads the first also knows that a launcher prints its last words: plain torchrun does not.
UNDER_LAUNCHER = "TORCHREC_DEEPFM_UNDER_LAUNCHER"
UNDER_TORCHX = "TORCHREC_DEEPFM_UNDER_TORCHX"

_PR_SET_PDEATHSIG = 1  # see prctl(2)
_SIGKILL_IS_PENDING = 1 << 8


def local_world_size() -> int:
    """Return how many ranks the launcher has started on this host; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pod_size() -> int:
    """Return how many hosts share an NVLink domain, as TorchRec's process groups see it; 1 unless the user sets it."""
    return int(os.environ.get("TORCHREC_RESOLVED_POD_SIZE", "1"))


def import_frozen(library: str) -> None:
    """Import a large library without garbage collection, which would search all that it defines again and again.

    Later collections, the one at the end of the process among them, leave it out.
    """
    if library not in sys.modules and gc.isenabled():
        gc.disable()
        try:
            importlib.import_module(library)
        finally:
            gc.freeze()
            gc.enable()


def end_with_parent(parent: str | None, signum: int) -> None:
    """Let the kernel send a signal to this process when its parent ends, ``kill -9`` included. Linux only.

    ``parent``: the parent's process id as it has left it in the environment, None if it has not. Nothing is done below
    another parent, such as a script of the user's in between.
    """
    if parent is None or sys.platform != "linux":
        return
    if os.getppid() == int(parent):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != int(parent) and is_ending(int(parent)):  # it was gone before the kernel knew
        os.kill(os.getpid(), signum)


def is_ending(pid: int) -> bool:
    """Whether a process of this machine has ended, or has been killed and is about to end. Always False off Linux."""
    if sys.platform != "linux":
        return False
    try:
        status = dict(line.partition(":")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"].split()[0] in "ZX" or bool(pending & _SIGKILL_IS_PENDING)

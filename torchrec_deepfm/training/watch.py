"""Watchfulness: data files that vanish or shrink, ranks that stall, memory that runs out.

Arrays are memory-mapped: reading behind the end of a file that has shrunk kills the process (SIGBUS), which no
Python code can stop. So the sizes are looked at before each batch, which takes some microseconds.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchrec_deepfm.errors import UserError

_KEY = "torchrec_deepfm/progress"
_SECONDS_BETWEEN_SIGNS = 1.0


# What gloo says of a rank that is gone. The rank itself, or torchrun, says why.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


class LostPeer(RuntimeError):  # noqa: N818 - it names what happened
    """Another rank has ended in the middle of the training."""


class DataFiles:
    """The arrays of a prepared folder, and their sizes at the start of the training.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._sizes = {str(path): path.stat().st_size for path in sorted(folder.glob("*.np[yz]"))}

    def check(self) -> None:
        """Look whether the files are what they were.

        Raises:
            UserError: one has vanished or has another size.
        """
        for path, size in self._sizes.items():
            try:
                found = os.stat(path).st_size  # noqa: PTH116 - before each batch: half the time of Path.stat
            except OSError as error:
                raise UserError(f"{path}: the file has gone while it was read; put it back, {_ON}") from error
            if found != size:
                raise UserError(
                    f"{path}: the file has changed while it was read, from {size} to {found} bytes; put the old one "
                    f"back, {_ON}"
                )


_ON = "then run the same command again; it resumes from the newest checkpoint, if one was saved"


class Progress:
    """What a rank is doing, for the others to see when they wait for it.

    A thread writes it to the group's store each second. So a rank that has stopped altogether is seen, and one that is
    busy with something else.

    Args:
        timeout: seconds that a rank waits for others; for the message.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._now = ("start", 0)
        self._signs = 0
        self._end = threading.Event()
        self._store: Any = None
        if dist.get_world_size() > 1:
            self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._write()
            threading.Thread(target=self._tell, name="progress", daemon=True).start()

    def at(self, phase: str, step: int) -> None:
        """Say what this rank does now.

        Args:
            phase: what it does, such as ``training``.
            step: at which step.
        """
        self._now = (phase, step)

    def close(self) -> None:
        """Stop telling."""
        self._end.set()

    def stalled(self) -> str | None:
        """Find out which rank the others wait for; takes some seconds.

        Returns:
            A sentence that names it; None if no rank is behind.
        """
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            first = self._all()
            time.sleep(2.5 * _SECONDS_BETWEEN_SIGNS)
            second = self._all()
            alive = [now["signs"] != before["signs"] for before, now in zip(first, second, strict=True)]
            steps = [now["step"] for now in second]
            stopped = [rank for rank, is_alive in enumerate(alive) if not is_alive]
            behind = [rank for rank, step in enumerate(steps) if step < max(steps)]
            reading = [rank for rank, now in enumerate(second) if now["phase"] == "reading data"]
            found = stopped or behind or (reading if len(reading) < len(steps) else [])
            if found:
                others = [rank for rank in range(len(steps)) if rank not in found]
                named = " and ".join(
                    f"rank {rank} (process {second[rank]['pid']} on {second[rank]['host']}, step {steps[rank]}, "
                    f"{second[rank]['phase']}{', gives no sign of life' if rank in stopped else ''})"
                    for rank in found
                )
                return f"{named} kept {_ranks(others)} waiting for {self._timeout:g} s"
        return None

    def _all(self) -> list[dict[str, Any]]:
        return [json.loads(self._store.get(f"{_KEY}/{rank}")) for rank in range(dist.get_world_size())]

    def _write(self) -> None:
        phase, step = self._now
        self._signs += 1
        sign = {"phase": phase, "step": step, "signs": self._signs, "pid": os.getpid(), "host": socket.gethostname()}
        self._store.set(f"{_KEY}/{dist.get_rank()}", json.dumps(sign))

    def _tell(self) -> None:
        while not self._end.wait(_SECONDS_BETWEEN_SIGNS):
            try:
                self._write()
            except (RuntimeError, ValueError):  # the store, or the group, has gone: so will this process
                return


@contextmanager
def explained(progress: Progress) -> Iterator[None]:
    """Say in one line what stopped a training, where that can be told: a rank that stalls, or memory.

    Args:
        progress: of this rank.

    Yields:
        Nothing; train inside.

    Raises:
        UserError: instead of an error of torch that says less.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        phase, step = progress._now
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise UserError(
                f"rank {dist.get_rank()} is out of memory at step {step} ({phase}); lower --batch-size, use more "
                f"ranks, {_ON}"
            ) from error
        if any(words in text for words in _LOST):
            raise LostPeer(
                f"rank {dist.get_rank()} lost its connection to another rank at step {step} ({phase}), which has ended"
            ) from error
        if "timed out" in text.lower() or "timeout" in text.lower():
            stalled = progress.stalled()
            if stalled is not None:
                raise UserError(f"{stalled}; look after it, {_ON}") from error
        raise


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return "all ranks"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

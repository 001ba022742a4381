"""Watchfulness: data files that vanish or shrink, ranks that stall, memory that runs out.

Arrays are memory-mapped: reading behind the end of a file that has shrunk kills the process (SIGBUS), which no
Python code can stop. So the sizes are looked at before each batch, which takes some microseconds.
"""

import contextlib
import json
import os
import socket
import sys
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
# What a step consists of. A step that takes so many times as long as the slowest one so far has stalled.
_STEP = ("training", "reading data")
_TIMES_THE_SLOWEST = 20.0


# What gloo says of a rank that is gone. The rank itself, or torchrun, says why.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


class LostPeer(RuntimeError):  # noqa: N818 - it names what happened
    """Another rank has ended, or stalls, in the middle of the training: a failure that a new start may cure."""


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
_ON_AGAIN = "the ranks start again if --max_restarts allows it, or run the same command again"


def longest_wait(timeout: float) -> float:
    """Seconds that ranks wait for each other where no step sets a pace: at the start, in evaluations and checkpoints.

    Args:
        timeout: seconds after which a step may count as stalled.

    Returns:
        Half an hour, or ``timeout`` if that is longer.
    """
    return max(1800.0, timeout)


class Progress:
    """What a rank is doing, for the others to see when they wait for it; and the end of this one if a rank stalls.

    A thread writes it to the group's store each second, and counts how long this rank has stayed where it is. From half
    of ``timeout`` on it also looks at the others. A rank has stalled if

    - it gives no sign of life for half of ``timeout`` more, whatever it did last;
    - or a step takes longer than ``timeout`` and 20 times the slowest step so far;
    - or anything else takes longer than ``longest_wait``, without an evaluation's next batch.

    The process then ends with exit code 1, a failure that torchelastic starts the ranks again after: the main thread
    waits inside of a collective, where no exception reaches it. Time in which this process was stopped itself does not
    count, so a job that is suspended as a whole goes on as if nothing had happened.

    Args:
        timeout: seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._now = ("start", 0)
        self._waited = self._slowest = 0.0
        self._step_began: float | None = None
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
        now = time.monotonic()
        if phase not in _STEP:
            self._step_began = None
        elif step != self._now[1] or self._step_began is None:
            if self._step_began is not None:
                self._slowest = max(self._slowest, now - self._step_began)
            self._step_began = now
        self._now, self._waited = (phase, step), 0.0

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
            silent = [rank for rank, sign in enumerate(second) if sign["signs"] == first[rank]["signs"]]
            found = silent or _behind(second)
            return self._sentence(found, silent, second) if found else None
        return None

    def _allowed(self) -> float:
        longest = longest_wait(self._timeout)
        if self._now[0] not in _STEP or not self._slowest:
            return longest
        return min(longest, max(self._timeout, _TIMES_THE_SLOWEST * self._slowest))

    def _all(self) -> list[dict[str, Any]]:
        keys = [f"{_KEY}/{rank}" for rank in range(dist.get_world_size())]
        return [json.loads(sign) for sign in self._store.multi_get(keys)]

    def _write(self) -> None:
        phase, step = self._now
        self._signs += 1
        sign = {"phase": phase, "step": step, "signs": self._signs, "pid": os.getpid(), "host": socket.gethostname()}
        sign["overdue"] = self._waited >= self._allowed()
        self._store.set(f"{_KEY}/{dist.get_rank()}", json.dumps(sign))

    def _tell(self) -> None:
        last = time.monotonic()
        looked, seen, silence = 0.0, [], {}  # type: ignore[var-annotated]
        while not self._end.wait(_SECONDS_BETWEEN_SIGNS):
            now = time.monotonic()
            self._waited += min(now - last, 2 * _SECONDS_BETWEEN_SIGNS)
            last = now
            try:
                self._write()
                if self._waited < self._timeout / 2:
                    looked, seen, silence = self._waited, [], {}
                elif self._waited - looked >= self._timeout / 10:
                    signs = self._all()
                    for rank, sign in enumerate(signs):
                        moved = not seen or sign["signs"] != seen[rank]["signs"]
                        silence[rank] = 0.0 if moved else silence[rank] + self._waited - looked
                    looked, seen = self._waited, signs
                    silent = [rank for rank, seconds in silence.items() if seconds >= max(self._timeout / 2, 10.0)]
                    self._judge(signs, silent)
            except (RuntimeError, ValueError):  # the store, or the group, has gone: so will this process
                return

    def _judge(self, signs: list[dict[str, Any]], silent: list[int]) -> None:
        """End this process if a rank has stalled; the first one that finds it says so."""
        behind = _behind(signs)
        if not silent and not any(signs[rank]["overdue"] for rank in behind or range(len(signs))):
            return
        if self._store.add(f"{_KEY}/stalled", 1) == 1:
            sys.stderr.write(f"{self._sentence(silent or behind, silent, signs)}; {_ON_AGAIN}\n")
            sys.stderr.flush()
        os._exit(1)

    def _sentence(self, found: list[int], silent: list[int], signs: list[dict[str, Any]]) -> str:
        if not found:
            return f"the ranks have stayed at step {signs[0]['step']} for {self._waited:.0f} s, and none is behind"
        named = " and ".join(
            f"rank {rank} (process {signs[rank]['pid']} on {signs[rank]['host']}, step {signs[rank]['step']}, "
            f"{signs[rank]['phase']}{', no sign of life' if rank in silent else ''})"
            for rank in found
        )
        others = [rank for rank in range(len(signs)) if rank not in found]
        return f"{named} stalled, and {_ranks(others)} waited {self._waited:.0f} s"


def _behind(signs: list[dict[str, Any]]) -> list[int]:
    """The ranks that the others wait for: fewer steps done, or still reading the data of this one."""
    places = [(sign["step"], sign["phase"] not in _STEP) for sign in signs]  # a step comes before what follows on it
    behind = [rank for rank, place in enumerate(places) if place < max(places)]
    reading = [rank for rank, sign in enumerate(signs) if sign["phase"] == "reading data"]
    return behind or (reading if len(reading) < len(signs) else [])


@contextmanager
def explained(progress: Progress) -> Iterator[None]:
    """Say in one line what stopped a training, where that can be told: a rank that stalls or has ended, or memory.

    Args:
        progress: of this rank.

    Yields:
        Nothing; train inside.

    Raises:
        UserError: out of memory, instead of an error of torch that says less.
        LostPeer: another rank has ended or stalls.
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
                raise LostPeer(f"{stalled}; {_ON_AGAIN}") from error
        raise


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return "all ranks"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

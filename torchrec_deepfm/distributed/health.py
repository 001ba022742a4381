"""Health checks of a training: data files that vanish or shrink, ranks that stall, memory that runs out.

Arrays are memory-mapped: reading past the end of a file that has shrunk kills the process (SIGBUS), which Python
cannot catch. So the sizes are checked before each batch, which takes microseconds.
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

from torchrec_deepfm.distributed.process_group import FAILED, USER_ERROR
from torchrec_deepfm.errors import UserError

_KEY = "torchrec_deepfm/heartbeat"
_SECONDS_BETWEEN_BEATS = 1.0
_BEATS_AFTER_FAILURE = 10
# The phases of a step. A step that takes this many times as long as the slowest one so far may have stalled.
_STEP = ("training", "reading data")
_TIMES_THE_SLOWEST = 20.0


# gloo's messages about a rank that has ended. The rank itself, or torchrun, prints the cause.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


class LostPeer(RuntimeError):  # noqa: N818 - it names what happened
    """Another rank has ended or stalls during the training; a restart of the ranks may help."""


class DataFiles:
    """The arrays of a prepared folder, and their sizes at the start of the training."""

    def __init__(self, folder: Path) -> None:
        self._sizes = {str(path): path.stat().st_size for path in sorted(folder.glob("*.np[yz]"))}

    def check(self) -> None:
        """Check that each file still has its size; a UserError names one that has not."""
        for path, size in self._sizes.items():
            try:
                found = os.stat(path).st_size  # noqa: PTH116 - before each batch: half the time of Path.stat
            except OSError as error:
                raise UserError(
                    "the file has vanished while it was read", where=path, remedy=f"put it back, {_RESUME}"
                ) from error
            if found != size:
                raise UserError(
                    f"the file has changed while it was read, from {size} to {found} bytes",
                    where=path,
                    remedy=f"put the old one back, {_RESUME}",
                )


_RESUME = "then run the same command again; it resumes from the newest checkpoint, if one was saved"
_RESTART = "the ranks start again if --max_restarts allows it, or run the same command again"


def longest_wait(timeout: float) -> float:
    """Seconds that ranks wait for each other outside of steps: half an hour, or ``timeout`` if that is longer."""
    return max(1800.0, timeout)


class Heartbeat:
    """Reports what this rank does to the others, and ends this process if a rank stalls.

    A thread writes a heartbeat to the group's store each second and counts how long this rank stays in one place. After
    half of ``timeout`` it also reads the heartbeats of the others. A rank has stalled if

    - it has had no heartbeat for another half of ``timeout``, in any phase;
    - or a step takes longer than ``timeout`` and 20 times the slowest step so far;
    - or anything else takes longer than ``longest_wait``, without an evaluation's next batch.

    The process then ends with exit code 1, after which torchelastic restarts the ranks: the main thread waits inside a
    collective, where no exception reaches it. Time during which this process itself was stopped does not count, so a
    job that is suspended as a whole simply continues.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._now = ("start", 0)
        self._waited = self._slowest = 0.0
        self._step_began: float | None = None
        self._count = self._failed_beats = 0
        self._end = threading.Event()
        self._store: Any = None
        if dist.get_world_size() > 1:
            self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._write()
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def at(self, phase: str, step: int) -> None:
        """Set what this rank does now, such as ``training``, and at which step."""
        now = time.monotonic()
        if phase not in _STEP:
            self._step_began = None
        elif step != self._now[1] or self._step_began is None:
            if self._step_began is not None:
                self._slowest = max(self._slowest, now - self._step_began)
            self._step_began = now
        self._now, self._waited = (phase, step), 0.0

    def close(self) -> None:
        """Stop the heartbeat."""
        self._end.set()

    def stalled(self) -> str | None:
        """Name the rank that the others wait for in a sentence; None if no rank is behind. Takes some seconds."""
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            first = self._read_all()
            time.sleep(2.5 * _SECONDS_BETWEEN_BEATS)
            second = self._read_all()
            silent = [rank for rank, beat in enumerate(second) if beat["count"] == first[rank]["count"]]
            found = silent or _behind(second)
            return self._describe(found, silent, second) if found else None
        return None

    def _allowed(self) -> float:
        longest = longest_wait(self._timeout)
        if self._now[0] not in _STEP or not self._slowest:
            return longest
        return min(longest, max(self._timeout, _TIMES_THE_SLOWEST * self._slowest))

    def _read_all(self) -> list[dict[str, Any]]:
        keys = [f"{_KEY}/{rank}" for rank in range(dist.get_world_size())]
        return [json.loads(beat) for beat in self._store.multi_get(keys)]

    def _write(self) -> None:
        phase, step = self._now
        self._count += 1
        beat = {"phase": phase, "step": step, "count": self._count, "pid": os.getpid(), "host": socket.gethostname()}
        beat["overdue"] = self._waited >= self._allowed()
        self._store.set(f"{_KEY}/{dist.get_rank()}", json.dumps(beat))

    def _run(self) -> None:
        last = time.monotonic()
        looked, seen, silence = 0.0, [], {}  # type: ignore[var-annotated]
        while not self._end.wait(_SECONDS_BETWEEN_BEATS):
            now = time.monotonic()
            self._waited += min(now - last, 2 * _SECONDS_BETWEEN_BEATS)
            last = now
            try:
                self._write()
                self._end_with_failed_peer()
                if self._waited < self._timeout / 2:
                    looked, seen, silence = self._waited, [], {}
                elif self._waited - looked >= self._timeout / 10:
                    beats = self._read_all()
                    for rank, beat in enumerate(beats):
                        moved = not seen or beat["count"] != seen[rank]["count"]
                        silence[rank] = 0.0 if moved else silence[rank] + self._waited - looked
                    looked, seen = self._waited, beats
                    silent = [rank for rank, seconds in silence.items() if seconds >= max(self._timeout / 2, 10.0)]
                    self._end_if_stalled(beats, silent)
            except (RuntimeError, ValueError):  # the store or the group is gone: this process ends too
                return

    def _end_with_failed_peer(self) -> None:
        """End this process some seconds after a rank has failed.

        A main thread in gloo or Python ends by itself. One that waits inside NCCL would only end by its watchdog.
        """
        if not self._failed_beats and not any(self._store.check([key]) for key in (USER_ERROR, FAILED)):
            return
        self._failed_beats += 1
        if self._failed_beats > _BEATS_AFTER_FAILURE:
            os._exit(UserError.exit_code if self._store.check([USER_ERROR]) else 1)

    def _end_if_stalled(self, beats: list[dict[str, Any]], silent: list[int]) -> None:
        """End this process if a rank has stalled; the first rank that finds it prints a line."""
        behind = _behind(beats)
        if not silent and not any(beats[rank]["overdue"] for rank in behind or range(len(beats))):
            return
        if self._store.add(f"{_KEY}/stalled", 1) == 1:
            sys.stderr.write(f"{self._describe(silent or behind, silent, beats)}; {_RESTART}\n")
            sys.stderr.flush()
        os._exit(1)

    def _describe(self, found: list[int], silent: list[int], beats: list[dict[str, Any]]) -> str:
        if not found:
            return f"the ranks have stayed at step {beats[0]['step']} for {self._waited:.0f} s, and none is behind"
        named = " and ".join(
            f"rank {rank} (process {beats[rank]['pid']} on {beats[rank]['host']}, step {beats[rank]['step']}, "
            f"{beats[rank]['phase']}{', no heartbeat' if rank in silent else ''})"
            for rank in found
        )
        others = [rank for rank in range(len(beats)) if rank not in found]
        return f"{named} stalled, and {_ranks(others)} waited {self._waited:.0f} s"


def _behind(beats: list[dict[str, Any]]) -> list[int]:
    """The ranks that the others wait for: those with fewer steps done, or still reading this step's data."""
    # A step comes before its evaluation and checkpoint.
    places = [(beat["step"], beat["phase"] not in _STEP) for beat in beats]
    behind = [rank for rank, place in enumerate(places) if place < max(places)]
    reading = [rank for rank, beat in enumerate(beats) if beat["phase"] == "reading data"]
    return behind or (reading if len(reading) < len(beats) else [])


@contextmanager
def explained(heartbeat: Heartbeat) -> Iterator[None]:
    """Turn known causes of a failure inside into one line: UserError for memory, LostPeer for a rank that stalls."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        phase, step = heartbeat._now
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise UserError(
                f"rank {dist.get_rank()} is out of memory at step {step} ({phase})",
                remedy=f"lower --batch-size, use more ranks, {_RESUME}",
            ) from error
        if any(words in text for words in _LOST):
            raise LostPeer(
                f"rank {dist.get_rank()} lost its connection to another rank at step {step} ({phase}), which has ended"
            ) from error
        if "timed out" in text.lower() or "timeout" in text.lower():
            stalled = heartbeat.stalled()
            if stalled is not None:
                raise LostPeer(f"{stalled}; {_RESTART}") from error
        raise


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return "all ranks"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

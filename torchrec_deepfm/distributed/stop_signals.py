"""SIGTERM and Ctrl-C: a request to stop that the loop reads, and the exception that it ends in."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun hands Ctrl-C on to its ranks, which the terminal has told already: two signals within this many seconds of
# each other are one press of the key.
ONE_PRESS_SECONDS = 0.5


class Preempted(Exception):  # noqa: N818 - nothing has failed: what was asked for has been done
    """The training was asked to stop, and did; its state is saved.

    Args:
        signum: the signal that asked.
        told: one line for the user.
    """

    def __init__(self, signum: int, told: str) -> None:
        super().__init__(told)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as of a process that the signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signum


class Requests:
    """Whether somebody has asked this process to stop.

    Args:
        noted: called when the first request comes.
    """

    def __init__(self, noted: Callable[[], None]) -> None:
        self.signum = 0
        self._noted = noted
        self._first = 0.0

    def handle(self, signum: int, _frame: FrameType | None = None) -> None:
        """Take note of a signal; leave the process at once on the second Ctrl-C."""
        now = time.monotonic()
        if self.signum and signum == signal.SIGINT and now - self._first > ONE_PRESS_SECONDS:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self._first = signum, now
            self._noted()


@contextmanager
def requests_to_stop(noted: Callable[[], None] = lambda: None) -> Iterator[Requests]:
    """Turn SIGTERM and SIGINT into a request that can be read; outside the main thread this does nothing.

    The first signal is a request. SIGTERM may come again, schedulers repeat it; a second Ctrl-C ends the process at
    once, with nothing saved but what is saved already.

    Args:
        noted: called when the first request comes.

    Yields:
        The requests; ``signum`` is 0 while there is none.
    """
    requests = Requests(noted)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {signum: signal.signal(signum, requests.handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

"""SIGTERM and Ctrl-C: a request to stop that the loop reads, and the exception that it ends in."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun forwards Ctrl-C to its ranks, to which the terminal has sent it already: two signals within this many
# seconds are one press of the key.
ONE_PRESS_SECONDS = 0.5


class Preempted(Exception):  # noqa: N818 - not a failure: the training stopped as requested
    """The training stopped at a signal; its state is saved. ``message`` is one line for the user."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as a shell reports it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signum


class Requests:
    """Whether this process has been asked to stop; ``noted`` is called at the first request."""

    def __init__(self, noted: Callable[[], None]) -> None:
        self.signum = 0
        self._noted = noted
        self._first = 0.0

    def handle(self, signum: int, _frame: FrameType | None = None) -> None:
        """Record a signal; end the process at once on the second Ctrl-C."""
        now = time.monotonic()
        if self.signum and signum == signal.SIGINT and now - self._first > ONE_PRESS_SECONDS:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self._first = signum, now
            self._noted()


@contextmanager
def requests_to_stop(noted: Callable[[], None] = lambda: None) -> Iterator[Requests]:
    """Turn SIGTERM and SIGINT into a request that can be polled; outside the main thread this does nothing.

    The first signal is the request, at which ``noted`` is called. Repeated SIGTERMs change nothing; a second Ctrl-C
    ends the process at once, without saving.
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

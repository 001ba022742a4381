"""Ctrl-C ends a command in one line with exit code 130, wherever it is, imports included. Standard library only.

An exception that is raised in the middle of an import can come out as another one, or crash the interpreter later. So
the handler notes that it was pressed, and ``__main__`` asks for that whatever the command ended with.
"""

import os
import signal
import sys
import time
from types import FrameType
from typing import Final, NoReturn

EXIT_CODE: Final = 128 + signal.SIGINT
# A launcher passes on a Ctrl-C that the terminal has sent to its ranks already: within this time they are one press.
_ONE_PRESS_SECONDS: Final = 0.5
_RESUMED: Final = ("prepare", "train")


class Interrupt:
    """Handles SIGINT unless something else does: a shell ignores it for jobs in the background.

    Attributes:
        pressed: When Ctrl-C was pressed, by the monotonic clock in seconds; 0 while it was not.
    """

    def __init__(self) -> None:
        self.pressed = 0.0
        self._imported = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    def imported(self) -> None:
        """From now on a first press raises KeyboardInterrupt, so that a command can clean up."""
        self._imported = True

    def leave(self) -> NoReturn:
        """Say what happened and end the process, without the interpreter's own end."""
        if os.environ.get("RANK", "0") == "0":
            resume = "; run the same command again to resume" if sys.argv[1:2] and sys.argv[1] in _RESUMED else ""
            os.write(2, f"Interrupted{resume}\n".encode())
        os._exit(EXIT_CODE)

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        before, self.pressed = self.pressed, time.monotonic()
        if not self._imported or (before and self.pressed - before > _ONE_PRESS_SECONDS):
            self.leave()
        if not before:
            raise KeyboardInterrupt

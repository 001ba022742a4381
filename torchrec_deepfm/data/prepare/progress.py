"""Progress of ``prepare``: a bar on a terminal, else a line from time to time."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from tqdm import tqdm

# Seconds between two lines without a terminal.
EVERY: Final = 30.0
_FORMAT: Final = "{desc} {percentage:3.0f}%|{bar:24}| {unit} [{elapsed}, {remaining} left]"


class Phase:
    """One phase of the work, of known size; ``report`` gets lines now and then where no terminal shows a bar."""

    def __init__(self, name: str, total: float, *, done: float = 0.0, report: Callable[[str], None] | None) -> None:
        self._name, self._total, self._done, self._report = name, max(total, 1e-9), done, report
        self._rows, self._first = 0, done
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if report is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self._total, initial=done, desc=name, unit="", bar_format=_FORMAT, leave=False)

    def __enter__(self) -> "Phase":
        """Return this phase."""
        return self

    def add(self, units: float, rows: int) -> None:
        """Report finished work."""
        self._done = min(self._done + units, self._total)
        self._rows += rows
        now = time.monotonic()
        rate = self._rows / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.unit = f"{rate:,.0f} rows/s" if self._rows else ""
            self._bar.update(self._done - self._bar.n)
        elif self._report is not None and now - self._last_line >= EVERY:
            self._last_line = now
            left = (self._total - self._done) * (now - self._started) / max(self._done - self._first, 1e-9)
            self._report(
                f"{self._name} {self._done / self._total:.0%}, {rate:,.0f} rows/s, {tqdm.format_interval(left)} left"
            )

    def shares(self, units: float) -> Callable[[int, float], None]:
        """Return a function that takes rows, and the share of ``units`` that is done after them."""
        before = 0.0

        def add(rows: int, done: float) -> None:
            nonlocal before
            self.add((done - before) * units, rows)
            before = done

        return add

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

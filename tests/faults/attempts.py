"""What the parts of the campaign have in common: runs that are counted, and processes that are waited for."""

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.jobs import GLOBAL_BATCH, ROOT, Job, Lines
from tests.faults.runs import differences, row_errors


class WrongRunError(Exception):
    """A run did not do what it should."""


@dataclass
class Tally:
    """What one part of the campaign has done."""

    faults: Counter[str] = field(default_factory=Counter)
    attempted: int = 0
    equal: int = 0
    lives: int = 0
    failures: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def a_run(self) -> Iterator[None]:
        """Count a run that begins, and note why it failed, if it does."""
        self.attempted += 1
        try:
            yield
        except Exception as error:
            self.failures.append(f"run {self.attempted}: {type(error).__name__}: {error}")

    def compare(self, place: Path, undisturbed: Path, **tolerance: float) -> None:
        """Count a run as equal if it is."""
        found = differences(place / "run", undisturbed, **tolerance)
        found += row_errors(place / "log", epochs=2, global_batch=GLOBAL_BATCH)
        if found:
            raise WrongRunError("; ".join(found))
        self.equal += 1

    @property
    def count(self) -> int:
        """Faults so far."""
        return sum(self.faults.values())


def expect(condition: object, what: str) -> None:
    """Stop this run unless something holds; an ``assert`` that PYTHONOPTIMIZE does not remove."""
    if not condition:
        raise WrongRunError(what[-3000:])


def living_ranks(logs: Path) -> dict[int, int]:
    """Process by rank, of the ranks that have begun to train into this folder and live."""
    found = {}
    for path in sorted(logs.glob("rank_*"), key=lambda path: path.stat().st_mtime):
        _, rank, pid = path.name.split("_")
        if state(int(pid)) not in (None, "Z"):
            found[int(rank)] = int(pid)
    return found


def state(pid: int) -> str | None:
    """A process's state as ps shows it; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def wait_for_ranks(logs: Path, job: "Job | Command", ranks: int, gone: set[int]) -> dict[int, int] | None:
    """The processes of the next life; None if the job ends first."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if job.poll() is not None:
            return None
        found = living_ranks(logs)
        if len(found) == ranks and not gone & set(found.values()):
            return found
        time.sleep(0.01)
    raise WrongRunError(f"no life:\n{job.err[-2000:]}")


class Command(Lines):
    """A command as a user types it: a process of its own, with its ranks below it."""

    def __init__(self, words: list[str], env: dict[str, str], folder: Path) -> None:
        super().__init__(folder)
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self._process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.poll()

    def finish(self, timeout: float = 240) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            raise WrongRunError(f"it hangs:\n{self.err[-2000:]}") from None

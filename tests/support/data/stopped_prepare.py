"""``prepare`` stopped where a kill would stop it; the same call then has to end with the same folder."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from torchrec_deepfm.data.prepare.work_folder import WorkFolder


class StoppedError(BaseException):
    """Not an ``Exception``, so that nobody catches it on the way."""


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its path below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def stopping(at: Callable[[str, dict[str, Any]], bool], *, before: bool = False) -> Iterator[None]:
    """Stop right after, or right before, the first record that is meant is written: ``at(name, record)``."""
    write = WorkFolder.write_record

    def write_and_stop(self: WorkFolder, name: str, record: dict[str, Any]) -> None:
        stop = at(name, record)
        if not (stop and before):
            write(self, name, record)
        if stop:
            raise StoppedError

    with mock.patch.object(WorkFolder, "write_record", write_and_stop):
        yield


def stop_at_each_record(
    run: Callable[[Path], object], output: Path, *, before: bool = False, last: str | None = None
) -> int:
    """Stop ``run(output)`` at each record in turn, and call it again: it ends with the folder of an undisturbed call.

    Of the checksums, a record per file that no other one depends on, only the first and the last are stopped at.
    ``last``: how the name of the last record to stop at begins. Returns how often it was stopped.
    """
    names: list[str] = []
    with stopping(lambda name, _: bool(names.append(name))):  # at none
        run(whole := output.with_name("whole"))
    sums = [number for number, name in enumerate(names) if name.startswith("sum_")]
    stops = [number for number in range(len(names)) if number not in sums[1:-1]]
    if last:
        stops = stops[: next(at for at, number in enumerate(stops) if names[number].startswith(last)) + 1]
    for number in stops:
        written = itertools.count()
        with pytest.raises(StoppedError), stopping(lambda *_, n=number, w=written: next(w) == n, before=before):
            run(output)
        run(output)
        assert content(output) == content(whole), names[: number + 1]
        shutil.rmtree(output)
    shutil.rmtree(whole)
    return len(stops)

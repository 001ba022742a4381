"""``prepare`` stopped where a kill would stop it; the same call then has to end with the same folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

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
    run: Callable[[Path], object], output: Path, *, before: bool = False, checksums: slice = slice(None)
) -> int:
    """Stop ``run(output)`` at each record in turn, and call it again: it ends with the folder of an undisturbed call.

    ``checksums``: at which of the records of checksums, which come last, one per array. Returns how often it was stopped.
    """
    names: list[str] = []
    with stopping(lambda name, _: bool(names.append(name))):
        run(whole := output.with_name("whole"))
    expected = content(whole)
    first = next(number for number, name in enumerate(names) if name.startswith("sum_"))
    assert all(name.startswith("sum_") for name in names[first:])
    stops = [*range(first), *range(first, len(names))[checksums]]
    for number in stops:
        seen: list[str] = []

        def is_next(name: str, _: Any, seen: list[str] = seen, number: int = number) -> bool:
            seen.append(name)
            return len(seen) > number

        try:
            with stopping(is_next, before=before):
                run(output)
        except StoppedError:
            run(output)
        assert seen == names[: number + 1]
        assert content(output) == expected, seen
        shutil.rmtree(output)
    shutil.rmtree(whole)
    return len(stops)

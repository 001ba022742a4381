"""``metrics.jsonl``: a JSON object per line, for some steps of the training or for an evaluation. No torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from msgspec import Struct

from torchrec_deepfm.distributed.disk_errors import refused, unreadable
from torchrec_deepfm.files import regular_file, write_bytes
from torchrec_deepfm.training.run.formats import Count, Seconds, convert

NAME: Final = "metrics.jsonl"
_LINE_LIMIT: Final = 2**20  # bytes


class Record(Struct, kw_only=True):
    """A line; other metrics may follow, by name."""

    step: Count
    split: str
    epoch: Count | None = None
    loss: float | None = None
    lr: dict[str, float] | None = None
    seconds: Seconds | None = None


@dataclass(frozen=True, kw_only=True)
class Log:
    """The content of a file.

    Attributes:
        records: the records.
        lines: the lines that hold them, each with its end.
        damaged: numbers, from 1, of lines that are not records; without a cut last line, which a killed process left.
    """

    records: list[dict[str, Any]]
    lines: list[bytes]
    damaged: list[int]


def open_log(folder: Path) -> IO[str]:
    """Open the file of a run to append lines to it; an ``OSError`` also if it is a link."""
    return open(folder / NAME, "a", encoding="utf-8", buffering=1, opener=regular_file)


def read_log(path: Path) -> Log | None:
    """Read the file; None if it is missing."""
    log = Log(records=[], lines=[], damaged=[])
    try:
        with open(path, "rb", opener=regular_file) as file:
            number = 0
            while line := file.readline(_LINE_LIMIT):
                number += 1
                try:
                    record = json.loads(line.decode("utf-8"))
                    convert(record, Record)
                except (ValueError, RecursionError):
                    if line.endswith(b"\n") or len(line) == _LINE_LIMIT or b"\0" in line:
                        log.damaged.append(number)
                    continue
                log.records.append(record)
                log.lines.append(line if line.endswith(b"\n") else line + b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    return log


def forget_after(folder: Path, step: int, *, evaluated: bool) -> list[str]:
    """Remove the records that a resumed training writes again.

    A file with damaged lines is set aside first.

    ``evaluated``: whether the evaluation after this step is done already. Returns lines for the user about records that
    are lost.
    """
    path, notes = folder / NAME, []
    log = read_log(path)
    if log is None:
        return [f"{path} is missing: the curves up to step {step} are lost"] if step else []
    if log.damaged:
        aside = set_aside(path)
        lines = f"{path}, line {log.damaged[0]}: not a record (lines of that kind: {len(log.damaged)})"
        notes = [f"{lines}; they are left out, and the file is kept as {aside.name}"]
    kept = [
        line
        for record, line in zip(log.records, log.lines, strict=True)
        if record["step"] < step or (record["step"] == step and (record["split"] == "train" or evaluated))
    ]
    try:
        write_bytes(path, b"".join(kept))
    except OSError as error:
        raise refused(path, error, "run the same command again") from error
    return notes


def set_aside(path: Path) -> Path:
    """Rename a file to the first free one of ``NAME.1``, ``NAME.2`` and so on."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{number}")):
        number += 1
    try:
        return path.rename(aside)
    except OSError as error:
        raise refused(path, error, "run the same command again") from error

"""The runs in a folder, one line each: how far they are, and how good. Loads no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_deepfm.distributed import run_lock
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.tracking import metrics_log


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A run as it is listed.

    Attributes:
        run: its folder.
        status: "finished", "running", "stopped" (the same command resumes it) or "damaged".
        step: of its newest record.
        validation_auc: of the finished run, or of the newest evaluation; None if there is none.
        test_auc: of the finished run; None before, or without a test split.
        samples_per_second: of the whole training, or of the newest record.
        started: time of its (last) start; "" in runs of earlier versions.
        problem: why it is damaged; else "".
    """

    run: Path
    status: str
    step: int = 0
    validation_auc: float | None = None
    test_auc: float | None = None
    samples_per_second: float | None = None
    started: str = ""
    problem: str = ""


def list_runs(folder: Path) -> list[RunLine]:
    """List the runs in a folder, also those of several seeds, by name."""
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, remedy="name the folder that holds the runs")
    found = [_line(run) for run in _runs_in(folder)]
    if not found:
        raise UserError("the folder holds no run", where=folder, remedy="name the parent folder of a train --output")
    return found


def text(lines: Sequence[RunLine]) -> str:
    """Format runs as a table."""
    head = ("run", "status", "step", "validation AUC", "test AUC", "samples/s", "started")
    rows = [
        (
            str(one.run), one.status, f"{one.step:,}", _figure(one.validation_auc, ".5f"), _figure(one.test_auc, ".5f"),
            _figure(one.samples_per_second, ",.0f"), one.started or "-",
        )
        for one in lines
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left = {0, 1, 6}
    shown = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([*shown, *(one.problem for one in lines if one.problem)])


def _figure(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _runs_in(folder: Path) -> Iterator[Path]:
    for path in sorted([folder, *folder.iterdir()]):
        if (path / run_folder.CONFIG).is_file():
            yield path
        elif path != folder and path.is_dir():
            yield from (one for one in run_folder.seed_folders(path).values() if (one / run_folder.CONFIG).is_file())


def _line(run: Path) -> RunLine:
    try:
        config = run_folder.read_config(run, "train again")
        summary = run_folder.read_summary(run)
        log = metrics_log.read_log(run / metrics_log.NAME)
    except UserError as error:
        return RunLine(run=run, status="damaged", problem=str(error))
    records = log.records if log else []
    started = config.machine.get("started", "")
    if summary is not None:
        return RunLine(
            run=run, status="finished", step=summary["steps"], validation_auc=_auc(summary, "validation"),
            test_auc=_auc(summary, "test"), samples_per_second=summary["samples_per_second"], started=started,
        )  # fmt: skip
    steps = [one for one in records if one["split"] == "train"]
    evaluations = [one for one in records if one["split"] == "validation"]
    return RunLine(
        run=run,
        status="running" if run_lock.is_held(run) else "stopped",
        step=max((one["step"] for one in records), default=0),
        validation_auc=evaluations[-1].get("auc") if evaluations else None,
        samples_per_second=steps[-1].get("samples_per_second") if steps else None,
        started=started,
    )


def _auc(summary: dict[str, Any], split: str) -> float | None:
    return (summary.get(split) or {}).get("auc")

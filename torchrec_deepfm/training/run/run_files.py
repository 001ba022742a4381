"""All that a run's folder records of its training, read for reports. Loads no torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.plan.io import load_plan
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.formats import CalibrationFile, CurvesFile, DataFile, ImportanceFile, RunFile
from torchrec_deepfm.training.run.tracking import metrics_log

CALIBRATION: Final = "calibration.json"
CURVES: Final = "curves.json"
IMPORTANCE: Final = "importance.json"
_NO_REPORT: Final = "no report can be made of this run"


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run; what it does not have, or earlier versions did not write, is None or empty."""

    folder: Path
    config: RunFile
    summary: Mapping[str, Any] | None
    plan: PlanFile | None
    records: Sequence[Mapping[str, Any]]
    calibration: Mapping[str, Sequence[Mapping[str, float]]]
    curves: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any] | None
    importance: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The folder's name as text."""
        return os.fsencode(self.folder.resolve().name).decode("utf-8", "replace")

    @property
    def shown_folder(self) -> str:
        """The folder's path as text."""
        return os.fsencode(self.folder).decode("utf-8", "replace")

    @property
    def train_records(self) -> list[Mapping[str, Any]]:
        """The records of training steps."""
        return [record for record in self.records if record["split"] == "train"]

    @property
    def samples_per_step(self) -> int:
        """Samples per step of all ranks, if these did not change."""
        return self.config.world_size * int(self.config.config.get("batch_size", 1))

    @property
    def entropy(self) -> float | None:
        """The loss of the best constant prediction on the validation or the test split; None if unknown."""
        for record in self.records:
            if record["split"] in ("validation", "test") and record.get("ne"):
                return float(record["logloss"]) / float(record["ne"])
        return None


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run, finished or not."""
    config = run_folder.read_config(folder, _NO_REPORT)

    def read(name: str, kind: type[Any]) -> dict[str, Any] | None:
        found = run_folder.read_file(folder / name, kind, _NO_REPORT)
        return None if found is None else found[0]

    return RunFiles(
        folder=folder,
        config=config,
        summary=run_folder.read_summary(folder, _NO_REPORT),
        plan=load_plan(folder / run_folder.PLAN) if (folder / run_folder.PLAN).exists() else None,
        records=_records(folder / metrics_log.NAME),
        calibration=(read(CALIBRATION, CalibrationFile) or {}).get("splits", {}),
        curves=(read(CURVES, CurvesFile) or {}).get("splits", {}),
        data=read(run_folder.DATA, DataFile),
        importance=read(IMPORTANCE, ImportanceFile),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """The complete lines; the last one of a running training may be cut."""
    log = metrics_log.read_log(path)
    if log is None:
        return []
    if log.damaged:
        raise UserError(
            "not a record of a training; restore the file", where=f"{path}, line {log.damaged[0]}", remedy=_NO_REPORT
        )
    return log.records

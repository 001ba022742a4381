"""Gives a run to TorchX's trackers, where the job has any (`--tracker` of the component, or `.torchxconfig`)."""

import os
from pathlib import Path
from typing import Any

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig

_ARTIFACTS = {"weights": "checkpoint", "encoder": "encoder", "plan": "plan.json", "report": "report.html"}


def job_tracker() -> Any:
    """Open the trackers of this job as TorchX's ``AppRun``; None where the job has no trackers."""
    if not os.environ.get("TORCHX_TRACKERS"):
        return None
    from torchx.tracker import app_run_from_env

    try:
        return app_run_from_env()
    except Exception as error:  # whatever a tracker raises: fsspec's asserts that its folder exists
        config = os.environ.get("TORCHX_TRACKER_FSSPEC_CONFIG", "")
        raise UserError(
            f"TorchX's tracker cannot be opened ({error})",
            where=f"--tracker {config}",
            remedy="the file holds protocol= and root_path=, and that folder must exist",
        ) from error


def track(tracker: Any, folder: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """Record options, figures and files of a finished run; figures of splits become ``validation_auc`` and the like.

    UserError: the tracker does not take them; the run itself is complete.
    """
    if tracker is None:
        return
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    figures: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            figures |= {f"{name}_{key}": one for key, one in value.items() if isinstance(one, int | float)}
        elif isinstance(value, int | float):
            figures[name] = value
    try:
        tracker.add_metadata(**options, **{name: value for name, value in figures.items() if name not in options})
        for name, file in _ARTIFACTS.items():
            if (folder / file).exists():
                tracker.add_artifact(name, str((folder / file).absolute()))
    except Exception as error:
        raise UserError(
            f"the run is complete, but TorchX's tracker has not taken it ({error})", where=folder
        ) from error

"""Shows a training in MLflow and Weights & Biases while it runs (``train --watch mlflow wandb``). Rank 0 only.

Servers, keys and projects come from the variables of the packages (``MLFLOW_TRACKING_URI``, ``WANDB_MODE`` and others).
A training that resumes continues its run there: ``watched.json`` in the run folder has their ids.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import read_bytes, write_bytes
from torchrec_deepfm.training.config import TrainConfig

IDS: Final = "watched.json"
_PROJECT: Final = "torchrec_deepfm"


class Watcher(Protocol):
    """A run in a service. Any method may raise what the service's package raises."""

    id: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""

    def close(self, *, finished: bool) -> None:
        """End the run, or leave it to be continued."""


class MLflowWatcher:
    """A run of MLflow, new or continued, by its client: no run of the process is changed."""

    def __init__(self, folder: Path, options: Mapping[str, Any], run_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=folder.name, tags={"folder": str(folder.absolute())})
            run_id = str(run.info.run_id)
            self._client.log_batch(run_id, params=[Param(name, str(value)) for name, value in options.items()])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.id = run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, *, finished: bool) -> None:
        """End the run."""
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class WandbWatcher:
    """A run of Weights & Biases, new or continued; its files are in the run folder, or in ``WANDB_DIR``."""

    def __init__(self, folder: Path, options: Mapping[str, Any], run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id,
            name=folder.name,
            config=dict(options),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # A training that resumes repeats steps, which Weights & Biases' own counter does not allow.
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        self._run.log({"step": step, **values})

    def close(self, *, finished: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if finished else 1)


KINDS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Watcher]] = {
    "mlflow": MLflowWatcher,
    "wandb": WandbWatcher,
}


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of some services are there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                "its package is not installed",
                where=f"--watch {name}",
                remedy=f"pip install 'torchrec_deepfm[{name}]'",
            )


def open_watchers(names: Sequence[str], folder: Path, config: TrainConfig, *, resumed: bool) -> list[Watcher]:
    """Begin a run in each service, or continue it where the training has resumed."""
    ids: dict[str, str] = {}
    if resumed and (folder / IDS).exists():
        ids = json.loads(read_bytes(folder / IDS, most=1 << 16))
    opened: list[Watcher] = []
    for name in names:
        try:
            watcher = KINDS[name](folder, vars(config), ids.get(name))
        except Exception as error:  # whatever a package raises
            for one in opened:
                one.close(finished=False)
            raise UserError(
                f"cannot be opened ({' '.join(str(error).split())})",
                where=f"--watch {name}",
                remedy="check its server, key and network, or leave it out",
            ) from error
        opened.append(watcher)
        ids[name] = watcher.id
    if opened:
        write_bytes(folder / IDS, json.dumps(ids).encode())
    return opened

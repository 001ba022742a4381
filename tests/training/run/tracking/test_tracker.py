"""A run in TorchX's fsspec tracker, read back by TorchX's own classes and command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.tracker.api import AppRun
from torchx.tracker.backend.fsspec import create

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run.tracking.tracker import job_tracker, track

JOB = "local_cwd://torchx/deepfm-train-1"


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What TorchX's runner gives a job whose component has ``--tracker``."""
    file = tmp_path / "tracker.conf"
    file.write_text(f"protocol=file\nroot_path={tmp_path}/tracked\n")
    monkeypatch.setenv("TORCHX_JOB_ID", JOB)
    monkeypatch.setenv("TORCHX_TRACKERS", "fsspec")
    monkeypatch.setenv("TORCHX_TRACKER_FSSPEC_CONFIG", str(file))
    AppRun.run_from_env.cache_clear()
    return file


def test_options_figures_and_files_come_back(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "tracked").mkdir()
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "report.html").touch()
    summary = {"validation": {"auc": 0.75, "logloss": 0.5}, "steps": 30, "weights": {"own": "last"}, "warnings": []}
    track(job_tracker(), run, TrainConfig(factor_dim=7), summary)
    tracker = create(str(config_file))
    assert list(tracker.run_ids()) == [JOB]
    found = tracker.metadata(JOB)
    assert (found["factor_dim"], found["validation_auc"], found["validation_logloss"], found["steps"]) == (
        7,
        0.75,
        0.5,
        30,
    )
    assert {name: one.path for name, one in tracker.artifacts(JOB).items()} == {
        "weights": str(run / "checkpoint"),
        "report": str(run / "report.html"),
    }
    (tmp_path / ".torchxconfig").write_text(f"[torchx:tracker]\nfsspec=\n[tracker:fsspec]\nconfig={config_file}\n")
    words = [Path(sys.executable).parent / "torchx", "tracker", "list", "metadata", JOB]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert ["validation_auc", "0.75"] in [line.split() for line in shown.splitlines()]


def test_a_tracker_that_cannot_be_opened_is_refused_before_the_training(config_file: Path) -> None:
    with pytest.raises(UserError, match=rf"--tracker {config_file}: .*'.*/tracked' to exist.* root_path=") as error:
        job_tracker()
    assert "\n" not in str(error.value)


def test_a_job_without_trackers_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHX_TRACKERS", raising=False)
    assert job_tracker() is None
    track(None, tmp_path, TrainConfig(), json.loads("{}"))

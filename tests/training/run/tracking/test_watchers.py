"""Curves in MLflow and Weights & Biases: read back by their own packages, where these are installed."""

import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import make_data, records
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run.tracking import watchers

CONFIG = TrainConfig(factor_dim=7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "data").folder


class Recorder:
    """A service that keeps everything, and refuses points after some step."""

    breaks_after = 1 << 30
    opened: list["Recorder"]

    def __init__(self, folder: Path, options: Mapping[str, Any], run_id: str | None) -> None:
        self.id, self.options, self.points = run_id or f"new {len(self.opened)}", options, {}
        self.finished: bool | None = None
        self.opened.append(self)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step > self.breaks_after:
            raise OSError("the server\nis gone")
        self.points |= {(name, step): value for name, value in values.items()}

    def close(self, *, finished: bool) -> None:
        self.finished = finished


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "opened", [], raising=False)
    monkeypatch.setattr(watchers, "KINDS", {"mlflow": Recorder})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return Recorder


def train(data: Path, run: Path) -> None:
    small = ["--factor-dim", "3", "--over-arch-layer-sizes", "4", "--batch-size", "50", "--max-ne", "100"]
    cli.main(["train", "--data", str(data), "--output", str(run), "--recipe", "paper", *small, "--watch", "mlflow"])


def test_a_training_gives_what_its_own_log_has(data: Path, tmp_path: Path, recorder: type[Recorder]) -> None:
    train(data, tmp_path / "run")
    [one] = recorder.opened
    assert (one.finished, one.options["factor_dim"]) == (True, 3)
    expected: dict[tuple[str, int], float] = {}
    for record in records(tmp_path / "run"):
        split, step = record["split"], record["step"]
        for name in ("loss",) if split == "train" else ("auc", "logloss", "ne", "calibration"):
            expected[f"{split}/{name}", step] = record[name]
    assert {name for name, _ in expected} >= {"train/loss", "validation/auc", "test/auc"}
    assert expected.items() <= one.points.items()
    assert json.loads((tmp_path / "run" / watchers.IDS).read_text()) == {"mlflow": "new 0"}


def test_a_service_that_fails_does_not_end_the_training(
    data: Path,
    tmp_path: Path,
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recorder, "breaks_after", 0)
    train(data, tmp_path / "run")
    assert capsys.readouterr().out.count("warning: Recorder fails and is left out: the server is gone\n") == 1
    assert recorder.opened[0].finished is None
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_resumed_training_continues_its_run(tmp_path: Path, recorder: type[Recorder]) -> None:
    ids = [
        watchers.open_watchers(["mlflow"], tmp_path, CONFIG, resumed=resumed)[0].id for resumed in (False, True, False)
    ]
    assert ids == ["new 0", "new 0", "new 2"]


def test_a_missing_package_is_one_line_before_the_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        watchers.check_installed(["wandb"])
    assert str(error.value) == "--watch wandb: its package is not installed; pip install 'torchrec_deepfm[wandb]'"
    with pytest.raises(SystemExit):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mlflow_reads_the_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'torchrec_deepfm[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    run = tmp_path / "run"
    run.mkdir()
    for resumed, points in ((False, {3: 0.5, 6: 0.4}), (True, {9: 0.3})):
        [one] = watchers.open_watchers(["mlflow"], run, CONFIG, resumed=resumed)
        for step, loss in points.items():
            one.log({"train/loss": loss}, step)
        one.close(finished=resumed)
    found = MlflowClient().get_run(one.id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert (found.data.params["factor_dim"], found.data.tags["folder"]) == ("7", str(run))
    history = MlflowClient().get_metric_history(one.id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(3, 0.5), (6, 0.4), (9, 0.3)]


def framed(log: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, as Weights & Biases writes it behind a head of 7 bytes."""
    at, begun = 7, b""
    while at < len(log):
        if 32768 - at % 32768 < 7:  # a block ends with padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        begun += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


def test_weights_and_biases_offline_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'torchrec_deepfm[wandb]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    run.mkdir()
    ids = []
    for resumed, points in ((False, {3: 0.5, 6: 0.4}), (True, {6: 0.4, 9: 0.3})):
        [one] = watchers.open_watchers(["wandb"], run, CONFIG, resumed=resumed)
        ids.append(one.id)
        for step, loss in points.items():
            one.log({"train/loss": loss}, step)
        one.close(finished=resumed)
    assert ids[0] == ids[1]
    points, options = set(), {}
    for file in run.glob("wandb/offline-run-*/*.wandb"):
        for content in framed(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            options |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            if "step" in values:
                points.add((values["step"], values["train/loss"]))
    assert points == {(3, 0.5), (6, 0.4), (9, 0.3)}
    assert options["factor_dim"] == 7

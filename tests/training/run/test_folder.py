"""Run folders that are damaged, foreign or in part gone: nothing is removed, nothing is believed, one line says why."""

import errno
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import assert_same_run, make_data, records
from tests.support.ranks import one_rank
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts
from torchrec_deepfm.training.checkpoint.manager import Checkpoints
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.run.formats import Manifest, convert
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(
    factor_dim=3, over_arch_layer_sizes=(4,), batch_size=150, epochs=2, checkpoint_every=4, eval_every=4, lr_patience=1,
    lr_factor=0.5,
)  # fmt: skip
STEPS = 26  # two epochs of 13


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_data(tmp_path_factory.mktemp("data") / "data")


class KilledError(Exception):
    """Anything that is not the user's mistake."""


def train_until(step: int, data: PreparedData, folder: Path, device: torch.device, error: Exception) -> None:
    """Train, with an error in the middle of a step."""
    original = loop.Loop._step

    def fail(self: loop.Loop, batches: Any) -> None:
        original(self, batches)
        if self.position.step == step:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", fail)
        train(CONFIG, data, folder, device)


@pytest.fixture(scope="module")
def templates(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with one_rank() as device:
        train(CONFIG, data, folder / "finished", device)
        with pytest.raises(KilledError):
            train_until(22, data, folder / "unfinished", device, KilledError())
    return folder


@pytest.fixture
def finished(templates: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates / "finished", tmp_path / "run"))


@pytest.fixture
def unfinished(templates: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints of step 16 and 20, and perhaps the one of its best evaluation."""
    return Path(shutil.copytree(templates / "unfinished", tmp_path / "run"))


@pytest.fixture
def alarm() -> Iterator[None]:
    """A test that waits on a FIFO fails."""

    def late(*_: object) -> None:
        raise AssertionError("this waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def refusal(data: PreparedData, run: Path, device: torch.device, config: TrainConfig = CONFIG, **options: Any) -> str:
    """Why ``train`` refuses; it is one line, and every file is as it was."""
    before = content(run)
    with pytest.raises(UserError) as raised:
        train(config, data, run, device, RunOptions(**options))
    assert content(run) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


def prune(run: Path) -> None:
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")


def unmount(run: Path) -> None:
    (run / "checkpoints").rename(run.parent / "elsewhere")


def strip(run: Path) -> None:
    for manifest in run.glob("checkpoints/*/checkpoint.json"):
        manifest.unlink()


def older(run: Path) -> None:
    unmount(run)
    (run / "saved.json").unlink()


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        ("finished", prune, f"the checkpoint of step {STEPS} was saved in "),
        (
            "finished",
            lambda run: (prune(run), (run / "saved.json").unlink()),
            "holds the weights of a finished training",
        ),
        ("unfinished", unmount, "the checkpoint of step 20 was saved in "),
        ("unfinished", older, "metrics.jsonl has records of steps, but there is no checkpoint in "),
        ("unfinished", strip, "checkpoint.json is missing; no checkpoint is intact"),
    ],
)
def test_what_is_lost_is_not_trained_again(
    data: PreparedData, templates: Path, tmp_path: Path, device: torch.device, of: str, change: Any, message: str
) -> None:
    run = Path(shutil.copytree(templates / of, tmp_path / "run"))
    change(run)
    (run / "notes.txt").write_text("mine")
    found = refusal(data, run, device)
    assert message in found
    assert found.endswith("name another --output to train from the start")


def test_a_run_of_the_version_before_is_resumed(
    data: PreparedData, unfinished: Path, device: torch.device, templates: Path
) -> None:
    """It had no saved.json, and did not count the rows that epochs leave out."""
    (unfinished / "saved.json").unlink()
    for folder in (unfinished / "checkpoints").iterdir():
        reseal(folder, lambda manifest: manifest["point"].pop("dropped"))
    told: list[str] = []
    train(CONFIG, data, unfinished, device, say=told.append)
    assert told[0] == f"Resuming from step 20 of {unfinished}"
    assert_same_run(unfinished, templates / "finished")


def test_another_place_without_checkpoints(data: PreparedData, unfinished: Path, device: torch.device) -> None:
    empty = unfinished.parent / "empty"
    found = refusal(data, unfinished, device, checkpoints=str(empty))
    assert f"was saved in {unfinished.parents[0]}" not in found  # it was saved under the template's name
    assert f"and {empty} holds none now; restore or mount it" in found


def test_one_manifest_is_missing(data: PreparedData, unfinished: Path, device: torch.device, templates: Path) -> None:
    run = unfinished
    (run / "checkpoints" / "step_00000020" / "checkpoint.json").unlink()
    told: list[str] = []
    train(CONFIG, data, run, device, say=told.append)
    assert told[0] == f"not used: {run}/checkpoints/step_00000020: checkpoint.json is missing"
    assert told[1] == f"Resuming from step 16 of {run}"
    assert (run / "checkpoints" / "step_00000020.refused" / ".metadata").exists()
    assert_same_run(run, templates / "finished")


def test_no_checkpoint_was_saved_yet(data: PreparedData, tmp_path: Path, device: torch.device, templates: Path) -> None:
    """A kill before the first checkpoint: the same command starts again, and what was recorded is kept."""
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train_until(3, data, run, device, KilledError())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "train"}\n{"step": 4, "spl')
    recorded = (run / "metrics.jsonl").read_bytes()
    told: list[str] = []
    train(CONFIG, data, run, device, say=told.append)
    assert told[0] == (
        "no checkpoint was saved yet: starting from step 0; the records so far are kept in metrics.jsonl.1"
    )
    assert (run / "metrics.jsonl.1").read_bytes() == recorded
    assert_same_run(run, templates / "finished")


@pytest.mark.parametrize("before", ["absent", "empty", "notes"])
def test_a_start_removes_only_what_it_made(
    data: PreparedData, tmp_path: Path, device: torch.device, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    if before != "absent":
        run.mkdir()
    mistake = UserError("row 3: wrong")
    if before == "notes":  # written by the user while it trains
        original = loop.Loop.run

        def write_notes(self: loop.Loop) -> None:
            (run / "notes.txt").write_text("mine")
            (run / "tensorboard" / "notes.txt").write_text("mine")
            original(self)

        monkeypatch.setattr(loop.Loop, "run", write_notes)
    with pytest.raises(UserError, match="row 3: wrong"):
        train_until(2, data, run, device, mistake)
    left = [] if before != "notes" else ["notes.txt", "tensorboard", "tensorboard/notes.txt"]
    assert run.exists() == (before != "absent")
    assert not run.exists() or sorted(content(run)) == left


def test_a_second_start_removes_nothing(data: PreparedData, tmp_path: Path, device: torch.device) -> None:
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train_until(1, data, run, device, KilledError())
    with pytest.raises(UserError, match="row 3: wrong"):
        train_until(2, data, run, device, UserError("row 3: wrong"))
    assert (run / "config.json").exists()


def test_no_message_promises_a_checkpoint_that_is_not_there(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"), keep_last=1)
    memory = torch.zeros(3)
    state = {"weight": TensorCuts((3,), [Cut((0,), memory)])}

    def save(step: int) -> str:
        checkpoints.save(step, state, {})
        with pytest.raises(UserError) as raised:
            checkpoints.wait()
        return str(raised.value)

    (tmp_path / "checkpoints" / "step_00000001.partial").write_text("in the way")
    assert save(1).endswith(", then run the same command again")
    checkpoints.save(2, state, {})
    checkpoints.wait()
    (tmp_path / "checkpoints" / "step_00000003.partial").write_text("in the way")
    assert save(3).endswith(", then run the same command again to resume from the checkpoint of step 2")
    checkpoints.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("call", ["stat", "open", "scandir"])
def test_only_file_not_found_means_absent(
    data: PreparedData, unfinished: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    original: Callable[..., Any] = getattr(os, call)
    bad = unfinished / "checkpoints" / ("" if call == "scandir" else "step_00000020/checkpoint.json")
    failed = []

    def fail(path: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(path, int) and Path(os.fspath(path)) == bad:
            failed.append(path)
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **options)

    before = content(unfinished)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(UserError) as raised:
            train(CONFIG, data, unfinished, device)
    assert failed
    assert f"can't be read ({os.strerror(code)}); nothing was changed" in str(raised.value)
    assert content(unfinished) == before


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(seal(manifest))


FORGED: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("point.step", lambda m: m["point"].update(step=21)),
    ("point.step", lambda m: m["point"].update(step=-1)),
    ("point.step", lambda m: m["point"].update(step=True)),
    ("point.epoch", lambda m: (m["point"].update(epoch=9), m["position"].update(epoch=9))),
    ("point.epoch contradicts position.epoch", lambda m: m["point"].update(epoch=0)),
    ("point.row contradicts position.row", lambda m: m["point"].update(row=150)),
    ("point.samples", lambda m: (m["point"].update(epoch=0), m["position"].update(epoch=0))),
    ("point.dropped", lambda m: (m["point"].update(epoch=2, row=0), m["position"].update(epoch=2, row=0))),
    ("point.row", lambda m: (m["point"].update(row=2000), m["position"].update(row=2000))),
    ("point.samples", lambda m: m["point"].update(samples="x")),
    ("point.samples", lambda m: m["point"].update(samples=5)),
    ("point.samples", lambda m: m["point"].update(samples=10**9)),
    ("point.dropped", lambda m: m["point"].update(samples=2999)),
    ("point.dropped", lambda m: m["point"].update(dropped=51)),
    ("point.seconds", lambda m: m["point"].update(seconds=None)),
    ("point.seconds", lambda m: m["point"].update(seconds=-1.0)),
    ("point.seconds", lambda m: m["point"].update(seconds=1e300)),
    ("point.evaluated", lambda m: m["point"].update(evaluated=1)),
    ("point", lambda m: m["point"].update(other=1)),
    ("point", lambda m: m.update(point=[])),
    ("tracker.stopped", lambda m: m["tracker"].update(stopped=True)),
    ("tracker.stopped", lambda m: m["tracker"].update(stopped="no")),
    ("tracker.best_step", lambda m: m["tracker"].update(best_step=24)),
    ("tracker.best_step", lambda m: m["tracker"].update(best_step=None)),
    ("tracker.best_value", lambda m: m["tracker"].update(best_value="high")),
    ("tracker.factor", lambda m: m["tracker"].update(factor=0.3)),
    ("tracker.factor", lambda m: m["tracker"].update(factor=0.5**300)),
    ("tracker.factor", lambda m: m["tracker"].update(factor=0.0)),
    ("tracker.factor", lambda m: m["tracker"].update(factor=2.0)),
    ("tracker.bad", lambda m: m["tracker"].update(bad=21, bad_since_drop=0)),
    ("tracker.bad_since_drop", lambda m: m["tracker"].update(bad_since_drop=1)),
    ("world_size", lambda m: m.update(world_size=0)),
    ("world_size", lambda m: m.update(world_size=2**30)),
    ("plan.world_size", lambda m: m.update(world_size=2)),
    ("plan: table", lambda m: m["plan"]["tables"][0].update(num_embeddings=-1)),
    ("random", lambda m: m.update(random=2**40)),
    ("random", lambda m: m.pop("random")),
    ("losses", lambda m: m.update(losses=21)),
    ("losses", lambda m: m.update(losses=-1)),
    ("columns", lambda m: m["columns"].popitem()),
    ("columns", lambda m: m.update(columns={key: [-4] for key in m["columns"]})),
    ("columns.", lambda m: m.update(columns={key: [4] for key in m["columns"]})),
    ("columns.", lambda m: m.update(columns={key: [0, 0] for key in m["columns"]})),
    ("columns.", lambda m: m.update(columns={key: [0, 4] for key in m["columns"]})),
    ("format_version", lambda m: m.update(format_version="1")),
    ("num_embeddings", lambda m: m["num_embeddings"].update(user=0)),
    ("numeric", lambda m: m["numeric"].append(3)),
    ("data_sha256", lambda m: m.update(data_sha256="?")),
    ("schema_sha256", lambda m: m.update(schema_sha256=7)),
    ("versions", lambda m: m["versions"].update(torch=2)),
    ("position", lambda m: m["position"].update(row="x")),
    ("config", lambda m: m["config"].update(epochs=-3)),
    ("config.speed", lambda m: m["config"].update(speed=9)),
]


@pytest.fixture(scope="module")
def manifest(templates: Path) -> bytes:
    return (templates / "unfinished" / "checkpoints" / "step_00000020" / "checkpoint.json").read_bytes()


@pytest.mark.parametrize(("name", "forge"), FORGED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(FORGED)])
def test_a_forged_value_is_named(manifest: bytes, name: str, forge: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(manifest)
    widths = dict.fromkeys(value["columns"], 4)

    def check(manifest: dict[str, Any]) -> None:
        found = convert(manifest, Manifest)
        found.train_config()
        found.check(CONFIG, rows=2000, widths=widths)

    check(value)  # as it was written
    forge(value)
    with pytest.raises(ValueError, match=re.escape(name)):
        check(value)


@pytest.mark.parametrize(
    ("forge", "wrong"),
    [
        (lambda m: m["tracker"].update(stopped=True), "tracker.stopped contradicts the other values"),
        (lambda m: m["point"].update(epoch=0), "point.epoch contradicts position.epoch"),
    ],
)
def test_a_forged_checkpoint_is_not_used(
    data: PreparedData, unfinished: Path, device: torch.device, forge: Callable[[dict[str, Any]], Any], wrong: str
) -> None:
    folder = unfinished / "checkpoints" / "step_00000020"
    reseal(folder, forge)
    told: list[str] = []
    train(CONFIG, data, unfinished, device, say=told.append)
    assert told[:2] == [
        f"not used: {folder}: checkpoint.json: {wrong}",
        f"Resuming from step 16 of {unfinished}",
    ]


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("name", ["checkpoint.json", "__0_0.distcp", ".metadata"])
def test_a_fifo_is_refused_at_once(data: PreparedData, unfinished: Path, device: torch.device, name: str) -> None:
    path = unfinished / "checkpoints" / "step_00000020" / name
    path.unlink()
    os.mkfifo(path)
    told: list[str] = []
    train(CONFIG, data, unfinished, device, say=told.append)
    assert told[0] == f"not used: {path.parent}: {name} is not a regular file"


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("name", ["config.json", "saved.json", "metrics.jsonl", "summary.json"])
def test_a_fifo_for_a_small_file(data: PreparedData, unfinished: Path, device: torch.device, name: str) -> None:
    (unfinished / name).unlink(missing_ok=True)
    os.mkfifo(unfinished / name)
    if name == "saved.json":
        shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        train(CONFIG, data, unfinished, device)


@pytest.mark.parametrize(
    "text",
    [b"{}", b"[]", b'"done"', b"\xff\x00", b"[" * 100_000, b'{"steps": 26}', b""],
    ids=lambda text: repr(text[:9]),
)
def test_a_summary_that_says_nothing(data: PreparedData, finished: Path, device: torch.device, text: bytes) -> None:
    (finished / "summary.json").write_bytes(text)
    assert refusal(data, finished, device).startswith(f"{finished / 'summary.json'}: the file is damaged (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format_version=99), "the file is damaged (format_version: invalid enum value 99)"),
        (
            lambda value: value["config"].update(speed=3),
            "does not fit this version (config.speed: unknown option",
        ),
        (lambda value: value["config"].update(epochs="2"), "does not fit this version (config: --epochs '2': "),
        (lambda value: value.update(num_embeddings={"user": -3}), "the file is damaged (num_embeddings[...]: expected"),
        (lambda value: value.pop("numeric"), "the file is damaged (object missing required field `numeric`)"),
    ],
)
def test_a_config_of_another_version(
    data: PreparedData, unfinished: Path, device: torch.device, change: Any, message: str
) -> None:
    path = unfinished / "config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    found = refusal(data, unfinished, device)
    assert found.startswith(f"{path}: ")
    assert message in found
    assert found.endswith("name another --output, or remove the folder")


def test_lost_curves_are_reported(
    data: PreparedData, unfinished: Path, device: torch.device, templates: Path, tmp_path: Path
) -> None:
    path, told = unfinished / "metrics.jsonl", []
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\xff\x17 binary\n" + b"[" * 100_000 + b"\n" + b"".join(lines[1:]))
    damaged = path.read_bytes()
    train(CONFIG, data, unfinished, device, say=told.append)
    assert told[0] == (
        f"{path}, line 2: not a record (lines of that kind: 2); they are left out, and the file is kept as "
        "metrics.jsonl.1"
    )
    assert (unfinished / "metrics.jsonl.1").read_bytes() == damaged
    assert records(unfinished) == records(templates / "finished")
    second = Path(shutil.copytree(templates / "unfinished", tmp_path / "second"))
    (second / "metrics.jsonl").unlink()
    told.clear()
    train(CONFIG, data, second, device, say=told.append)
    assert told[0] == f"{second / 'metrics.jsonl'} is missing: the curves up to step 20 are lost"


def test_no_link_is_written_through(data: PreparedData, unfinished: Path, device: torch.device) -> None:
    """Whatever earlier versions or this one write: a foreign folder can't make them write elsewhere."""
    mine = unfinished.parent / "mine"
    mine.write_text("mine")
    names = (
        "config.json",
        "saved.json",
        "summary.json",
        "metrics.jsonl",
        "plan.json",
        "calibration.json",
        "report.html",
    )
    for name in names:
        (unfinished / f"{name}.partial").symlink_to(mine)
    for name in ("summary.json.partial", "calibration.json", "report.html", "plan.json"):
        (unfinished / name).unlink(missing_ok=True)
        (unfinished / name).symlink_to(mine)
    (unfinished / "checkpoints" / "step_00000024.partial").symlink_to(mine)
    train(CONFIG, data, unfinished, device)
    assert mine.read_text() == "mine"
    assert not (unfinished / "report.html").is_symlink()


def test_a_killed_run_gets_its_report(data: PreparedData, finished: Path, device: torch.device) -> None:
    (finished / "report.html").unlink()
    assert train(CONFIG, data, finished, device).before
    assert (finished / "report.html").exists()
    os.utime(finished / "report.html", (0, 0))  # of the unfinished run
    assert train(CONFIG, data, finished, device).before
    assert (finished / "report.html").stat().st_mtime > 1
    time = (finished / "report.html").stat().st_mtime_ns
    assert train(CONFIG, data, finished, device).before
    assert (finished / "report.html").stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ("in the loss", r"step 15: the loss is not finite \(learning rates: .*\); its batch is saved in .*"),
        ("in an evaluation", r"step 16: the predictions of the evaluation hold a NaN or an infinity"),
    ],
)
def test_rates_may_be_lowered_after_a_loss_that_is_not_finite(
    data: PreparedData, tmp_path: Path, device: torch.device, seen: str, message: str
) -> None:
    run = tmp_path / "run"
    config = replace(CONFIG, sparse_lr=0.01, dense_lr=0.02, sparse_optimizer="sgd")
    lower = replace(config, dense_lr=0.01)
    original = loop.Loop._forward

    def overflow(self: loop.Loop, batch: Any) -> Any:
        """A loss that is not finite at the higher rate, as of weights that run away."""
        loss, rest = original(self, batch)
        bad = self.position.step + 1 >= 15 and self._config.dense_lr > 0.015
        if not bad:
            return loss, rest
        return loss * math.nan, (rest[0] * (math.nan if seen == "in the loss" else 1), *rest[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_forward", overflow)
        for _ in range(2):  # the same command meets the same loss again
            with pytest.raises(UserError) as raised:
                train(config, data, run, device)
            assert re.fullmatch(
                message + "; run the same command with a lower --sparse-lr or --dense-lr to resume from the checkpoint "
                "of step 12",
                str(raised.value),
            )
        with pytest.raises(UserError, match=r"holds a run with --dense-lr 0\.02, not 0\.03"):
            train(replace(config, dense_lr=0.03), data, run, device)
        with pytest.raises(UserError, match=r"holds a run with --dropout 0\.5, not 0\.1"):
            train(replace(lower, dropout=0.1), data, run, device)
        told: list[str] = []
        train(lower, data, run, device, say=told.append)
    assert told[:2] == [
        f"Resuming from step 12 of {run}",
        "learning rates after step 12: --dense-lr 0.01 instead of 0.02",
    ]
    assert json.loads((run / "config.json").read_text())["config"]["dense_lr"] == 0.01
    rates = {line["step"]: line["lr"]["dense"] for line in records(run) if line["split"] == "train"}
    assert rates[STEPS] <= 0.01
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


def test_rates_are_not_lowered_without_a_reason(data: PreparedData, unfinished: Path, device: torch.device) -> None:
    found = refusal(data, unfinished, device, replace(CONFIG, dense_lr=1e-4))
    assert "holds a run with --dense-lr 0.001, not 0.0001; give the same options" in found

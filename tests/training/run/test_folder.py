"""Run folders that are damaged, foreign or in part gone: nothing is removed, nothing is believed, one line says why."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import assert_same_run, records
from tests.training.run.killed_runs import CONFIG, STEPS, KilledError, content, refusal, reseal, train_until
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training import loop
from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts
from torchrec_deepfm.training.checkpoint.manager import Checkpoints
from torchrec_deepfm.training.trainer import train


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
    clicks: PreparedData, templates: Path, tmp_path: Path, device: torch.device, of: str, change: Any, message: str
) -> None:
    run = Path(shutil.copytree(templates / of, tmp_path / "run"))
    change(run)
    (run / "notes.txt").write_text("mine")
    found = refusal(clicks, run, device)
    assert message in found
    assert found.endswith("name another --output to train from the start")


def test_a_run_of_the_version_before_is_resumed(
    clicks: PreparedData, unfinished: Path, device: torch.device, templates: Path
) -> None:
    """It had no saved.json, and did not count the rows that epochs leave out."""
    (unfinished / "saved.json").unlink()
    for folder in (unfinished / "checkpoints").iterdir():
        reseal(folder, lambda manifest: manifest["point"].pop("dropped"))
    reported: list[str] = []
    train(CONFIG, clicks, unfinished, device, say=reported.append)
    assert reported[0] == f"Resuming from step 20 of {unfinished}"
    assert_same_run(unfinished, templates / "finished")


def test_another_place_without_checkpoints(clicks: PreparedData, unfinished: Path, device: torch.device) -> None:
    empty = unfinished.parent / "empty"
    found = refusal(clicks, unfinished, device, checkpoints=str(empty))
    assert f"was saved in {unfinished.parents[0]}" not in found  # it was saved under the template's name
    assert f"and {empty} holds none now; restore or mount it" in found


def test_one_manifest_is_missing(clicks: PreparedData, unfinished: Path, device: torch.device, templates: Path) -> None:
    run = unfinished
    (run / "checkpoints" / "step_00000020" / "checkpoint.json").unlink()
    reported: list[str] = []
    train(CONFIG, clicks, run, device, say=reported.append)
    assert reported[0] == f"not used: {run}/checkpoints/step_00000020: checkpoint.json is missing"
    assert reported[1] == f"Resuming from step 16 of {run}"
    assert (run / "checkpoints" / "step_00000020.refused" / ".metadata").exists()
    assert_same_run(run, templates / "finished")


def test_no_checkpoint_was_saved_yet(
    clicks: PreparedData, tmp_path: Path, device: torch.device, templates: Path
) -> None:
    """A kill before the first checkpoint: the same command starts again, and what was recorded is kept."""
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train_until(3, clicks, run, device, KilledError())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "split": "train"}\n{"step": 4, "spl')
    recorded = (run / "metrics.jsonl").read_bytes()
    reported: list[str] = []
    train(CONFIG, clicks, run, device, say=reported.append)
    assert reported[0] == (
        "no checkpoint was saved yet: starting from step 0; the records so far are kept in metrics.jsonl.1"
    )
    assert (run / "metrics.jsonl.1").read_bytes() == recorded
    assert_same_run(run, templates / "finished")


@pytest.mark.parametrize("before", ["absent", "empty", "notes"])
def test_a_start_removes_only_what_it_made(
    clicks: PreparedData, tmp_path: Path, device: torch.device, before: str, monkeypatch: pytest.MonkeyPatch
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
        train_until(2, clicks, run, device, mistake)
    left = [] if before != "notes" else ["notes.txt", "tensorboard", "tensorboard/notes.txt"]
    assert run.exists() == (before != "absent")
    assert not run.exists() or sorted(content(run)) == left


def test_a_second_start_removes_nothing(clicks: PreparedData, tmp_path: Path, device: torch.device) -> None:
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train_until(1, clicks, run, device, KilledError())
    with pytest.raises(UserError, match="row 3: wrong"):
        train_until(2, clicks, run, device, UserError("row 3: wrong"))
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
    clicks: PreparedData, unfinished: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, code: int, call: str
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
            train(CONFIG, clicks, unfinished, device)
    assert failed
    assert f"can't be read ({os.strerror(code)}); nothing was changed" in str(raised.value)
    assert content(unfinished) == before


@pytest.mark.parametrize(
    "text",
    [b"{}", b"[]", b'"done"', b"\xff\x00", b"[" * 100_000, b'{"steps": 26}', b""],
    ids=lambda text: repr(text[:9]),
)
def test_a_summary_that_says_nothing(clicks: PreparedData, finished: Path, device: torch.device, text: bytes) -> None:
    (finished / "summary.json").write_bytes(text)
    assert refusal(clicks, finished, device).startswith(f"{finished / 'summary.json'}: the file is damaged (")


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
    clicks: PreparedData, unfinished: Path, device: torch.device, change: Any, message: str
) -> None:
    path = unfinished / "config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    found = refusal(clicks, unfinished, device)
    assert found.startswith(f"{path}: ")
    assert message in found
    assert found.endswith("name another --output, or remove the folder")


def test_lost_curves_are_reported(
    clicks: PreparedData, unfinished: Path, device: torch.device, templates: Path, tmp_path: Path
) -> None:
    path, reported = unfinished / "metrics.jsonl", []
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\xff\x17 binary\n" + b"[" * 100_000 + b"\n" + b"".join(lines[1:]))
    damaged = path.read_bytes()
    train(CONFIG, clicks, unfinished, device, say=reported.append)
    assert reported[0] == (
        f"{path}, line 2: not a record (lines of that kind: 2); they are left out, and the file is kept as "
        "metrics.jsonl.1"
    )
    assert (unfinished / "metrics.jsonl.1").read_bytes() == damaged
    assert records(unfinished) == records(templates / "finished")
    second = Path(shutil.copytree(templates / "unfinished", tmp_path / "second"))
    (second / "metrics.jsonl").unlink()
    reported.clear()
    train(CONFIG, clicks, second, device, say=reported.append)
    assert reported[0] == f"{second / 'metrics.jsonl'} is missing: the curves up to step 20 are lost"


def test_no_link_is_written_through(clicks: PreparedData, unfinished: Path, device: torch.device) -> None:
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
    train(CONFIG, clicks, unfinished, device)
    assert mine.read_text() == "mine"
    assert not (unfinished / "report.html").is_symlink()


def test_a_killed_run_gets_its_report(clicks: PreparedData, finished: Path, device: torch.device) -> None:
    (finished / "report.html").unlink()
    assert train(CONFIG, clicks, finished, device).before
    assert (finished / "report.html").exists()
    os.utime(finished / "report.html", (0, 0))  # of the unfinished run
    assert train(CONFIG, clicks, finished, device).before
    assert (finished / "report.html").stat().st_mtime > 1
    time = (finished / "report.html").stat().st_mtime_ns
    assert train(CONFIG, clicks, finished, device).before
    assert (finished / "report.html").stat().st_mtime_ns == time

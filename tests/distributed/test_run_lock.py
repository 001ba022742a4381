"""The lock of a run folder: real processes, killed as well."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_deepfm.distributed import run_lock
from torchrec_deepfm.distributed.run_lock import RunLock
from torchrec_deepfm.errors import UserError

HOLD = "import sys, time; from pathlib import Path; from torchrec_deepfm.distributed.run_lock import RunLock; "
HOLD += "held = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_training_is_refused(
    tmp_path: Path, holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_FOR_ANY_HOLDER", 0.5)
    with pytest.raises(UserError) as raised:
        RunLock(tmp_path / "run")
    assert str(raised.value) == (
        f"--output {tmp_path / 'run'}: another training is writing there (process {holder.pid} on "
        f"{os.uname().nodename}); wait for its end, or name another folder"
    )
    holder.kill()
    holder.wait()


def test_a_dead_process_leaves_no_lock(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    held = RunLock(tmp_path / "run")
    assert (tmp_path / "run" / run_lock.NAME).exists()
    held.release()
    held.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_it_made_goes_if_it_stays_empty(tmp_path: Path) -> None:
    RunLock(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()
    held = RunLock(tmp_path / "run")
    (tmp_path / "run" / "config.json").touch()
    held.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    (tmp_path / "mine").mkdir()
    RunLock(tmp_path / "mine").release()
    assert (tmp_path / "mine").exists()


def test_the_same_job_waits_for_its_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this job")
    soon_gone = HOLD.replace("60", "1.0")
    process = subprocess.Popen([sys.executable, "-c", soon_gone, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    RunLock(tmp_path).release()
    process.wait()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*run: the folder can't be made or written \(Not a directory\)"):
        RunLock(tmp_path / "file" / "run")

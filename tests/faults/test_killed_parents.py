"""Ranks do not outlive what has started them, and the next start does not stumble over them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.jobs import ROOT
from tests.faults.runs import make_data
from torchrec_deepfm.distributed.run_lock import RunLock
from torchrec_deepfm.launch.processes import is_ending

ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
TORCHX = [str(Path(sys.executable).parent / "torchx"), "run", "-s", "local_cwd", "apps/deepfm.py", "-j", "1x2", "--"]
LAUNCH = [sys.executable, "-m", "torchrec_deepfm.launch", "--nproc_per_node", "2", "-m", "torchrec_deepfm", "train"]


def processes_of(word: str) -> set[int]:
    """The processes that have this word on their command line."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in entry.read_bytes():
                found.add(int(entry.parent.name))
        except OSError:
            continue
    return found - {os.getpid()}


def wait_until(found: Callable[[], object], log: Path, seconds: float = 240) -> None:
    """On a disk that is busy for a minute, so is a rank that writes a checkpoint, even one that was killed."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            processes = subprocess.run(
                ["ps", "-eo", "pid,ppid,stat,wchan:20,etime,args"], capture_output=True, text=True
            )
            raise AssertionError(f"{log.read_text(errors='replace')[-3000:]}\n{processes.stdout}")
        time.sleep(0.05)


@pytest.mark.campaign
def test_ranks_end_with_torchx_and_with_their_launcher(tmp_path: Path) -> None:
    data, run = make_data(tmp_path / "data").folder, tmp_path / "run"
    options = ["--recipe", "smoke", "--batch-size", "50", "--epochs", "1000", "--checkpoint-every", "20"]
    options += ["--data", str(data), "--output", str(run)]

    def start(front: list[str], name: str) -> "subprocess.Popen[bytes]":
        with (tmp_path / name).open("wb") as out:
            return subprocess.Popen([*front, *options], stdout=out, stderr=out, cwd=ROOT, env=ENV)

    def trains(name: str) -> None:
        before = {path.name for path in run.glob("checkpoints/step_????????")}
        new = lambda: {path.name for path in run.glob("checkpoints/step_????????")} - before  # noqa: E731
        wait_until(new, tmp_path / name)

    first = start(TORCHX, "first")
    trains("first")
    old = processes_of(str(run))
    assert len(old) >= 4, "torchx, the launcher, and two ranks"
    first.kill()
    second = start(LAUNCH, "second")  # at once, while the others are ending
    wait_until(lambda: not old & processes_of(str(run)) - {first.pid}, tmp_path / "first")
    first.wait()
    trains("second")
    assert "Resuming from step" in (tmp_path / "second").read_text()
    second.kill()
    second.wait()
    third = start(LAUNCH, "third")
    wait_until(lambda: len(processes_of(str(run)) - {third.pid}) in (0, 2), tmp_path / "third")
    trains("third")
    third.terminate()
    assert third.wait(timeout=120) == 143, (tmp_path / "third").read_text()[-3000:]
    assert "Resuming from step" in (tmp_path / "third").read_text()


def test_a_rank_whose_launcher_has_gone_already_does_not_begin() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    rank = "from torchrec_deepfm.__main__ import run; run()"
    env = ENV | {"TORCHREC_DEEPFM_UNDER_LAUNCHER": str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", rank], env=env, cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_process_counts_as_ending_before_it_is_reaped() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert not is_ending(process.pid)
    process.kill()
    wait_until(lambda: is_ending(process.pid), Path(os.devnull))
    process.wait()
    assert is_ending(process.pid)


def test_a_training_that_was_asked_to_stop_is_waited_for(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from torchrec_deepfm.distributed.run_lock import RunLock\n"
        "from torchrec_deepfm.distributed.stop_signals import requests_to_stop\n"
        "held = RunLock(Path(sys.argv[1]))\n"
        "with requests_to_stop(held.stopping) as requests:\n"
        "    print('held', flush=True)\n"
        "    while not requests.signum: time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(8)\n"  # longer than any other holder is waited for
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=ENV
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.terminate()
    assert holder.stdout.readline() == "asked\n"
    RunLock(tmp_path).release()
    holder.wait()


def loads_torch(pid: int) -> bool:
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def test_ctrl_c_while_ranks_start_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([*LAUNCH, "--data", str(folder)], stdout=out, stderr=out, cwd=ROOT, env=ENV)

    def starting() -> bool:
        found = processes_of(str(folder)) - {process.pid}
        return len(found) == 2 and all(loads_torch(pid) for pid in found)

    wait_until(starting, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "out").read_text() == "Interrupted; run the same command again to resume\n"

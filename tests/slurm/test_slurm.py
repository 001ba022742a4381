"""`torchx run -s slurm` on a real slurm: two nodes on loopback, with accounting, started by cluster.sh as root."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchrec_deepfm.data.dataset.prepared import PreparedData

CLUSTER = Path(__file__).parent / "cluster.sh"
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct", "mariadbd", "munged")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="starting a slurm takes root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (tests/slurm/cluster.sh install)"),
]
TORCHX = Path(sys.executable).parent / "torchx"
ELASTIC = Path(__file__).parents[2] / "docs" / "slurm" / "elastic.sh"
EPOCHS = 12


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_HOME", str(home))
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("OMP_NUM_THREADS", "1")
        with (home / "log").open("w") as log:  # the daemons keep it open
            started = subprocess.run(["bash", CLUSTER, "start"], stdout=log, stderr=log, timeout=180, check=False)
        try:
            assert started.returncode == 0, (home / "log").read_text()
            yield
        finally:
            subprocess.run(["bash", CLUSTER, "stop"], timeout=60, check=True)


def torchx(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TORCHX, *words], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def submit(cwd: Path, data: PreparedData, output: Path, *options: str, launch: tuple[str, ...] = ()) -> str:
    """Starts a training on both nodes; returns the job's id."""
    scheduler = "partition=debug" if "time=" not in " ".join(launch) else f"partition=debug,{launch[0]}"
    ranks = ("-j", "2x1", "--gpu", "0", "--cpu", "1", "--memMB", "3000", *launch[1:])
    command = ("--data", str(data.folder), "--output", str(output), "--recipe", "smoke", "--epochs", str(EPOCHS))
    component = ("torchrec_deepfm.deepfm:train", *ranks, "--", *command, "--max-ne", "inf", *options)
    run = torchx("run", "-s", "slurm", "-cfg", scheduler, *component, cwd=cwd)
    assert run.returncode == 0, run.stderr
    (handle,) = run.stdout.split()
    return handle.rpartition("/")[2]


def wait(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, subprocess.run(["squeue"], capture_output=True, text=True).stdout
        time.sleep(0.3)


def ended(job: str) -> bool:
    return not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip()


def squeue(form: str, job: str) -> list[str]:
    run = subprocess.run(["squeue", "-h", "-o", form, "-j", job], capture_output=True, text=True, check=True)
    return run.stdout.split("\n")[:-1]


def pgrep(*words: str) -> list[str]:
    return subprocess.run(["pgrep", *words], capture_output=True, text=True, check=False).stdout.split()


def trained(output: Path, epochs: int) -> bool:
    log = output / "metrics.jsonl"
    return log.exists() and log.read_text().count('"validation"') >= epochs


def printed(job: str, folder: Path, stream: str) -> str:
    """What both replicas wrote: either may have got rank 0."""
    return "".join((folder / f"slurm-{job}-train-{replica}.{stream}").read_text() for replica in (0, 1))


def result(output: Path) -> dict[str, object]:
    summary = json.loads((output / "summary.json").read_text())
    return {key: summary[key] for key in ("validation", "test", "steps")}


@pytest.mark.campaign
def test_two_nodes_train_and_a_preempted_job_ends_with_the_same_bits(tmp_path: Path, data: PreparedData) -> None:
    whole = submit(tmp_path, data, tmp_path / "whole")
    wait(lambda: ended(whole))
    status = torchx("status", f"slurm://torchx/{whole}", cwd=tmp_path)
    assert re.search(r"State: SUCCEEDED.*train\[0\]:SUCCEEDED.*train\[1\]:SUCCEEDED", status.stdout, re.DOTALL)
    log = torchx("log", "--streams", "stdout", f"slurm://torchx/{whole}", cwd=tmp_path)
    assert re.search(rf"^train/[01] .*trained {EPOCHS} epoch", log.stdout, re.MULTILINE)

    preempted = submit(tmp_path, data, tmp_path / "preempted", launch=("", "--max_retries", "1"))
    wait(lambda: trained(tmp_path / "preempted", 2))
    words = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--cpus-per-task=2", "--exclusive", "--wrap", "true"]
    urgent = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    wait(lambda: ended(urgent))
    assert not (tmp_path / "preempted" / "summary.json").exists()
    saved = json.loads((tmp_path / "preempted" / "saved.json").read_text())["step"]
    assert saved > 0
    # slurm waits two minutes before it starts a requeued job
    subprocess.run(["scontrol", "update", f"jobid={preempted}", "StartTime=now"], check=True)
    wait(lambda: ended(preempted))
    assert f"Resuming from step {saved}" in printed(preempted, tmp_path, "out")
    assert result(tmp_path / "preempted") == result(tmp_path / "whole")


@pytest.mark.campaign
def test_a_job_saves_before_its_time_limit_and_when_it_is_cancelled(tmp_path: Path, data: PreparedData) -> None:
    output = tmp_path / "run"
    limit = ("time=3", "--max_retries", "0")
    job = submit(tmp_path, data, output, "--epochs", "100000", "--stop-before-limit", "150", launch=limit)
    wait(lambda: ended(job))
    errors = printed(job, tmp_path, "err")
    step = int(
        re.findall(
            r"Stopping 150 s before the time limit.*stopped by SIGTERM after step (\d+), saved in", errors, re.DOTALL
        )[0]
    )
    assert json.loads((output / "saved.json").read_text())["step"] == step

    evaluated = (output / "metrics.jsonl").read_text().count('"validation"')
    job = submit(tmp_path, data, output, "--epochs", "100000")
    wait(lambda: trained(output, evaluated + 1))
    subprocess.run(["scancel", job], check=True)
    wait(lambda: ended(job))
    assert json.loads((output / "saved.json").read_text())["step"] > step


@pytest.mark.campaign
def test_a_lost_node_is_left_out_and_taken_back(tmp_path: Path, data: PreparedData) -> None:
    """docs/slurm/elastic.sh: a job per node. Lost as a host that loses power: its slurmd and all that it runs."""
    output = tmp_path / "run"
    words = ["sbatch", "--parsable", "-p", "debug", ELASTIC, "train", "--data", data.folder, "--output", output]
    more = ["--recipe", "smoke", "--epochs", "100000", "--max-ne", "inf", "--checkpoint-every", "20"]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run([*words, *more], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    array = run.stdout.strip()

    def resumed() -> list[int]:
        logs = "".join(path.read_text() for path in sorted(tmp_path.glob(f"slurm-{array}-*.out")))
        return sorted(int(step) for step in re.findall(r"Resuming from step (\d+)", logs))

    def states() -> list[str]:
        return sorted(squeue("%i %t", array))

    wait(lambda: any(output.glob("checkpoints/step_????????")))
    assert states() == [f"{array}_0 R", f"{array}_1 R"]
    (node,), (job,) = squeue("%N", f"{array}_1"), squeue("%A", f"{array}_1")
    pids = [
        (Path(os.environ["SLURM_HOME"]) / f"{node}.pid").read_text().strip(),
        *pgrep("-f", rf"slurmstepd: \[{job}\."),
    ]
    for pid in pids[1:]:
        pids += pgrep("-P", pid)  # the list grows while it is read: children of children
    subprocess.run(["kill", "-9", *pids], check=True)
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=lost"], check=True)
    wait(lambda: len(resumed()) == 1)
    assert states() == [f"{array}_0 R", f"{array}_1 PD"]
    evaluated = (output / "metrics.jsonl").read_text().count('"validation"')
    wait(lambda: trained(output, evaluated + 1))

    subprocess.run(["slurmd", "-N", node], check=True)
    time.sleep(2)
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=idle"], check=True)
    # slurm waits two minutes before it starts a requeued job
    subprocess.run(["scontrol", "update", f"jobid={array}_1", "StartTime=now"], check=True)
    wait(lambda: len(resumed()) == 2)
    assert states() == [f"{array}_0 R", f"{array}_1 R"]
    assert resumed()[1] > resumed()[0]
    evaluated = (output / "metrics.jsonl").read_text().count('"validation"')
    wait(lambda: trained(output, evaluated + 1))
    subprocess.run(["scancel", array], check=True)
    wait(lambda: ended(array))
    assert json.loads((output / "saved.json").read_text())["step"] > resumed()[1]


def test_what_slurm_refuses_is_one_line(tmp_path: Path) -> None:
    run = torchx("run", "-s", "slurm", "-cfg", "partition=nowhere", "torchrec_deepfm.deepfm:plan", cwd=tmp_path)
    assert run.returncode == 2
    *_, reason, line = run.stderr.splitlines()
    assert reason == "sbatch: error: Batch job submission failed: Invalid partition name specified"
    assert line == "error: -s slurm: sbatch has refused the request, for the reason that it has printed above"

"""A rank that dies under `torchx run`: torchelastic starts it again, and the training resumes, without a hand."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.jobs import ROOT
from tests.faults.runs import make_data


def process_of_rank(rank: int, run: Path) -> int | None:
    """The process that trains as this rank into this folder."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and f"RANK={rank}".encode() in environ:
            return int(entry.name)
    return None


@pytest.mark.campaign
def test_a_rank_that_dies_under_torchx(tmp_path: Path) -> None:
    data, run = make_data(tmp_path / "data").folder, tmp_path / "run"
    words = ["run", "-s", "local_cwd", "apps/deepfm.py", "-j", "1x2", "--max_restarts", "2", "--"]
    options = ["--recipe", "smoke", "--batch-size", "50", "--epochs", "40", "--checkpoint-every", "20"]
    options += ["--max-ne", "inf"]
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(
            [Path(sys.executable).parent / "torchx", *words, "--data", str(data), "--output", str(run), *options],
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )
        try:
            deadline = time.monotonic() + 90
            while not list(run.glob("checkpoints/step_????????")):
                assert job.poll() is None, (tmp_path / "out").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.05)
            killed = process_of_rank(1, run)
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            assert job.wait(timeout=150) == 0, (tmp_path / "out").read_text()[-3000:]
        finally:
            job.kill()
    text = (tmp_path / "out").read_text()
    [step] = re.findall(r"Resuming from step (\d+) of", text)
    assert int(step) >= 20
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (40 * 20, 2)

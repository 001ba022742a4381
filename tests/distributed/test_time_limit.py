"""A slurm job's time limit, from the environment or from a squeue of the test's own; slurm itself: tests/slurm."""

import signal
import time
from pathlib import Path

import pytest

from torchrec_deepfm.distributed.stop_signals import requests_to_stop
from torchrec_deepfm.distributed.time_limit import job_end, stop_before_limit
from torchrec_deepfm.errors import UserError


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose squeue prints what a test writes into the returned file."""
    program = tmp_path / "squeue"
    program.write_text(f'#!/bin/sh\ncat "{tmp_path}/answer"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return tmp_path / "answer"


def test_the_end_is_slurms(squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue.write_text(
        "1:00 2026-11-27T18:00:30\n1:00 2026-11-27T18:00:30\n"
    )  # as 22.05 prints it, a line per component
    assert job_end() == time.mktime((2026, 11, 27, 18, 0, 30, 0, 0, -1))
    squeue.write_text("UNLIMITED NONE\n")
    assert job_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795802430")
    assert job_end() == 1795802430


def test_what_cannot_be_known_is_refused(squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue.write_text("")
    with pytest.raises(UserError, match=r"--stop-before-limit: squeue does not say when job 7 ends \(no answer\)"):
        job_end()
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match="not a slurm job; leave the option out"), stop_before_limit(5):
        pass
    with stop_before_limit(0):
        pass


def test_the_request_comes_that_long_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 61))
    with requests_to_stop() as requests, stop_before_limit(60):
        deadline = time.monotonic() + 10
        while not requests.signum and time.monotonic() < deadline:
            time.sleep(0.01)
    assert requests.signum == signal.SIGTERM

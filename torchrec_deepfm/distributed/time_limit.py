"""A job's time limit: the training asks itself to stop in time to save."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from torchrec_deepfm.errors import UserError

_OPTION = "--stop-before-limit"


@contextmanager
def stop_before_limit(seconds: int) -> Iterator[None]:
    """Send this process SIGTERM some seconds before the time limit of its slurm job: it saves its state and stops.

    0 does nothing. UserError: this is not a slurm job, or slurm does not answer.
    """
    end = job_end() if seconds else None
    if end is None:
        yield
        return

    def stop() -> None:
        sys.stderr.write(f"Stopping {seconds} s before the time limit of the job\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(max(0.0, end - seconds - time.time()), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def job_end() -> float | None:
    """When the slurm job of this process reaches its time limit, in Unix time; None for a job without a limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError(
            "SLURM_JOB_ID is not set, so this is not a slurm job", where=_OPTION, remedy="leave the option out"
        )
    if "SLURM_JOB_END_TIME" in os.environ:  # since slurm 23.02
        return float(os.environ["SLURM_JOB_END_TIME"])
    squeue = shutil.which("squeue")
    if squeue is None:
        raise UserError("squeue is not on this node, and SLURM_JOB_END_TIME is not set", where=_OPTION)
    asked = subprocess.run(  # noqa: S603
        [squeue, "--noheader", "--job", job, "--format", "%l %e"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    # A line per component of a heterogeneous job; they end together.
    limit, _, end = asked.stdout.partition("\n")[0].partition(" ")
    if limit == "UNLIMITED":
        return None
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:
        reason = asked.stderr.strip() or asked.stdout.strip() or "no answer"
        raise UserError(f"squeue does not say when job {job} ends ({reason})", where=_OPTION) from None

"""Runs the scripts of benchmarks/, as a user does. No test itself."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def run(script: str, *words: object) -> str:
    """Return what a script prints.

    Raises:
        AssertionError: It failed; all it said is in the message.
    """
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

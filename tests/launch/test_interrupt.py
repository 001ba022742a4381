"""Ctrl-C at any time: one line, exit code 130, and nothing of what is done is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.data.raw_oracle import random_text

PRESS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


def command(*words: object, path: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.Popen(
        [sys.executable, "-m", "torchrec_deepfm", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        ("tyro", ["doctor"], "Interrupted\n"),
        ("torch", ["train", "--data", "data"], "Interrupted; run the same command again to resume\n"),
        (
            "duckdb",
            ["prepare", "--input", "a.tsv", "--output", "out"],
            "Interrupted; run the same command again to resume\n",
        ),
    ],
)
def test_while_a_library_is_imported(tmp_path: Path, module: str, words: list[str], line: str) -> None:
    (tmp_path / f"{module}.py").write_text(PRESS)
    process = command(*words, path=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", line)


def test_while_data_are_prepared(tmp_path: Path) -> None:
    source, output = tmp_path / "day.tsv", tmp_path / "out"
    source.write_bytes(random_text(50_000, 0) * 8)
    words = ("prepare", "--input", source, "--output", output, "--hash", "--num-embeddings", 100)
    process = command(*words)
    while process.poll() is None and not (tmp_path / ".out.partial").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "Interrupted; run the same command again to resume\n")
    assert not output.exists()
    again = command(*words)
    _, err = again.communicate(timeout=300)
    assert (again.returncode, err) == (0, "")
    assert (output / "manifest.json").exists()

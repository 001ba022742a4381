"""prepare on several ranks: the folder of one process, byte for byte, also when the ranks were killed on the way."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.data.raw_oracle import random_text
from tests.support.data.stopped_prepare import content
from tests.support.fork import ROOT, Fork
from tests.support.ranks import run_module, run_modules
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.work_folder import WorkFolder

MODES = {
    "vocabulary": (["--min-count", "2", "--split", "last-day"], {"min_count": 2, "split": "last-day"}),
    "hash": (
        ["--hash", "--num-embeddings", "1000", "--numeric", "quantile"],
        {"hash": True, "num_embeddings": 1000, "numeric_transform": "quantile"},
    ),
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for i, rows in enumerate((300, 700, 200, 500, 400)):
        (folder / f"day_{i}").write_bytes(random_text(rows, i))
    return folder


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {mode: content(prepare([raw], folder / mode, **options).folder) for mode, (_, options) in MODES.items()}


def ranks(count, *options):
    torchrun = ["torchrec_deepfm.launch", "--standalone", "--nproc-per-node", str(count)]
    return [*torchrun, "-m", "torchrec_deepfm", "prepare", *map(str, options)]


def start(command, folder):
    """A job of ranks under way."""
    return Fork(command, env=os.environ, stdout=folder / "job.out", stderr=folder / "job.err")


def kill_all(job):
    """Kill the launcher and its ranks, which are in sessions of their own."""
    while alive := job.family():
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


@pytest.mark.parametrize(("mode", "count"), [("vocabulary", 2), ("vocabulary", 7), ("hash", 3)])
def test_ranks_write_what_one_process_writes(tmp_path, raw, whole, mode, count):
    done = run_module(ranks(count, "--input", raw, "--output", tmp_path / "out", *MODES[mode][0]))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == whole[mode]
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    assert not WorkFolder(tmp_path / "out").path.exists()


def test_killed_ranks_and_one_process_that_ends_it(tmp_path, raw, whole):
    command = ranks(2, "--input", raw, "--output", tmp_path / "out", *MODES["vocabulary"][0])
    process = start(command, tmp_path)
    work = WorkFolder(tmp_path / "out")
    limit = time.monotonic() + 120
    while not work.begun() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    kill_all(process)
    assert work.begun()
    data = prepare([raw], tmp_path / "out", **MODES["vocabulary"][1])
    assert content(data.folder) == whole["vocabulary"]


def test_two_hosts(tmp_path, raw, whole):
    """Two agents with a rank each, as on two hosts that see one folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["torchrec_deepfm", "prepare", "--input", raw, "--output", tmp_path / "out", *MODES["vocabulary"][0]]
    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "1"]
    launchers = [
        ["torchrec_deepfm.launch", *meeting, "--node-rank", f"{i}", "-m", *map(str, command)] for i in range(2)
    ]
    for host in run_modules(launchers):
        assert host.returncode == 0, host.stderr
    assert content(tmp_path / "out") == whole["vocabulary"]


@pytest.mark.parametrize("record", ["encode_*", "sum_*"])
def test_killed_while_encoding_and_ended_by_other_ranks(tmp_path, raw, whole, record):
    mode = "vocabulary"
    process = start(ranks(3, "--input", raw, "--output", tmp_path / "out", *MODES[mode][0]), tmp_path)
    records = WorkFolder(tmp_path / "out").path / "records"
    limit = time.monotonic() + 120
    while not any(records.glob(f"{record}.json")) and process.poll() is None:
        assert time.monotonic() < limit
    kill_all(process)
    done = run_module(ranks(2, "--input", raw, "--output", tmp_path / "out", *MODES[mode][0]))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == whole[mode]


def test_a_bad_row_that_one_rank_meets_stops_all_in_one_line(tmp_path, raw):
    bad = tmp_path / "raw"
    bad.mkdir()
    for path in raw.iterdir():
        (bad / path.name).write_bytes(path.read_bytes() + (b"x\n" if path.name == "day_2" else b""))
    done = run_module(ranks(2, "--input", bad, "--output", tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{bad / 'day_2'}: line 201 has 1 columns" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]  # nothing is left, whichever rank it was


def test_torchx_runs_it_on_ranks(tmp_path, raw, whole):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("torchx"),
            *("run", "apps/deepfm.py:prepare", "-j", "1x2", "--"),
            *("--input", raw, "--output", tmp_path / "out", *MODES["hash"][0]),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == whole["hash"]

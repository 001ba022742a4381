"""A host that comes and a host that goes: two agents of torchelastic, as ``-j 1:2x1`` starts them."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import OPTIONS, Job, environment
from tests.faults.rank import HELD_AFTER
from tests.faults.runs import ROWS, make_data

BATCH = 50  # per rank
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=8,join_timeout=240"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def agent(data: Path, run: Path, port: int, env: dict[str, str]) -> Job:
    front = ["torchrec_deepfm.launch", "--rdzv_backend", "c10d", "--rdzv_conf", QUICK]
    front += ["--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "job", "--nnodes", "1:2", "--nproc_per_node", "1"]
    front += ["--max_restarts", "3", "-m", "tests.faults.rank", "--data", str(data), "--output", str(run)]
    return Job([*front, *OPTIONS, "--batch-size", str(BATCH), "--epochs", "2"], env)


def log(logs: Path) -> list[dict[str, Any]]:
    lines = []
    for path in logs.glob("rank_*"):
        lines += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return sorted(lines, key=lambda line: line["at"])


def until(logs: Path, agents: list[Job], *, ranks: int, steps: int) -> None:
    """Wait until so many ranks have done so many steps together."""
    deadline = time.monotonic() + 240
    while len({line["step"] for line in log(logs) if line["ranks"] == ranks}) < steps:
        seen = [(line["ranks"], line["rank"], line["step"]) for line in log(logs)]
        assert time.monotonic() < deadline, "\n".join([str(seen), *(each.out + each.err for each in agents)])
        assert agents[0].poll() is None
        time.sleep(0.05)


def kill_host(host: Job) -> None:
    """The agent and its ranks, all at once."""
    for pid in host.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.campaign
def test_a_host_comes_and_goes(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data").folder
    # However long the second host takes to start: the first one waits for it, and both for the kill.
    hold = tmp_path / "hold"
    hold.touch()
    env = environment(tmp_path / "log", FAULTS_HOLD=str(hold), LOGLEVEL="INFO")  # torchelastic's, for a failure
    port = free_port()
    first = agent(data, tmp_path / "run", port, env)
    until(tmp_path / "log", [first], ranks=1, steps=HELD_AFTER)
    second = agent(data, tmp_path / "run", port, env)
    until(tmp_path / "log", [first, second], ranks=2, steps=HELD_AFTER)
    kill_host(second)
    hold.unlink()
    code, out, err = first.finish()
    assert code == 0, err[-3000:]
    lines = log(tmp_path / "log")
    worlds = [line["ranks"] for line in lines]
    assert [w for i, w in enumerate(worlds) if i == 0 or w != worlds[i - 1]] == [1, 2, 1]
    # When a host comes, the ranks are asked to stop (SIGTERM) and save: not a step is done twice.
    joined = next(i for i, w in enumerate(worlds) if w == 2)
    assert max(line["step"] for line in lines[:joined]) == lines[joined]["step"] - 1
    assert len(re.findall("Resuming from step", out + second.out)) == 2
    # A step that was done again counts as it was done last; then every row has been seen once in each epoch, but for
    # the few at an epoch's end that do not fill a batch.
    last: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        before = last.get(line["step"], [])
        again = before and (before[0]["ranks"] != line["ranks"] or any(each["rank"] == line["rank"] for each in before))
        last[line["step"]] = [line] if again else [*before, line]
    assert sorted(last) == list(range(1, max(last) + 1))
    for epoch in (0, 1):
        rows = [row for step in last.values() for each in step if each["epoch"] == epoch for row in each["rows"]]
        assert len(rows) == len(set(rows)) > ROWS - 2 * BATCH
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 1

"""What a job opens to the network, and what it takes from it: jobs of several processes, attacked from outside."""

import base64
import ipaddress
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.api import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from tests.faults.runs import make_data
from tests.support.fork import ROOT, Fork
from tests.support.ranks import run_module
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.launch import rendezvous
from torchrec_deepfm.launch.rendezvous import read_state

ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
TORCHX = [str(Path(sys.executable).parent / "torchx"), "run", "-s", "local_cwd", "apps/deepfm.py", "-j", "1x2", "--"]
LAUNCH = "torchrec_deepfm.launch"
TRAIN = ["--recipe", "smoke", "--batch-size", "50", "--epochs", "1000", "--checkpoint-every", "20"]


Process = "Fork | subprocess.Popen[bytes]"


def family(process: Process) -> list[int]:
    """A process and all that descend from it."""
    if isinstance(process, Fork):
        return process.family()
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [process.pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def listening(pid: int) -> list[str]:
    """The addresses on which a process accepts connections, from the kernel's tables."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
        except OSError:
            continue
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                raw = bytes.fromhex(words[1].partition(":")[0])
                swapped = b"".join(struct.pack(">I", word) for (word,) in struct.iter_unpack("<I", raw))
                addresses.append(str(ipaddress.ip_address(swapped)))
    return addresses


@contextmanager
def job(words: list[str], folder: Path) -> Iterator[Process]:
    """A running job; its output is in ``folder / "out"``. The launcher is a fork."""
    process: Process
    if words[0] == LAUNCH:
        process = Fork(words, env=ENV, stdout=folder / "out", stderr=folder / "out")
    else:
        with (folder / "out").open("wb") as out:
            process = subprocess.Popen(words, stdout=out, stderr=out, cwd=ROOT, env=ENV)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


def wait_for(found: Callable[[], object], process: Process, folder: Path) -> None:
    deadline = time.monotonic() + 90
    while not found():
        assert process.poll() is None, (folder / "out").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "out").read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize(
    "front",
    [
        pytest.param(TORCHX, id="torchx", marks=pytest.mark.campaign),
        pytest.param([LAUNCH, "--nproc_per_node", "2", "-m", "torchrec_deepfm", "train"], id="launch"),
    ],
)
def test_a_job_on_one_host_listens_on_the_loopback_address_only(tmp_path: Path, front: list[str]) -> None:
    data, run = make_data(tmp_path / "data").folder, tmp_path / "run"
    with job([*front, *TRAIN, "--data", str(data), "--output", str(run)], tmp_path) as process:
        wait_for(lambda: list(run.glob("checkpoints/step_????????")), process, tmp_path)
        by_process = {pid: listening(pid) for pid in family(process)}
    listeners = {pid: addresses for pid, addresses in by_process.items() if addresses}
    assert len(listeners) >= 3, "the launcher with the ranks' store, and two ranks"
    open_to_others = [each for found in listeners.values() for each in found if not is_loopback(each)]
    assert open_to_others == []


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def test_a_process_alone_listens_on_the_loopback_address_only(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os; from torchrec_deepfm.distributed.process_group import process_group\n"
        "from tests.launch.test_rendezvous import listening\n"
        "with process_group(): print(*listening(os.getpid()))"
    )
    done = run_module([str(program)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()
    assert all(is_loopback(address) for address in done.stdout.split())


class Planted:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._file),))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def hosts(port: int, *program: str) -> list[str]:
    """The launcher of one of several hosts."""
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"
    front = [LAUNCH, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "job"]
    return [*front, "--rdzv_conf", quick, "--nnodes", "1:2", "--nproc_per_node", "1", *program]


def test_a_pickle_planted_in_the_rendezvous_is_not_run(tmp_path: Path) -> None:
    port, script = free_port(), tmp_path / "program.py"
    script.write_text("import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)\n")
    with job(hosts(port, str(script), str(tmp_path / "started")), tmp_path) as process:
        wait_for((tmp_path / "started").exists, process, tmp_path)
        store = TCPStore("localhost", port, is_master=False)
        assert pickle.loads(base64.b64decode(store.get("torch.rendezvous.job"))).participants, "the key that is read"
        store.set("torch.rendezvous.job", base64.b64encode(pickle.dumps(Planted(tmp_path / "planted"))).decode())
        code = process.wait(timeout=60)
    assert not (tmp_path / "planted").exists()
    assert code == 2
    assert (tmp_path / "out").read_text().splitlines()[-1] == (
        f"error: --rdzv_endpoint localhost:{port}: not the state of a rendezvous (it names posix.mkdir); nothing of it "
        "was run: choose another port, which only the job's hosts can reach"
    )


def test_the_state_of_a_rendezvous_is_read(tmp_path: Path) -> None:
    state = _RendezvousState()
    node = _NodeDesc("host", 3, 0)
    state.round, state.complete, state.deadline = 2, True, datetime.now(UTC)
    state.participants, state.wait_list, state.last_heartbeats = {node: 0}, {node}, {node: datetime.now(UTC)}
    assert vars(read_state(pickle.dumps(state))) == vars(state)
    state.redundancy_list = Planted(tmp_path / "planted")  # type: ignore[assignment]
    for bad in (pickle.dumps(state), pickle.dumps(["a list"]), b"", b"\x80\x04damaged"):
        with pytest.raises(RendezvousStateError, match=r"^not the state of a rendezvous"):
            read_state(bad)
    assert not (tmp_path / "planted").exists()


def test_a_rendezvous_port_that_another_program_holds(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        script = tmp_path / "program.py"
        script.touch()
        done = run_module(hosts(port, str(script)), timeout=120)
    line = f"error: --rdzv_endpoint localhost:{port}: another program listens on this port; choose a free one "
    assert (done.returncode, done.stderr) == (2, line + "(--rdzv_port of the TorchX component)\n")


def test_a_host_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.touch()
    words = hosts(free_port(), str(script))
    words[words.index("--rdzv_conf") + 1] += ",is_host=0,read_timeout=1"
    done = run_module(words, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --rdzv_endpoint localhost:")
    assert "the hosts cannot meet there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_host_whose_name_does_not_resolve_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_RESOLVE", 0.0)
    with pytest.raises(UserError, match=r"no address of n1\.invalid .*; add the name to DNS or to /etc/hosts") as error:
        rendezvous.wait_for_name("n1.invalid:29500")
    assert "\n" not in str(error.value)
    assert "waiting up to 0 s" in capsys.readouterr().err
    rendezvous.wait_for_name("localhost:29500")

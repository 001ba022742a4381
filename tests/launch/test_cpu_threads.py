"""How many threads a process gets: from the cores that it may use, in real processes and real control groups."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchrec_deepfm.launch import cpu_threads
from torchrec_deepfm.launch.cpu_threads import SPIN_COUNT, choose_threads, usable_cores

# What the command line sets before it loads torch, and what torch then makes of it.
PROGRAM = """
import json, os, sys
from torchrec_deepfm import __main__
sys.argv = ["torchrec_deepfm", "--help"]
__main__.run()
assert "torch" not in sys.modules
import torch
names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")
print(json.dumps({name: os.environ.get(name) for name in names} | {"n": torch.get_num_threads()}))
"""


def command_line(*front: str, **env: str) -> dict[str, object]:
    settings = ("OMP_", "MKL_", "KMP_")  # scikit-learn sets the last where it is imported, as it is in this process
    clean = {name: value for name, value in os.environ.items() if not any(word in name for word in settings)}
    words = [*front, sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=clean | env)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    """A control group, of whichever version this machine has, whose processes share half a core."""
    for parent, file, value in (
        (Path("/sys/fs/cgroup"), "cpu.max", "50000 100000"),
        (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", "50000"),
    ):
        outer = parent / f"torchrec_deepfm_test_{os.getpid()}"
        group = outer / "inner"
        try:
            group.mkdir(parents=True)
            with (outer / file).open("r+") as limit:  # the kernel has made it, where this is a file system of its own
                limit.write(value)  # what is above a group counts too
        except OSError:
            limited = False
        else:
            limited = True
            yield group
        for folder in (group, outer):
            if folder.is_dir():
                folder.rmdir()
        if limited:
            return
    pytest.skip("making a control group takes more rights than these tests have")


def test_a_quota_counts(half_a_core: Path) -> None:
    found = command_line("sh", "-c", f'echo $$ > {half_a_core}/cgroup.procs && exec "$@"', "sh")
    assert found == {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": str(SPIN_COUNT), "n": 1}


def test_an_affinity_counts() -> None:
    assert command_line("taskset", "-c", str(min(os.sched_getaffinity(0))))["n"] == 1


def test_users_own_settings_stay() -> None:
    assert command_line(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="7") == {
        "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "7", "n": 1,
    }  # fmt: skip
    for own in ({"OMP_WAIT_POLICY": "active"}, {"KMP_BLOCKTIME": "200"}, {"GOMP_SPINCOUNT": "9"}):
        environment = dict(own)
        choose_threads(1, environment)
        assert environment.keys() - own.keys() == {"OMP_NUM_THREADS"}
    environment = {"MKL_NUM_THREADS": "1"}
    choose_threads(1, environment)
    assert environment == {"MKL_NUM_THREADS": "1", "GOMP_SPINCOUNT": str(SPIN_COUNT)}


@pytest.mark.parametrize(("ranks", "threads"), [(1, 6), (2, 3), (4, 1), (9, 1)])
def test_ranks_share(monkeypatch: pytest.MonkeyPatch, ranks: int, threads: int) -> None:
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 6.5)
    environment: dict[str, str] = {}
    choose_threads(ranks, environment)
    assert environment["OMP_NUM_THREADS"] == str(threads)


CGROUP2 = "29 23 0:26 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
CGROUP1 = "32 24 0:29 {root} {mount} rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "mount", "root", "files", "cores"),
    [
        # systemd's slices; a limit of the slice is one of the job
        ("0::/user.slice/job.scope", CGROUP2, "/", {"user.slice/cpu.max": "150000 100000"}, 1.5),
        ("0::/user.slice/job.scope", CGROUP2, "/", {"user.slice/job.scope/cpu.max": "max 100000"}, None),
        # a container with a namespace of its own, and one that sees the host's path
        ("0::/", CGROUP2, "/", {"cpu.max": "25000 50000"}, 0.5),
        ("4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab", CGROUP1, "/docker/ab",
         {"cpu.cfs_quota_us": "40000", "cpu.cfs_period_us": "100000"}, 0.4),
        ("3:cpu,cpuacct:/slurm/job_7", CGROUP1, "/",
         {"slurm/cpu.cfs_quota_us": "-1", "slurm/cpu.cfs_period_us": "100000",
          "slurm/job_7/cpu.cfs_quota_us": "30000", "slurm/job_7/cpu.cfs_period_us": "100000"}, 0.3),
        ("0::/", CGROUP2, "/", {"cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_where_quotas_stand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, mount: str, root: str, files: dict[str, str],
    cores: float | None,
) -> None:  # fmt: skip
    """As proc(5), mountinfo and the kernel's cgroup documents have them."""
    monkeypatch.setattr(cpu_threads, "_PROC", tmp_path / "proc")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{groups}\n")
    lines = ["22 1 254:0 / / rw,relatime - ext4 /dev/vda rw", mount.format(root=root, mount=tmp_path / "mount")]
    (tmp_path / "proc" / "self" / "mountinfo").write_text("\n".join(lines) + "\n")
    (tmp_path / "mount" / groups.rpartition(":/")[2]).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cpu_threads, "_SYS", tmp_path / "sys")  # without a topology, each is a core
    assert usable_cores() == (2 if cores is None else cores)


def test_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(cpu_threads, "_SYS", tmp_path)
    monkeypatch.setattr(cpu_threads, "_quotas", lambda: iter(()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert usable_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert usable_cores() == 1

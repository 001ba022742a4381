"""Which GPU a rank takes, what is said where there is none, and how its group begins and ends."""

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.types import EnumerableShardingSpec

from tests.support.plans.experiments import plan
from tests.support.pretend_gpu import Properties, pretend_gpu
from tests.support.ranks import one_rank
from torchrec_deepfm import doctor
from torchrec_deepfm.distributed import health, process_group
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.torchrec_plan import to_sharding_plan
from torchrec_deepfm.sharding.runtime.local_hardware import describe_hardware
from torchrec_deepfm.training.checkpoint.tensors import optimizer_values

ROOT = Path(__file__).resolve().parents[2]
FOUR = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(("gpus", "index"), [(1, 0), (4, 3), (8, 3)])
def test_a_rank_takes_its_own_gpu(gpus: int, index: int) -> None:
    with pretend_gpu(gpus), mock.patch.dict(os.environ, FOUR):
        assert process_group._own_device() == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused() -> None:
    with (
        pretend_gpu(2),
        mock.patch.dict(os.environ, FOUR),
        pytest.raises(UserError, match="4 ranks on this host, but 2 GPUs; start at most one rank per GPU"),
    ):
        process_group._own_device()


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda:0"), (4, "cuda:3")])
def test_shards_lie_where_their_rank_has_them(gpus: int, device: str) -> None:
    table = Table(name="a", num_embeddings=8, embedding_dim=4)
    with mock.patch.object(torch.cuda, "device_count", return_value=gpus):
        found = to_sharding_plan(plan([table], ["table_wise"], 4, [3]), "ebc", torch.device("cuda", 0))
    spec = found.plan["ebc"]["a"].sharding_spec  # type: ignore[index]
    assert isinstance(spec, EnumerableShardingSpec)
    assert str(spec.shards[0].placement) == f"rank:3/{device}"


@dataclass(frozen=True, kw_only=True)
class Numbered(Properties):
    """A GPU whose uuid is another one each time."""

    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def uuid(self) -> str:
        return f"GPU-{next(self.numbers)}"


@dataclass(frozen=True, kw_only=True)
class Same(Properties):
    uuid: str = "GPU-0"


def meet(properties: Any) -> list[object]:
    """What two ranks find that see one GPU each."""
    store, found = dist.HashStore(), list[object]()
    turns = iter([(store, 0, 2), (store, 1, 2)])

    def rank() -> None:
        try:
            found.append(process_group._meet_with_own_gpus(torch.device("cuda", 0), timedelta(seconds=20))["rank"])
        except UserError as error:
            found.append(str(error))

    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(process_group, "rendezvous", return_value=turns),
    ):
        threads = [threading.Thread(target=rank) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    return found


def test_ranks_with_a_gpu_each_may_meet() -> None:
    assert sorted(meet(Numbered()), key=str) == [0, 1]


def test_two_ranks_on_the_only_gpu_are_refused_on_both() -> None:
    refusals = meet(Same())
    assert len(refusals) == 2
    assert all("ranks 0 and 1 have the same GPU; start at most one" in str(refusal) for refusal in refusals)


def test_the_group_gets_its_device_and_its_timeout() -> None:
    with pretend_gpu() as calls, process_group.process_group(77.0) as device:
        pass
    [group] = calls.groups
    assert device == group["device_id"] == torch.device("cuda", 0)
    assert group["timeout"] == timedelta(seconds=77)


@pytest.mark.parametrize("error", [UserError("a bad row"), RuntimeError("a kernel failed")])
def test_an_error_of_a_rank_aborts_its_group(error: Exception) -> None:
    with (
        mock.patch.object(dist.distributed_c10d, "_abort_process_group") as abort,
        pretend_gpu(),
        pytest.raises(type(error), match=str(error)),
        process_group.process_group(),
    ):
        raise error
    abort.assert_called_once_with()
    assert not dist.is_initialized()


@pytest.mark.parametrize(("key", "code"), [(process_group.USER_ERROR, 2), (process_group.FAILED, 1)])
def test_a_rank_that_waits_inside_nccl_ends_after_its_peer_has_failed(key: str, code: int) -> None:
    ended: list[int] = []
    with one_rank(), mock.patch.object(os, "_exit", ended.append):
        heartbeat = health.Heartbeat(120.0)
        heartbeat._store = dist.HashStore()
        for _ in range(20):
            heartbeat._end_with_failed_peer()
        assert ended == []
        heartbeat._store.set(key, "x")
        for _ in range(10):
            heartbeat._end_with_failed_peer()
        assert ended == [], "a main thread that is in gloo or in Python may end by itself"
        heartbeat._end_with_failed_peer()
    assert ended == [code]


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_a_resumed_adam_counts_its_steps_where_its_kernel_does(fused: bool | None, device: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    adam = torch.optim.Adam([weight])
    adam.defaults["fused"] = fused  # torch itself refuses it on meta
    assert dict(optimizer_values(adam, weight))["step"].device.type == device


@pytest.mark.parametrize(
    ("visible", "cuda", "reported"),
    [(None, "13.0", True), ("0", "13.0", True), ("", "13.0", False), ("-1", "13.0", False), (None, None, False)],
)
def test_a_cuda_build_without_a_driver_says_so(
    visible: str | None,
    cuda: str | None,
    reported: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def init() -> None:  # what torch 2.13.0+cu130 raises without a driver
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and ...")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert process_group._own_device() == torch.device("cpu")
    line = (
        "warning: training on the CPU, although this torch is built for CUDA 13.0: Found no NVIDIA driver on your "
        "system; nvidia-smi lists GPUs and driver, CUDA_VISIBLE_DEVICES= silences this\n"
    )
    assert capsys.readouterr().err == (line if reported else "")


@pytest.mark.parametrize(
    ("name", "capability", "reported"),
    [("Tesla T4", (7, 5), True), ("NVIDIA GeForce RTX 5090", (12, 0), True), ("NVIDIA L4", (8, 9), False)],
)
def test_a_gpu_without_kernels_is_reported(
    name: str, capability: tuple[int, int], reported: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    major, minor = capability
    with pretend_gpu(properties=replace(Properties(), name=name, major=major, minor=minor)):
        for rank in ("0", "1"):
            with mock.patch.dict(os.environ, RANK=rank):
                assert process_group._own_device() == torch.device("cuda", 0)
    assert process_group._FBGEMM_GENERATIONS == doctor._FBGEMM_GENERATIONS
    line = f"warning: {name} has compute capability {major}.{minor}, and the wheels of fbgemm-gpu hold kernels for "
    assert [shown.startswith(line) for shown in capsys.readouterr().err.splitlines()] == [True] * reported


@pytest.mark.parametrize(
    ("name", "memory", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", 81_559 * 2**20, "h100"),
        ("NVIDIA A100-SXM4-40GB", 40_960 * 2**20, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, "a100-80"),
        ("NVIDIA GB200", 186 * 2**30, "gb200"),
        ("NVIDIA B200", 180 * 2**30, "b200"),
        ("NVIDIA L4", 23_034 * 2**20, "l4"),
        ("Tesla T4", 15_360 * 2**20, "t4"),
        ("NVIDIA A10G", 23_028 * 2**20, "a10g"),
        ("NVIDIA GeForce RTX 4090", 24_564 * 2**20, "rtx4090"),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, memory: int, preset: str) -> None:
    with pretend_gpu(properties=replace(Properties(), name=name, total_memory=memory)):
        assert describe_hardware(None, torch.device("cuda", 0)).name == preset


def test_a_gpu_without_a_preset_is_described_by_its_properties() -> None:
    # The data sheet of the L40S says 48 GB at 864 GB/s; its driver reports 9,001 MHz and 384 bits.
    own = replace(
        Properties(), name="NVIDIA L40S", total_memory=46_068 * 2**20, memory_clock_rate=9_001_000, memory_bus_width=384
    )
    with pretend_gpu(properties=own):
        found = describe_hardware(None, torch.device("cuda", 0))
    assert (found.name, found.hbm_bytes, round(found.hbm_bandwidth / 1e9)) == ("NVIDIA L40S", 46_068 * 2**20, 864)


@pytest.mark.parametrize(
    ("gpus", "visible", "ranks"), [(1, None, 1), (8, None, 8), (0, None, 2), (8, "0,3", 2), (8, "", 2), (8, "5", 1)]
)
def test_make_train_starts_a_rank_for_each_gpu(gpus: int, visible: str | None, ranks: int, tmp_path: Path) -> None:
    lines: Sequence[str] = [f"GPU {i}: NVIDIA L4 (UUID: GPU-{i})" for i in range(gpus)]
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    smi.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "RANKS", "CUDA"))}
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    shown = subprocess.check_output(["make", "-n", "train"], cwd=ROOT, env=environment, text=True)
    assert f"run apps/deepfm.py -j 1x{ranks} " in shown

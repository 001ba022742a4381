"""Real ranks for the tests: processes of their own that talk over gloo.

    results = run_ranks(program, 2, argument)  # program(argument) on two ranks; its results by rank

A program is a function of a test module. As ranks take a second to meet, it does a whole module's work at once, and the
tests check its results. ``python -m tests.support.ranks`` is the rank itself.
"""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.support.fork import ROOT, Fork

CPU = torch.device("cpu")

T = TypeVar("T")


def run_ranks(program: Callable[..., T], world_size: int, *arguments: Any, timeout: float = 300) -> list[T]:
    """Run ``program(*arguments)`` on every rank of a new process group; return the results, by rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        group |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        words = [__name__, f"{program.__module__}:{program.__name__}", str(folder)]
        ranks = [
            Fork(
                words,
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=folder / "output",
                stderr=folder / "output",
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(rank.poll() is None for rank in ranks):
                failed = any(rank.poll() for rank in ranks)
                assert not failed, f"a rank failed:\n{read(folder / 'output')}"
                assert time.monotonic() < deadline, f"it hangs:\n{read(folder / 'output')}"
                time.sleep(0.02)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        assert not any(rank.returncode for rank in ranks), f"a rank failed:\n{read(folder / 'output')}"
        return [pickle.loads((folder / f"rank_{rank}").read_bytes()) for rank in range(world_size)]


def read(path: Path) -> str:
    """The end of an output file."""
    return path.read_text(errors="replace")[-6000:] if path.exists() else ""


def run_module(
    words: Sequence[str], timeout: float = 300, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m <words>``, or a file, without GPUs; stop it, and its ranks, if it hangs."""
    return run_modules([words], timeout, cwd, **env)[0]


def run_modules(
    commands: Sequence[Sequence[str]], timeout: float = 300, cwd: Path = ROOT, **env: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same of several at once, such as the launchers of several hosts."""
    with tempfile.TemporaryDirectory() as name:
        outputs = [(Path(name) / f"{number}.out", Path(name) / f"{number}.err") for number in range(len(commands))]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env
        jobs = [
            Fork(words, env=env, stdout=out, stderr=err, cwd=cwd)
            for words, (out, err) in zip(commands, outputs, strict=True)
        ]
        try:
            for job in jobs:
                job.wait(timeout)
        except subprocess.TimeoutExpired:
            for job in jobs:
                job.terminate()  # torchrun then stops its ranks, which a kill would leave behind
                job.wait(60)
            texts = "\n".join(read(path) for paths in outputs for path in paths)
            raise AssertionError(f"it hangs: {commands}\n{texts}") from None
        return [
            subprocess.CompletedProcess(list(job.args), job.wait(), out.read_text(), err.read_text())
            for job, (out, err) in zip(jobs, outputs, strict=True)
        ]


@contextmanager
def one_rank() -> Iterator[torch.device]:
    """A process group of this process alone, on the CPU."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield CPU
    finally:
        dist.destroy_process_group()


class _Pickler(pickle.Pickler):
    """Writes tensors as arrays, in a twentieth of the time."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.is_cpu and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _be_a_rank(program: str, folder: Path) -> None:
    module, name = program.split(":")
    function = getattr(importlib.import_module(module), name)
    dist.init_process_group("gloo")
    result = function(*pickle.loads((folder / "arguments").read_bytes()))
    with (folder / f"rank_{dist.get_rank()}").open("wb") as file:
        _Pickler(file).dump(result)
    dist.barrier()  # no rank tears down what another one still talks through
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the group and then abort the interpreter's teardown, after all the work


if __name__ == "__main__":
    _be_a_rank(sys.argv[1], Path(sys.argv[2]))

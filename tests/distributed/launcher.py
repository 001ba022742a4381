"""Real ranks for the tests: processes that torchrun starts and that talk over gloo.

    results = run_ranks(program, 2, argument)  # program(argument) on two ranks; its results by rank

A program is a function of a test module. As starting the ranks takes seconds, it does a whole module's work at once,
and the tests look at its results. ``python -m tests.distributed.launcher`` is the rank itself.
"""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

T = TypeVar("T")


def run_ranks(program: Callable[..., T], world_size: int, *arguments: Any) -> list[T]:
    """Run ``program(*arguments)`` on every rank of a new process group; return the results, by rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        call = ["-m", __name__, f"{program.__module__}:{program.__name__}", str(folder)]
        done = run_module([*torchrun, *call], OMP_NUM_THREADS="1")
        assert done.returncode == 0, f"the ranks failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return [pickle.loads((folder / f"rank_{rank}").read_bytes()) for rank in range(world_size)]


def run_module(words: Sequence[str], timeout: float = 150, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m <words>`` from the repository's root, without GPUs; stop it, and its ranks, if it hangs."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then stops its ranks, which a kill would leave behind
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"it hangs: {' '.join(words)}\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def one_rank() -> Iterator[torch.device]:
    """A process group of this process alone, on the CPU."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield CPU
    finally:
        dist.destroy_process_group()


def _be_a_rank(program: str, folder: Path) -> None:
    module, name = program.split(":")
    function = getattr(importlib.import_module(module), name)
    dist.init_process_group("gloo")
    result = function(*pickle.loads((folder / "arguments").read_bytes()))
    (folder / f"rank_{dist.get_rank()}").write_bytes(pickle.dumps(result))
    dist.barrier()  # no rank tears down what another one still talks through
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the group and then abort the interpreter's teardown, after all the work


if __name__ == "__main__":
    _be_a_rank(sys.argv[1], Path(sys.argv[2]))

"""The process group: a single process, or a rank that torchrun or TorchX started."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchrec_deepfm.distributed.cpu_memory import keep_freed_memory
from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.processes import local_world_size

T = TypeVar("T")

_USER_ERROR = "torchrec_deepfm/user_error"


@contextmanager
def process_group(timeout: float = 1800.0, *, cpu: bool = False) -> Iterator[torch.device]:
    """Join the process group of this run, or create one of a single process; leave it at the end.

    NCCL carries CUDA tensors if every local rank has a GPU, gloo everything else.

    Args:
        timeout: seconds after which a rank gives up waiting for the others.
        cpu: use no GPU.

    Yields:
        This rank's device, already set as the current one.

    Raises:
        UserError: fewer GPUs than local ranks; or a UserError that stopped another rank.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available() and not cpu:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        ranks_here = local_world_size()
        if ranks_here > torch.cuda.device_count():
            raise UserError(
                f"{ranks_here} ranks on this host, but {torch.cuda.device_count()} GPUs: start at most one rank "
                "per GPU (-j), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    _stay_on_this_host()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    else:
        store = torch._C._distributed_c10d.HashStore()  # torch.distributed re-exports it, but not for mypy
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        with raise_on_all_ranks():
            yield device
        dist.barrier()  # no rank closes connections that another one still uses
    finally:
        dist.destroy_process_group()


def _stay_on_this_host() -> None:
    """Let gloo and NCCL listen on the loopback interface only if all ranks are on one host.

    By default they listen on the interface of the host's name and accept connections from any address.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise the UserError of one rank, such as a bad value in its rows, on all ranks.

    The others only see a lost connection to that rank. So it leaves its message in the group's store, and they raise
    that instead.

    Yields:
        Nothing; call collectives inside.

    Raises:
        UserError: raised inside, or by another rank while this one failed.
    """
    store = dist.distributed_c10d._get_default_store()  # the group's own: it outlives each rank under torchrun
    try:
        yield
    except UserError as error:
        store.set(_USER_ERROR, str(error))
        raise
    except Exception as error:
        message = _peer_error(store)
        if message is None:
            raise
        raise UserError(message) from error


def _peer_error(store: torch._C._distributed_c10d.Store) -> str | None:
    try:
        return store.get(_USER_ERROR).decode() if store.check([_USER_ERROR]) else None
    except RuntimeError:  # the store ended with the process that held it
        return None


def is_main() -> bool:
    """Whether this is rank 0, the one that prints."""
    return dist.get_rank() == 0


def rank() -> int:
    """This rank's number."""
    return dist.get_rank()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size()


def gather(value: Any) -> list[Any]:
    """Gather a value from each rank; a collective.

    Args:
        value: picklable.

    Returns:
        The values, by rank.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def on_main(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone and return its result, or raise its error, on every rank; a collective.

    Args:
        work: its result must be picklable.

    Returns:
        The result, on every rank.

    Raises:
        UserError: ``work`` raised it, or an ``OSError``, on rank 0; every rank raises it again.
    """
    outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(work(), None)]
        except UserError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, refused(error.filename or "the disk", error))]
    dist.broadcast_object_list(outcome, src=0)
    result, refusal = outcome[0]
    if refusal is not None:
        raise refusal
    return result  # type: ignore[return-value]

"""The process group: a single process, or a rank that torchrun or TorchX started."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from torchrec_deepfm.distributed.cpu_memory import keep_freed_memory
from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.distributed.stop_signals import Preempted
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.launch.processes import local_world_size

T = TypeVar("T")

# Keys of the group's store: the message of a rank's UserError, and whether a rank has failed in another way.
USER_ERROR = "torchrec_deepfm/user_error"
FAILED = f"torchrec_deepfm/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
_FBGEMM_GENERATIONS = ("8.", "9.", "10.")  # as in doctor.py, which stands alone
_ONE_RANK_PER_GPU = (
    "start at most one rank per GPU (-j), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
)


@contextmanager
def process_group(timeout: float = 1800.0, *, cpu: bool = False, keep_memory: bool = True) -> Iterator[torch.device]:
    """Join the process group of this run, or create one of a single process; leave it at the end.

    NCCL carries CUDA tensors if every local rank has a GPU, gloo everything else.

    Args:
        timeout: seconds after which a rank gives up waiting for the others.
        cpu: use no GPU.
        keep_memory: on a CPU, keep freed memory for the next step (``cpu_memory.py``); a command with a limit does not.

    Yields:
        This rank's device, already set as the current one.

    Raises:
        UserError: fewer GPUs than local ranks; or a UserError that stopped another rank.
    """
    device = torch.device("cpu") if cpu else _own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif keep_memory:
        keep_freed_memory()
    _stay_on_this_host()
    limit = timedelta(seconds=timeout)
    options: dict[str, Any] = {"backend": "gloo", "timeout": limit}
    if device.type == "cuda":
        # With its device NCCL connects at once, so that what is wrong between the GPUs shows here, and not in a step.
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if "RANK" not in os.environ:
        store = torch._C._distributed_c10d.HashStore()  # torch.distributed re-exports it, but not for mypy
        options |= {"store": store, "rank": 0, "world_size": 1}
    elif device.type == "cuda" and torch.cuda.device_count() < local_world_size():
        options |= _meet_with_own_gpus(device, limit)
    dist.init_process_group(**options)
    try:
        with raise_on_all_ranks():
            yield device
        dist.barrier()  # no rank closes connections that another one still uses
    except BaseException:
        if device.type == "cuda":
            # The others wait inside NCCL for this rank; its own shutdown would wait for them.
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _own_device() -> torch.device:
    """This rank's GPU; the CPU where there is none."""
    if not torch.cuda.is_available():
        _report_no_gpu()
        return torch.device("cpu")
    gpus, ranks_here = torch.cuda.device_count(), local_world_size()
    if 1 < gpus < ranks_here:
        raise UserError(
            f"{ranks_here} ranks on this host, but {gpus} GPUs",
            remedy=_ONE_RANK_PER_GPU,
        )
    # Schedulers may show each rank one GPU of its own, as slurm's --gpus-per-task=1 does.
    device = torch.device("cuda", 0 if gpus == 1 else int(os.environ.get("LOCAL_RANK", "0")))
    _report_old_gpu(device)
    return device


def _report_old_gpu(device: torch.device) -> None:
    """Report on rank 0 a GPU for which FBGEMM's wheels have no kernels; a build of one's own may have them."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    if capability.startswith(_FBGEMM_GENERATIONS) or os.environ.get("RANK", "0") != "0":
        return
    sys.stderr.write(
        f"warning: {torch.cuda.get_device_name(device)} has compute capability {capability}, and the wheels of "
        "fbgemm-gpu hold kernels for 8.x, 9.0 and 10.x; build FBGEMM for this GPU, or train on the CPU with "
        "CUDA_VISIBLE_DEVICES=\n"
    )
    sys.stderr.flush()


def _report_no_gpu() -> None:
    """Report on rank 0 that a CUDA build finds no GPU, unless they are hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or os.environ.get("RANK", "0") != "0":
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "no GPU is found"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0].splitlines()[0]
    sys.stderr.write(
        f"warning: training on the CPU, although this torch is built for CUDA {torch.version.cuda}: {reason}; "
        "nvidia-smi lists GPUs and driver, CUDA_VISIBLE_DEVICES= silences this\n"
    )
    sys.stderr.flush()


def _meet_with_own_gpus(device: torch.device, timeout: timedelta) -> dict[str, Any]:
    """Check that ranks which see one GPU each do not see the same one; options for ``init_process_group``.

    NCCL would refuse the GPU later, with a page of its own.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = torch._C._distributed_c10d.PrefixStore("default_pg", store)
    mine = f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"
    store.set(f"torchrec_deepfm/gpu/{rank}", mine)
    seen: dict[str, int] = {}
    for other in range(world_size):
        gpu = store.get(f"torchrec_deepfm/gpu/{other}").decode()
        if gpu in seen:
            raise UserError(
                f"ranks {seen[gpu]} and {other} have the same GPU",
                remedy=_ONE_RANK_PER_GPU,
            )
        seen[gpu] = other
    return {"store": store, "rank": rank, "world_size": world_size}


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
        store.set(USER_ERROR, str(error))
        raise
    except Exception as error:
        message = _peer_error(store)
        if message is None:
            if not isinstance(error, Preempted):  # on request all ranks stop together
                with contextlib.suppress(RuntimeError):  # the store has ended too
                    store.set(FAILED, str(dist.get_rank()))
            raise
        raise UserError(message) from error


def _peer_error(store: torch._C._distributed_c10d.Store) -> str | None:
    try:
        return store.get(USER_ERROR).decode() if store.check([USER_ERROR]) else None
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

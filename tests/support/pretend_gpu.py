"""A GPU that is not there: `torch.cuda` answers as on one H100, and what is asked of "cuda" is computed on the CPU.

    with pretend_gpu() as calls:
        main(["train", ...])  # takes every branch for CUDA

What it can show: names, arguments and the order of calls on branches for CUDA, through the real TorchRec, DDP and
checkpoints. What it can not: kernels, NCCL, streams that really overlap, a tensor left on the other device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import SparseType  # noqa: F401 - loads FBGEMM's operators
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.train_pipeline.utils import DataLoadingThread

from torchrec_deepfm.model import arches
from torchrec_deepfm.sharding.plan import torchrec_plan

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What `torch.cuda.get_device_properties` returns, as far as anyone reads it."""

    name: str = "NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    total_memory: int = 81_559 * 2**20
    multi_processor_count: int = 132
    memory_clock_rate: int = 2_619_000  # kHz
    memory_bus_width: int = 5120


@dataclass(kw_only=True)
class Calls:
    """What was asked of the device.

    Attributes:
        groups: keywords of each `init_process_group`.
        synchronized: how often the whole device was waited for.
        devices: the devices of `set_device`.
        placements: of shards of tables, such as "rank:0/cuda:0".
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    synchronized: int = 0
    devices: list[Any] = field(default_factory=list)
    placements: set[str] = field(default_factory=set)


class Stream:
    """A stream on which work is done at once."""

    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record()
        return event


class Event:
    """An event of such a stream: it happens when it is recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self._at: float | None = None

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        assert self._at is not None, "an event that was not recorded"
        assert other._at is not None, "an event that was not recorded"
        return 1e3 * (other._at - self._at)


class _OnCpu(TorchFunctionMode):
    """Computes on the CPU what is asked of "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = [_moved(each) for each in args], {name: _moved(each) for name, each in (kwargs or {}).items()}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _moved(value: Any) -> Any:
    return tree_map(_to_cpu, value) if isinstance(value, list | tuple | dict | str | torch.device) else value


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return CPU if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _ignore(self: object, stream: object) -> None:
    """``record_stream``; a mock has no ``__name__``, which torch.fx reads of every method."""


@contextmanager
def pretend_gpu(count: int = 1, properties: Properties = Properties()) -> Iterator[Calls]:
    """Let `torch.cuda` answer as with `count` GPUs; yield what is asked of them."""
    calls = Calls()

    def synchronize(device: object = None) -> None:
        calls.synchronized += 1

    def init(backend: str, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        calls.groups.append({"backend": backend, "device_id": device_id, **kwargs})
        initialize("gloo", *args, **kwargs)

    def group(*args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)

    def fused(self: Any, embedding_specs: Any, *args: Any, device: Any = None, **kw: Any) -> None:
        assert {device for *_, device in embedding_specs} == {ComputeDevice.CUDA}
        specs = [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width, *_ in embedding_specs]
        tables(self, specs, *args, device=CPU, **kw)

    def dense(self: Any, *args: Any, use_cpu: bool = False, **kwargs: Any) -> None:
        assert not use_cpu
        replicated(self, *args, use_cpu=True, **kwargs)

    def parallel(self: Any, *args: Any, device_ids: Any = None, **kwargs: Any) -> None:
        assert device_ids, "DistributedDataParallel was not given its device"
        replicate(self, *args, device_ids=None, **kwargs)

    def place(*args: Any) -> str:
        calls.placements.add(there := placement(*args))
        return there.partition("/")[0] + "/cpu"

    def load(self: Any) -> None:
        with _OnCpu():  # a mode is a thread's own
            run(self)

    run = DataLoadingThread.run
    initialize, new_group = dist.init_process_group, dist.new_group
    tables, replicated = SplitTableBatchedEmbeddingBagsCodegen.__init__, DenseTableBatchedEmbeddingBagsCodegen.__init__
    replicate = DistributedDataParallel.__init__
    answers: dict[str, Callable[..., Any] | type] = {
        "is_available": lambda: count > 0,
        "is_initialized": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": calls.devices.append,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "is_bf16_supported": lambda *args: True,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Event", Event))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self, device=None: self))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", _ignore))
        stack.enter_context(mock.patch.object(arches, "_in_host_memory", return_value=False))
        stack.enter_context(mock.patch.object(torchrec_plan, "placement", place))
        stack.enter_context(mock.patch.object(DataLoadingThread, "run", load))
        stack.enter_context(mock.patch.object(dist, "init_process_group", init))
        stack.enter_context(mock.patch.object(dist, "new_group", group))
        stack.enter_context(mock.patch.object(SplitTableBatchedEmbeddingBagsCodegen, "__init__", fused))
        stack.enter_context(mock.patch.object(DenseTableBatchedEmbeddingBagsCodegen, "__init__", dense))
        stack.enter_context(mock.patch.object(DistributedDataParallel, "__init__", parallel))
        stack.enter_context(_OnCpu())
        yield calls

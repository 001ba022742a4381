"""Bytes that the collectives of a piece of work carry, counted at torch's dispatcher.

Every collective of ``torch.distributed`` passes the dispatcher as an operator ``c10d::...``, those that
``DistributedDataParallel`` starts in C++ too. The count is of tensors' sizes, so it is exact and the same on gloo and
NCCL. What a collective sends to other ranks is given as NVIDIA's nccl-tests define it: the bytes that have to leave a
rank whatever the algorithm, and for an all-reduce those of a ring.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchrec_deepfm.experiment.results import CollectiveBytes


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective as this rank took part in it.

    Attributes:
        kind: ``all_to_all``, ``all_reduce``, ``reduce_scatter``, ``all_gather``, ``broadcast`` or the operator's name.
        ranks: size of its process group.
        given: bytes of the tensors that this rank put in.
        sent: bytes that leave this rank for others.
    """

    kind: str
    ranks: int
    given: int
    sent: int


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every collective that starts inside it, on this thread and in the backward passes that it starts.

    Counting slows the host down, so time other steps than those.

    Example:
        >>> from torch._C._distributed_c10d import HashStore
        >>> dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        >>> with CollectiveCounter() as traffic:
        ...     dist.all_reduce(torch.ones(10))
        >>> traffic.collectives
        [Collective(kind='all_reduce', ranks=1, given=40, sent=0)]
        >>> dist.destroy_process_group()
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: list[Collective] = []

    def __torch_dispatch__(  # noqa: D105 (torch's own hook)
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            kind, sent = _COLLECTIVES.get(name, (name.strip("_"), _nothing))
            if kind != "barrier":
                group = next(dist.ProcessGroup.unbox(value) for value in args if isinstance(value, torch.ScriptObject))
                given = _bytes(args[_GIVEN.get(name, 0)])
                self.collectives.append(
                    Collective(kind=kind, ranks=group.size(), given=given, sent=sent(args, given, group))
                )
        return func(*args, **(kwargs or {}))

    def by_kind(self) -> dict[str, CollectiveBytes]:
        """Sum the collectives of each kind."""
        sums: dict[str, CollectiveBytes] = {}
        for one in self.collectives:
            total = sums.get(one.kind, CollectiveBytes())
            sums[one.kind] = CollectiveBytes(
                calls=total.calls + 1,
                given_bytes=total.given_bytes + one.given,
                sent_bytes=total.sent_bytes + one.sent,
            )
        return dict(sorted(sums.items()))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors) if isinstance(tensors, Iterable) else 0


def _all_to_all(args: tuple[Any, ...], given: int, group: dist.ProcessGroup) -> int:
    splits, tensor = args[4], args[1]
    if not splits:
        return given - given // group.size()
    own = splits[group.rank()] * (given // tensor.shape[0] if tensor.shape[0] else 0)
    return given - int(own)


def _list_without_own(args: tuple[Any, ...], given: int, group: dist.ProcessGroup) -> int:
    return given - sum(_bytes(tensors[group.rank()]) for tensors in args[1])


def _broadcast(args: tuple[Any, ...], given: int, group: dist.ProcessGroup) -> int:
    return given if args[2] == group.rank() and group.size() > 1 else 0


def _nothing(_args: tuple[Any, ...], _given: int, _group: dist.ProcessGroup) -> int:
    return 0


_Sent = Callable[[tuple[Any, ...], int, dist.ProcessGroup], int]
_COLLECTIVES: dict[str, tuple[str, _Sent]] = {
    "alltoall_base_": ("all_to_all", _all_to_all),
    "allreduce_": ("all_reduce", lambda _, given, group: 2 * given * (group.size() - 1) // group.size()),
    "_reduce_scatter_base_": ("reduce_scatter", lambda _, given, group: given * (group.size() - 1) // group.size()),
    "reduce_scatter_": ("reduce_scatter", _list_without_own),
    "_allgather_base_": ("all_gather", lambda _, given, group: given * (group.size() - 1)),
    "allgather_": ("all_gather", lambda _, given, group: given * (group.size() - 1)),
    "broadcast_": ("broadcast", _broadcast),
    "barrier": ("barrier", _nothing),
}
# Position of the tensors that a rank puts in; 0 for operators that are not listed.
_GIVEN = {"alltoall_base_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_": 1, "_allgather_base_": 1, "allgather_": 1}

"""The tensors of a training by name: weights, optimizer values, and values of single ranks.

Names and meanings do not depend on the plan, so any plan on any number of ranks reads what another one wrote:

    model.<parameter>                  weights and buffers
    average.<parameter>                their moving average, if one is kept
    optimizer.<table>.sum              Adagrad's sum of squares; for rowwise Adagrad [rows, C], see below
    optimizer.<parameter>.exp_avg      Adam's; also .exp_avg_sq and .step
    ranks.<name>                       [ranks, ...]: a row per rank, such as its random state

Rowwise Adagrad keeps one number per row and column shard: the sum over the steps of the mean of the squared gradient,
over the shard's columns. A table in C column shards thus has C numbers per row. They are saved as such, with the
first columns of the shards (``columns`` in the manifest). If a plan with other borders reads them, a shard's number is
the mean of those it overlaps, weighted by the common columns. That is exact for merged shards; a shard that is split
passes its number to each part, since the sums of the parts were never kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchrec_deepfm.sharding.inputs.sharding_types import SparseOptimizer
from torchrec_deepfm.sharding.runtime.init_tables import local_shards, purge_row_caches
from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts

Columns = Mapping[str, Sequence[int]]


def model_state(model: DistributedModelParallel) -> dict[str, TensorCuts]:
    """Name the weights and buffers of a model.

    Returns views of its memory: reading into them, inside ``writing``, changes the model. To save it, pass it through
    ``owned`` first.
    """
    state, written = {}, partial(purge_row_caches, model)
    for name, value in model.state_dict().items():
        kind = _Sharded if hasattr(value, "local_shards") else TensorCuts
        cuts = [
            Cut((row, column) if shard.dim() == 2 else (0,) * shard.dim(), shard)
            for shard, row, column in local_shards(value)
        ]
        state[f"model.{name}"] = kind(tuple(value.size()), cuts, written)
    return state


def average_state(state: Mapping[str, TensorCuts]) -> dict[str, TensorCuts]:
    """Rename a model's weights to ``average.<parameter>`` of a checkpoint, except integers, which have no average."""
    return {
        name.replace("model.", "average.", 1)
        if all(cut.tensor.is_floating_point() for cut in tensor_cuts.cuts)
        else name: tensor_cuts
        for name, tensor_cuts in state.items()
    }


def local_buffers(model: DistributedModelParallel) -> dict[str, Tensor]:
    """Return the buffers that differ between ranks: the running statistics of batch normalisation, as views."""
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: value
        for name, value in sorted(model.state_dict().items())
        if name not in parameters and isinstance(value, Tensor) and value.is_floating_point() and not _is_table(name)
    }


def averaged(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of ``local_buffers`` over the ranks; a collective.

    Args:
        buffers: those of this rank.

    Returns:
        Copies by name, the same on every rank.
    """
    if not buffers:
        return {}
    flat = torch.cat([value.reshape(-1) for value in buffers.values()])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([value.numel() for value in buffers.values()])  # type: ignore[no-untyped-call]
    return {name: part.view_as(value) for (name, value), part in zip(buffers.items(), parts, strict=True)}


@contextmanager
def averaged_buffers(model: DistributedModelParallel) -> Iterator[None]:
    """Give all ranks the mean of their batch statistics inside, and restore their own afterwards; a collective.

    Args:
        model: the sharded model.

    Yields:
        Nothing; evaluate or save inside.
    """
    buffers = local_buffers(model)
    own = {name: value.clone() for name, value in buffers.items()}
    for name, value in averaged(buffers).items():
        buffers[name].copy_(value)
    try:
        yield
    finally:
        for name, value in own.items():
            buffers[name].copy_(value)


def owned(state: Mapping[str, TensorCuts]) -> dict[str, TensorCuts]:
    """Leave out the replicated tensors, which rank 0 saves for all.

    ``state``: of ``model_state`` or ``optimizer_state``. Returns the same names; on rank 0 all cuts, on the others only
    those of sharded tensors.
    """
    if dist.get_rank() == 0:
        return dict(state)
    return {
        name: tensor_cuts if isinstance(tensor_cuts, _Sharded) else TensorCuts(tensor_cuts.size)
        for name, tensor_cuts in state.items()
    }


@dataclass(frozen=True)
class _Sharded(TensorCuts):
    """Cuts that no two ranks share."""


def table_columns(model: DistributedModelParallel) -> dict[str, list[int]]:
    """Return the first columns of the shards of each table, ``[0]`` for a table that is not split by columns."""
    columns = {}
    for name, value in model.state_dict().items():
        if _is_table(name):
            shards = value.metadata().shards_metadata if hasattr(value, "metadata") else []
            columns[name] = sorted({int(shard.shard_offsets[1]) for shard in shards}) or [0]
    return columns


class TrainingTensors:
    """The weights and optimizer values of a training, to save or to read.

    ``optimizer``: of ``make_optimizer``, for that model.

    Attributes:
        columns: the first columns of the shards of each table.
        widths: columns of each table.
    """

    def __init__(
        self, model: DistributedModelParallel, optimizer: CombinedOptimizer, sparse_optimizer: SparseOptimizer
    ) -> None:
        self._model, self._optimizer = model, optimizer
        # Whether the tables' optimizer keeps a number per row (True) or per weight (False); None if it keeps none.
        self._rowwise = {"rowwise_adagrad": True, "adagrad": False, "sgd": None, "adam": None}[sparse_optimizer]
        self._adam = sparse_optimizer == "adam"
        self.columns = table_columns(model)
        self.widths = {name: int(value.size(1)) for name, value in model.state_dict().items() if _is_table(name)}

    def to_save(self) -> dict[str, TensorCuts]:
        """Return the state that this rank saves; a collective."""
        state = model_state(self._model)
        for name, value in averaged(local_buffers(self._model)).items():
            state[f"model.{name}"] = TensorCuts(tuple(value.size()), [Cut((0,) * value.dim(), value)])
        for name, rows, width, moments in self._fused():
            if not self._rowwise:
                cuts = [Cut((row, column), moment) for moment, row, column, _ in moments]
                state[f"optimizer.{name}.sum"] = _Sharded((rows, width), cuts)
                continue
            begins = list(self.columns[name])
            cuts = [Cut((row, begins.index(column)), moment.view(-1, 1)) for moment, row, column, _ in moments]
            state[f"optimizer.{name}.sum"] = _Sharded((rows, len(begins)), cuts)
        for name, kind, value in self._eager():
            state[f"optimizer.{name}.{kind}"] = TensorCuts(tuple(value.size()), [Cut((0,) * value.dim(), value)])
        return owned(state | self._adam_shards())

    def to_read(self, columns: Columns) -> tuple[dict[str, TensorCuts], Callable[[], None]]:
        """Return the state that this rank reads; ``columns`` are the first ones of the saved shards of each table."""
        state = model_state(self._model)
        rest: list[Callable[[], None]] = []
        for name, rows, width, moments in self._fused():
            key, begins = f"optimizer.{name}.sum", list(columns[name])
            if not self._rowwise:
                state[key] = TensorCuts(
                    (rows, width), [Cut((row, column), moment) for moment, row, column, _ in moments]
                )
                continue
            cuts = []
            for moment, row, column, count in moments:
                overlaps = _overlaps([*begins, width], column, count)
                first = min(overlaps)
                if len(overlaps) == 1:
                    cuts.append(Cut((row, first), moment.view(-1, 1)))
                    continue
                read = torch.empty(len(moment), len(overlaps))
                cuts.append(Cut((row, first), read))
                rest.append(_merge(moment, read, list(overlaps.values())))
            state[key] = TensorCuts((rows, len(begins)), cuts)
        state |= self._adam_shards()
        parameters = self._optimizer.params
        for name, kind, value in self._eager():
            key, parameter = f"optimizer.{name}.{kind}", parameters[name]
            begins = list(columns[name]) if name in columns else [0]
            if kind == "sum" and value.shape[1:] == (1,) and len(begins) > 1:
                read = torch.empty(len(value), len(begins), dtype=value.dtype)
                width = int(parameter.shape[1])
                widths = [end - begin for begin, end in zip(begins, [*begins[1:], width], strict=True)]
                state[key] = TensorCuts(tuple(read.size()), [Cut((0, 0), read)])
                rest.append(_merge(value, read, widths))
            else:
                state[key] = TensorCuts(tuple(value.size()), [Cut((0,) * value.dim(), value)])

        def finish() -> None:
            for call in rest:
                call()

        return state, finish

    def _fused(self) -> Iterator[tuple[str, int, int, list[tuple[Tensor, int, int, int]]]]:
        """Sums of the sharded tables: name, rows, columns, and local (values, first row, first column, columns)."""
        if self._rowwise is None:
            return
        states = self._model.fused_optimizer.state_dict()["state"]
        for name, weight in self._model.state_dict().items():
            if not _is_table(name) or not hasattr(weight, "local_shards"):
                continue
            shards = list(local_shards(weight))
            sums = next(iter(states[name].values())).local_shards() if shards else []
            moments = [
                (shard.tensor, row, column, tensor.shape[1])
                for shard, (tensor, row, column) in zip(sums, shards, strict=True)  # TorchRec keeps both in one order
            ]
            assert all(len(moment) == len(tensor) for (moment, *_), (tensor, *_) in zip(moments, shards, strict=True))
            rows, width = (int(each) for each in weight.size())
            yield name, rows, width, moments

    def _adam_shards(self) -> dict[str, TensorCuts]:
        """Adam's values of the sharded tables, named as those of replicated ones."""
        if not self._adam:
            return {}
        values = {(name, kind): value for name, kind, value in self._values()}
        steps = next(value for (_, kind), value in values.items() if kind == "step")  # the same for all
        state: dict[str, TensorCuts] = {}
        for name, weight in self._model.state_dict().items():
            if _is_table(name) and hasattr(weight, "local_shards"):
                size, shards = tuple(weight.size()), list(local_shards(weight))
                for kind in ("exp_avg", "exp_avg_sq"):
                    cuts = [Cut((row, column), values[name, kind]) for _, row, column in shards]
                    state[f"optimizer.{name}.{kind}"] = _Sharded(size, cuts)
                state[f"optimizer.{name}.step"] = TensorCuts((), [Cut((), values.get((name, "step"), steps))])
        return state

    def _eager(self) -> Iterator[tuple[str, str, Tensor]]:
        """Values of the optimizers that are not fused, equal on all ranks: parameter, kind, values."""
        weights = self._model.state_dict()
        return (one for one in self._values() if not hasattr(weights[one[0]], "local_shards"))

    def _values(self) -> Iterator[tuple[str, str, Tensor]]:
        """Values of the optimizers that are not fused, of a sharded table those of this rank's shard."""
        for _, keyed in self._optimizer.optimizers:
            if isinstance(keyed, KeyedOptimizerWrapper):
                inner = keyed._optimizer
                for name, parameter in keyed.params.items():
                    yield from ((name, kind, value) for kind, value in optimizer_values(inner, parameter))


def optimizer_values(optimizer: torch.optim.Optimizer, parameter: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and memory of an optimizer's values of a parameter, creating them if no step has done so."""
    values = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.Adam) and not values:
        # Adam counts on the CPU, except in its fused kernel.
        values["step"] = torch.tensor(0.0, device=parameter.device if optimizer.defaults["fused"] else None)
        values["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        values["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    for kind in sorted(values):
        if isinstance(values[kind], Tensor) and not (kind == "step" and "sum" in values):  # Adagrad does not use it
            yield kind, values[kind].detach()


def _is_table(name: str) -> bool:
    return ".embedding_bags." in name and name.endswith(".weight")


def _overlaps(borders: Sequence[int], column: int, count: int) -> dict[int, int]:
    """Count the columns in ``[column, column + count)`` of each saved shard, by its number."""
    common = {
        number: min(end, column + count) - max(begin, column) for number, (begin, end) in enumerate(pairwise(borders))
    }
    return {number: columns for number, columns in common.items() if columns > 0}


def _merge(moment: Tensor, read: Tensor, widths: Sequence[int]) -> Callable[[], None]:
    def merge() -> None:
        weights = torch.tensor(widths, dtype=torch.float64, device=read.device) / sum(widths)
        moment.copy_((read.double() * weights).sum(1).view(moment.shape))

    return merge


def rank_rows(name: str, mine: Tensor) -> tuple[str, TensorCuts]:
    """Name a tensor that differs between ranks but has one shape: its key, and the row of this rank."""
    size = (dist.get_world_size(), *mine.shape)
    return f"ranks.{name}", _Sharded(size, [Cut((dist.get_rank(), *(0,) * mine.dim()), mine.unsqueeze(0))])


def read_rank_rows(
    name: str, world_size: int, shape: Sequence[int], dtype: torch.dtype
) -> tuple[str, TensorCuts, Tensor]:
    """Request the tensors, of this shape and type, that ``world_size`` ranks saved with ``rank_rows``.

    Returns the key, the cuts to read into, and their memory [world_size, *shape].
    """
    memory = torch.empty(world_size, *shape, dtype=dtype)
    return f"ranks.{name}", TensorCuts(tuple(memory.size()), [Cut((0,) * memory.dim(), memory)]), memory


def all_finite(tensors: Mapping[str, TensorCuts]) -> str | None:
    """Return the name of a tensor with a NaN or an infinity in it; None if there is none."""
    for name, tensor_cuts in tensors.items():
        for cut in tensor_cuts.cuts:
            if cut.tensor.is_floating_point() and not bool(torch.isfinite(cut.tensor).all()):
                return name
    return None

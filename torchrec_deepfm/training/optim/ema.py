"""An exponential moving average of all weights, including fused and sharded tables."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts, writing
from torchrec_deepfm.training.checkpoint.tensors import (
    averaged,
    local_buffers,
    model_state,
    owned,
    rank_rows,
    read_rank_rows,
)

# Numbers swapped at a time, so that a large shard needs no second copy of itself.
_CHUNK = 2**24


def decay_at(step: int, decay: float) -> float:
    """The decay of the average at a step: small at the start, so that the initial weights are soon forgotten.

    Example:
        >>> [round(decay_at(step, 0.99), 3) for step in (1, 2, 11, 101, 1001)]
        [0.1, 0.182, 0.55, 0.918, 0.99]
    """
    return min(decay, step / (9 + step))


class MovingAverage:
    r"""Keeps a moving average of all floating-point weights and buffers; each rank averages its own shards.

    .. math:: \bar\theta_t = d_t^n \bar\theta_{t-n} + (1 - d_t^n) \theta_t, \quad d_t = \min(d, t / (t + 9))

    at every n-th step t. For values that have not changed in between, such as most rows of a large table, this equals
    the average over all steps; for the others it averages every n-th state. The last update may come after fewer than
    n steps and uses that number as n. Running statistics of batch normalisation are averaged like the weights.

    (``torch.optim.swa_utils.AveragedModel`` copies the module, and a sharded model can't be copied: it has process
    groups and kernels that own their memory. The averaging itself is torch's.)
    """

    def __init__(self, model: DistributedModelParallel, decay: float, every: int = 1) -> None:
        self._model, self._decay, self._every = model, decay, every
        # Buffers and shards stay the same tensors as long as the model lives.
        self._weights = {
            name: tensor_cuts
            for name, tensor_cuts in model_state(model).items()
            if all(cut.tensor.is_floating_point() for cut in tensor_cuts.cuts)
        }
        self._average = {
            name.replace("model.", "average.", 1): dataclasses.replace(
                tensor_cuts, cuts=[Cut(cut.offsets, cut.tensor.detach().clone()) for cut in tensor_cuts.cuts]
            )
            for name, tensor_cuts in self._weights.items()
        }
        self._pairs = [
            (cut.tensor.detach(), mine.tensor)
            for tensor_cuts, average in zip(self._weights.values(), self._average.values(), strict=True)
            for cut, mine in zip(tensor_cuts.cuts, average.cuts, strict=True)
        ]
        self._buffers = {
            f"average.{name}": self._average[f"average.{name}"].cuts[0].tensor for name in local_buffers(model)
        }

    def update(self, step: int, *, last: bool = False) -> None:
        """Update the average after a step, if an update is due; at the end of the training one always is."""
        since = step % self._every
        if since and not last:
            return
        decay = decay_at(step, self._decay) ** (since or self._every)
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update([mine for _, mine in self._pairs], [weight for weight, _ in self._pairs], None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the average into the model inside, to evaluate or save, and the weights back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def to_save(self) -> dict[str, TensorCuts]:
        """Return the averages that this rank saves; a collective.

        Returns:
            ``average.<parameter>``, like ``model.<parameter>`` in ``tensors.py``, and the buffers of each rank.
        """
        state = dict(self._average)
        for name, value in averaged(self._buffers).items():
            state[name] = TensorCuts(tuple(value.size()), [Cut((0,) * value.dim(), value)])
        return owned(state) | dict(rank_rows(name, value) for name, value in self._buffers.items())

    def to_read(self, world_size: int) -> tuple[dict[str, TensorCuts], Callable[[], None]]:
        """Return the averages that this rank reads from a checkpoint."""
        state, own = dict(self._average), {}
        for name, buffer in self._buffers.items():
            key, state[key], own[name] = read_rank_rows(name, world_size, buffer.shape, buffer.dtype)

        def finish() -> None:
            if world_size == dist.get_world_size():
                for name, rows in own.items():
                    self._buffers[name].copy_(rows[dist.get_rank()])

        return state, finish

    @torch.no_grad()
    def _swap(self) -> None:
        with writing(self._weights):
            for weight, mine in self._pairs:
                rows = max(_CHUNK // max(weight[:1].numel(), 1), 1)
                for there, here in zip(torch.split(weight, rows), torch.split(mine, rows), strict=True):
                    kept = there.clone()
                    there.copy_(here)
                    here.copy_(kept)

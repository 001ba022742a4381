"""The state that differs between ranks: random numbers, losses not yet recorded, batch statistics."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_deepfm.training.checkpoint.dcp import TensorCuts
from torchrec_deepfm.training.checkpoint.tensors import local_buffers, rank_rows, read_rank_rows


class RankState:
    """Saves and reads the state of this rank."""

    def __init__(self, model: DistributedModelParallel, device: torch.device, seed: int) -> None:
        self._model, self._device, self._seed = model, device, seed

    def to_save(self, losses: Sequence[Tensor]) -> tuple[dict[str, TensorCuts], dict[str, int]]:
        """Return the rows that this rank saves, and the counts that the manifest records for ``to_read``.

        ``losses`` are those since the last record, each a scalar; the same number on every rank.
        """
        random = _random_state(self._device)
        kept = [loss.to(self._device) for loss in losses]  # of before a resume they are on the CPU
        rows = {
            "random": random,
            "losses": torch.stack(kept).float().cpu() if kept else torch.empty(0),
            **{f"model.{name}": value for name, value in local_buffers(self._model).items()},
        }
        counts = {"world_size": dist.get_world_size(), "random": len(random), "losses": len(losses)}
        return dict(rank_rows(name, mine) for name, mine in rows.items()), counts

    def to_read(
        self, *, ranks: int, random_bytes: int, losses: int
    ) -> tuple[dict[str, TensorCuts], Callable[[int], list[Tensor]]]:
        """Return the state that this rank reads from a checkpoint.

        Returns the state to read into, and a function to call with the step once it has been read, which returns the
        losses. If the number of ranks has changed, these are means over the ranks, and random numbers start anew.
        """
        state, own = {}, {}
        key, state[key], random = read_rank_rows("random", ranks, [random_bytes], torch.uint8)
        key, state[key], read = read_rank_rows("losses", ranks, [losses], torch.float32)
        buffers = local_buffers(self._model)
        for name, buffer in buffers.items():
            key, state[key], own[name] = read_rank_rows(f"model.{name}", ranks, buffer.shape, buffer.dtype)

        def restore(step: int) -> list[Tensor]:
            rank = dist.get_rank()
            if ranks != dist.get_world_size():
                torch.manual_seed(self._seed + 1 + rank + 1_000_003 * step)
                return list(read.mean(0).unbind())
            _set_random_state(random[rank], self._device)
            for name, values in own.items():
                buffers[name].copy_(values[rank])
            return list(read[rank].unbind())

        return state, restore


def _random_state(device: torch.device) -> Tensor:
    """The state of this rank's random numbers, uint8 [n]: the CPU's, then the GPU's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    count = len(torch.get_rng_state())
    torch.set_rng_state(state[:count].clone())
    if device.type == "cuda" and len(state) > count:
        torch.cuda.set_rng_state(state[count:].clone(), device)

"""Samples and weights for models that are compared across ranks."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch


@dataclass(frozen=True, kw_only=True)
class Sample:
    numbers: list[float]
    bags: dict[str, list[int]]
    label: int


def draw(count: int, sizes: Mapping[str, int], numeric: int, *, longest: int = 1, seed: int = 0) -> list[Sample]:
    """Samples with one id per feature, or, where ``longest`` says so, bags of 0 to ``longest`` ids."""
    rng = random.Random(seed)
    shortest = 1 if longest == 1 else 0
    return [
        Sample(
            numbers=[rng.uniform(-1.0, 1.0) for _ in range(numeric)],
            # Half of the ids from the first few, so that rows meet again within a batch and between batches.
            bags={
                name: [rng.randrange(rng.choice([min(size, 5), size])) for _ in range(rng.randint(shortest, longest))]
                for name, size in sizes.items()
            },
            label=rng.randint(0, 1),
        )
        for _ in range(count)
    ]


def to_batch(samples: Sequence[Sample], keys: Sequence[str]) -> Batch:
    """A batch with the keys in the given order."""
    bags = [sample.bags[key] for key in keys for sample in samples]
    return Batch(
        dense_features=torch.tensor([sample.numbers for sample in samples], dtype=torch.float32),
        sparse_features=KeyedJaggedTensor(
            keys=list(keys),
            values=torch.tensor([i for bag in bags for i in bag], dtype=torch.int32),
            lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
        ),
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.int32),
    )


def batches_of_rank(samples: Sequence[Sample], keys: Sequence[str], global_batch: int) -> list[Batch]:
    """This rank's part of each global batch: the r-th of W equal pieces."""
    share = global_batch // dist.get_world_size()
    first = dist.get_rank() * share
    starts = range(first, len(samples), global_batch)
    return [to_batch(samples[start : start + share], keys) for start in starts]


def read_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights out of a model, tables put together from their shards on all ranks; a collective."""
    held = model.state_dict()
    state = {name: value.detach().clone() for name, value in held.items() if not _is_sharded(value)}
    tables = {name: value for name, value in held.items() if _is_sharded(value)}
    mine = {
        name: [(shard.metadata.shard_offsets, shard.tensor.detach().cpu().numpy()) for shard in value.local_shards()]
        for name, value in tables.items()
    }
    everyones: list[Any] = [None] * (dist.get_world_size() if tables else 0)
    if tables:
        dist.all_gather_object(everyones, mine)
    for name, value in tables.items():
        whole = torch.full(tuple(value.size()), torch.nan)
        for shards in everyones:
            for (row, column), cut in shards[name]:
                whole[row : row + cut.shape[0], column : column + cut.shape[1]] = torch.from_numpy(cut)
        assert not whole.isnan().any(), f"{name}: the shards leave a hole"
        state[name] = whole
    return state


def _is_sharded(value: Tensor) -> bool:
    return hasattr(value, "local_shards")


def write_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, each rank what it holds."""
    mine = model.state_dict()
    assert set(mine) == set(state)
    with torch.no_grad():
        for name, value in mine.items():
            if not _is_sharded(value):
                value.copy_(state[name])
                continue
            for shard in value.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(state[name][row : row + rows, column : column + columns])

"""Are ids rows of their tables? In host memory at once; on a GPU by bounds that stay there until they are read."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.errors import UserError


def check_ids(sparse_features: KeyedJaggedTensor, num_embeddings: Mapping[str, int]) -> None:
    """Check the ids of a batch in host memory.

    Args:
        sparse_features: the batch.
        num_embeddings: rows of each feature's table; features that it lacks are not checked.

    Raises:
        UserError: an id is negative or past the end of its table.
    """
    values = sparse_features.values()
    ends = sparse_features.offset_per_key()
    for key, start, end in zip(sparse_features.keys(), ends, ends[1:], strict=False):
        if start == end or key not in num_embeddings:
            continue
        low, high = (int(bound) for bound in values[start:end].aminmax())
        _refuse_outside(key, low, high, num_embeddings)


class SeenIds:
    """The smallest and the largest id of each feature so far, on the device of the ids.

    A check there and then would wait for the GPU at each step. FBGEMM's dense kernel, that of data_parallel tables,
    reads past the end of a table without a word; the fused ones print a line and take row 0.
    """

    def __init__(self) -> None:
        self._bounds: dict[tuple[tuple[str, ...], torch.dtype], tuple[Tensor, Tensor]] = {}

    def add(self, sparse_features: KeyedJaggedTensor) -> None:
        """Note the ids of a batch; nothing is waited for."""
        values = sparse_features.values()
        if not values.numel():
            return
        sizes = sparse_features.length_per_key()
        if len(set(sizes)) == 1:  # one id per row and feature: two reductions for all features
            low, high = values.view(len(sizes), -1).aminmax(dim=1)
        else:
            pieces = [piece if piece.numel() else piece.new_zeros(1) for piece in torch.split(values, sizes)]
            low, high = (torch.stack(bounds) for bounds in zip(*(piece.aminmax() for piece in pieces), strict=True))
        name = tuple(sparse_features.keys()), values.dtype
        before = self._bounds.get(name, (low, high))
        self._bounds[name] = torch.minimum(before[0], low), torch.maximum(before[1], high)

    def check(self, num_embeddings: Mapping[str, int]) -> None:
        """Read the bounds, which waits for the device.

        Args:
            num_embeddings: as for ``check_ids``.

        Raises:
            UserError: as for ``check_ids``.
        """
        for (keys, _), bounds in self._bounds.items():
            for key, low, high in zip(keys, *torch.stack(bounds).tolist(), strict=True):
                if key in num_embeddings:
                    _refuse_outside(key, low, high, num_embeddings)


def _refuse_outside(key: str, low: int, high: int, num_embeddings: Mapping[str, int]) -> None:
    if low < 0 or high >= num_embeddings[key]:
        raise UserError(
            f"feature {key!r} has the id {low if low < 0 else high}, but its table has "
            f"{num_embeddings[key]} rows (ids 0 to {num_embeddings[key] - 1})",
            remedy="build the tables with the num_embeddings of the data",
        )

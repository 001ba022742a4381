"""CowClip (arXiv 2204.06240): a limit on the gradient of each row that grows with the row and how often it is seen.

Shapes: B samples of all ranks (on a replicated table: of this one), K factor_dim, C columns of a row or of its shard.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag, BatchedDenseEmbeddingBag
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.training.config import TrainConfig

Kernel = BaseBatchedEmbeddingBag[Any]


class CowClip:
    r"""Clips the gradient g of the latent vector v of each row, before the optimizer sees it.

    .. math:: g \leftarrow \min\left(1, \frac{n \max(r \lVert v \rVert, \zeta)}{\lVert g \rVert}\right) g

    n is how many samples of the batch, over all ranks, look the row up (1 for a row that only a penalty moves). The
    first-order weight is left alone, as in the authors' code. Where the optimizer is fused, the gradients of a kernel's
    bags are scaled on their way into it: its rank has those of all samples there. Otherwise the rows of the table's
    gradient are scaled before the step, penalties included: ``parameters`` are those not fused, by name. Each bag holds
    one id or none.

    (FBGEMM's own ``WeightDecayMode.COWCLIP`` is another rule: with row-wise Adagrad alone, n counts the steps so far
    that saw the row, first-order weight and padding are part of the norms, and Adagrad's sum takes the whole gradient.)
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self._width, self._ratio, self._bound = config.factor_dim, config.cowclip_ratio, config.cowclip_bound
        self._tables = {
            name.rsplit(".", 2)[-2]: weight for name, weight in parameters.items() if ".embedding_bags." in name
        }
        self._seen: dict[str, Tensor] = {}
        for kernel in _kernels(model):
            dense = isinstance(kernel, BatchedDenseEmbeddingBag)
            kernel.register_forward_hook(self._count if dense else self._clip_bags)

    @torch.no_grad()
    def clip_tables(self) -> None:
        """Clip the gradients of the tables that are not fused; a collective. Call it once per step."""
        if not self._tables:
            return
        counts = torch.cat([self._counts(name, weight) for name, weight in self._tables.items()])
        self._seen = {}
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        sizes = [len(weight) for weight in self._tables.values()]
        for weight, seen in zip(self._tables.values(), torch.split(counts, sizes), strict=True):
            if weight.grad is not None:
                vectors, gradient = weight[:, : self._width], weight.grad[:, : self._width]
                scale = self._scale(seen.clamp(min=1.0), vectors.norm(dim=1), gradient.norm(dim=1))
                gradient.mul_(scale.unsqueeze(1))

    def _counts(self, name: str, weight: Tensor) -> Tensor:
        return self._seen[name] if name in self._seen else weight.new_zeros(len(weight))

    def _scale(self, seen: Tensor, norm: Tensor, gradient_norm: Tensor) -> Tensor:
        limit = seen * (self._ratio * norm).clamp(min=self._bound)
        return torch.where(gradient_norm > limit, limit / gradient_norm, 1.0)

    def _count(self, module: Kernel, inputs: tuple[KeyedJaggedTensor], rows: Tensor) -> None:
        if not rows.requires_grad:  # an evaluation
            return
        for table, ids in _ids_of_tables(module, inputs[0]):
            seen = torch.bincount(ids, minlength=table.local_rows).to(rows.dtype)
            self._seen[table.name] = self._seen[table.name] + seen if table.name in self._seen else seen

    def _clip_bags(self, module: Kernel, inputs: tuple[KeyedJaggedTensor], rows: Tensor) -> None:
        if not rows.requires_grad:
            return
        features, values = inputs[0], rows.detach()

        def clip(gradient: Tensor) -> Tensor:
            clipped, start = gradient.clone(), 0
            lengths = features.lengths().view(len(features.keys()), -1)  # [features, B]
            for (table, ids), in_use in zip(_ids_of_tables(module, features), lengths.bool(), strict=True):
                first = 0 if table.local_metadata is None else table.local_metadata.shard_offsets[1]
                width = min(max(self._width - first, 0), table.local_cols)  # columns of v in this shard
                columns = slice(start, start + width)
                start += table.local_cols
                bags = in_use.nonzero().squeeze(1)
                if width and len(bags):
                    found = self._bag_scales(ids, values[bags, columns], gradient[bags, columns])
                    clipped[bags, columns] *= found.unsqueeze(1)
            return clipped

        rows.register_hook(clip)  # type: ignore[no-untyped-call]

    def _bag_scales(self, ids: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        """Return what the gradient of each bag is multiplied by; the same for all bags of an id."""
        unique, place, seen = torch.unique(ids, return_inverse=True, return_counts=True)
        sums = gradient.new_zeros(len(unique), gradient.shape[1]).index_add_(0, place, gradient)
        norm = gradient.new_empty(len(unique))
        norm[place] = values.norm(dim=1)  # bags of one id hold the same row
        return self._scale(seen.to(gradient.dtype), norm, sums.norm(dim=1))[place]


def _kernels(model: nn.Module) -> Iterator[Kernel]:
    """All kernels of a sharded model; its collections hold them in lists, which ``modules()`` does not enter."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for lookup in module._lookups:
                yield from (part for part in lookup.modules() if isinstance(part, BaseBatchedEmbeddingBag))


def _ids_of_tables(module: Kernel, features: KeyedJaggedTensor) -> Iterable[tuple[ShardedEmbeddingTable, Tensor]]:
    """Each feature's table and ids, in the order of the kernel's output."""
    tables = [table for table in module.config.embedding_tables for _ in table.feature_names]
    ids = features.values().split(features.length_per_key())  # type: ignore[no-untyped-call]
    return zip(tables, ids, strict=True)

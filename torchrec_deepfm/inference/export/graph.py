"""The graph of an exported model: plain tensors in, probabilities out.

Shapes: B rows, I numeric features, S one-hot and M multi-hot features, N ids in all bags together, V rows of all tables
together, K factor_dim, R = K + 1 columns of a packed row that are read.

The inputs, of which a model without such features lacks some:

    dense    float32 [B, I]
    ids      int64 [B, S]    one-hot features, in the order of the tables
    values   int64 [N]       ids of the bags: those of the first multi-hot feature row by row, then of the next one
    lengths  int64 [M, B]    ids per bag
    weights  float32 [N]     only for tables with weights

The outputs, from which a prediction can be explained:

    probability  float32 [B]
    fields       float32 [B, F, R]  ``[V x | w x]`` of each field, as ``DeepFM.fields``
    deep         float32 [B]        deep part of the logit; zero in a model without one

Every lookup is one gather from one array of all tables' rows, whose tables begin at ``first_rows``. A row with an id
that its table does not have scores NaN: the ids of one table must not read the rows of the next one.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.export.inputs import Arrays, Signature
from torchrec_deepfm.model.deepfm import DeepFM

Tables = Literal["fp32", "fp16", "int8", "int4"]
_BLOCK_ROWS = 65_536
_LEVELS = {"int8": 255, "int4": 15}


class FloatRows(nn.Module):
    """The rows of all tables, float32 or float16 [V, R], without padding."""

    def __init__(self, num_rows: int, factor_dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rows = nn.Buffer(torch.empty(num_rows, factor_dim + 1, dtype=dtype))

    def write(self, first: int, rows: Tensor) -> None:
        """Write the rows [n, R] of a block from row ``first`` on; a weight too large for float16 is refused."""
        if self.rows.dtype == torch.float16:
            _check_half(rows)
        self.rows[first : first + len(rows)] = rows

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows [..., R] at an index [...]."""
        return self.rows[index].float()


class QuantizedRows(nn.Module):
    """The rows of all tables in K codes of 8 or 4 bits, the bounds of v (2 float16) and w (float16).

    A code c stands for ``low + c * (high - low) / levels``. The first-order weight has a column of its own: its range
    differs from that of v, and one pair of bounds for both would cost v its precision.
    """

    def __init__(self, num_rows: int, factor_dim: int, tables: Tables) -> None:
        super().__init__()
        self._factor_dim, self._levels, self._halves = factor_dim, _LEVELS[tables], tables == "int4"
        columns = -(-factor_dim // 2) if self._halves else factor_dim
        self.codes = nn.Buffer(torch.empty(num_rows, columns, dtype=torch.uint8))
        self.bounds = nn.Buffer(torch.empty(num_rows, 2, dtype=torch.float16))
        self.first_order = nn.Buffer(torch.empty(num_rows, 1, dtype=torch.float16))

    def write(self, first: int, rows: Tensor) -> None:
        """Quantize the rows [n, R] of a block and write them from row ``first`` on; see ``FloatRows.write``."""
        _check_half(rows)
        v = rows[:, : self._factor_dim]
        bounds = torch.stack(v.aminmax(dim=1), dim=1).half()
        low, high = bounds[:, :1].float(), bounds[:, 1:].float()
        codes = (v - low) * (self._levels / (high - low).clamp_min(torch.finfo(torch.float32).tiny))
        codes = codes.round().clamp(0, self._levels).to(torch.uint8)
        if self._halves:
            codes = nn.functional.pad(codes, (0, self._factor_dim % 2))
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        last = first + len(rows)
        self.codes[first:last], self.bounds[first:last] = codes, bounds
        self.first_order[first:last] = rows[:, self._factor_dim :].half()

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows [..., R] at an index [...]."""
        codes = self.codes[index]
        if self._halves:
            wide = codes.to(torch.int32)  # onnxruntime has no shifts of uint8 that mix with its concatenation
            codes = torch.stack([wide % 16, wide // 16], dim=-1).flatten(-2)[..., : self._factor_dim]
        bounds = self.bounds[index].float()
        low, high = bounds[..., :1], bounds[..., 1:]
        v = low + codes.float() * ((high - low) / self._levels)
        return torch.cat([v, self.first_order[index].float()], dim=-1)


class ScoringGraph(nn.Module):
    """A trained model as plain tensor operations, to be exported.

    The tables of ``model``, unsharded and in eval mode, are moved into this module one by one, so that memory holds one
    copy: it cannot be used afterwards. ``ids`` and ``bags`` name the one-hot and multi-hot features in the order of the
    inputs. UserError: the tables hold a weight that ``tables`` has no room for.
    """

    def __init__(self, model: DeepFM, bags: Sequence[str], tables: Tables = "fp32") -> None:
        super().__init__()
        arch = model.sparse_arch
        names, collection = arch.sparse_feature_names, arch.embedding_bag_collection
        assert isinstance(collection, EmbeddingBagCollection)
        sizes = [config.num_embeddings for config in collection.embedding_bag_configs()]
        self.ids = tuple(name for name in names if name not in bags)
        self.bags = tuple(name for name in names if name in bags)
        weights = collection.is_weighted() and bool(self.bags)
        present = {
            "dense": model.dense_in_features > 0, "ids": bool(self.ids), "values": bool(self.bags),
            "lengths": bool(self.bags), "weights": weights,
        }  # fmt: skip
        self.inputs = tuple(name for name, there in present.items() if there)
        first_rows = [sum(sizes[:number]) for number in range(len(sizes))]
        k = model.factor_dim
        self.bytes_before, self._columns = sum(sizes) * collection.embedding_bag_configs()[0].embedding_dim * 4, k + 1
        self.rows: FloatRows | QuantizedRows
        if tables in ("fp32", "fp16"):
            self.rows = FloatRows(sum(sizes), k, torch.float16 if tables == "fp16" else torch.float32)
        else:
            self.rows = QuantizedRows(sum(sizes), k, tables)
        for first, config in zip(first_rows, list(collection.embedding_bag_configs()), strict=True):
            table: Tensor = collection.embedding_bags[config.name].weight.detach()  # type: ignore[operator]
            for start in range(0, len(table), _BLOCK_ROWS):
                self.rows.write(first + start, table[start : start + _BLOCK_ROWS, : k + 1])
            del collection.embedding_bags[config.name], table
        del model.sparse_arch
        self.head = model
        self.bytes_after = sum(buffer.nbytes for buffer in self.rows.buffers())
        one_hot, multi_hot = ([names.index(name) for name in features] for features in (self.ids, self.bags))
        self.ids_first_rows, self.ids_sizes = _buffer(first_rows, one_hot), _buffer(sizes, one_hot)
        self.values_first_rows, self.values_sizes = _buffer(first_rows, multi_hot), _buffer(sizes, multi_hot)
        order = [(*self.ids, *self.bags).index(name) for name in names]
        self.order = nn.Buffer(torch.tensor(order)) if order != sorted(order) else None

    def forward(
        self,
        dense: Tensor | None = None,
        ids: Tensor | None = None,
        values: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Score rows: dense [B, I], ids int64 [B, S], and of lists values [N], lengths [M, B], weights [N]."""
        parts = []
        if ids is not None:
            parts.append(self._look_up(ids, self.ids_first_rows, self.ids_sizes))
        if values is not None and lengths is not None:
            parts.append(self._bags(values, lengths, weights))
        rows = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.order is not None:
            rows = rows[:, self.order]
        first_order = rows[:, :, -1].sum(1)
        head = self.head
        fields = head.fields(rows[:, 0] if dense is None else dense, rows)
        factors, first_orders = torch.split(fields, [head.factor_dim, 1], dim=2)
        deep = (
            torch.zeros_like(first_order) if head.over_arch is None else head.over_arch(factors.flatten(1)).squeeze(1)
        )
        logits = head.bias + deep
        if head.inter_arch is not None:
            logits = logits + head.inter_arch(factors, first_orders.squeeze(2)).squeeze(1)
        # Not every runtime's ReLU passes on NaN.
        probability = torch.where(torch.isnan(first_order), first_order, torch.sigmoid(logits))
        return {"probability": probability, "fields": fields, "deep": deep}

    def _look_up(self, ids: Tensor, first_rows: Tensor, sizes: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < sizes)
        rows = self.rows(torch.where(known, ids + first_rows, 0))
        return torch.where(known.unsqueeze(-1), rows, torch.nan)

    def _bags(self, values: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the rows of each bag."""
        count, batch = lengths.shape
        flat = lengths.flatten()
        # The bag of each value: a one where a bag begins, summed up. torch.repeat_interleave has no ONNX form.
        marks = torch.zeros(values.shape[0] + 1, dtype=torch.int64)
        marks = marks.scatter_add(0, flat.cumsum(0) - flat, torch.ones_like(flat))
        bag = marks.cumsum(0)[: values.shape[0]] - 1
        feature = bag // batch
        rows = self._look_up(values, self.values_first_rows[feature], self.values_sizes[feature])
        if weights is not None:
            rows = rows * weights.unsqueeze(1)
        pooled = torch.zeros(count * batch, self._columns).index_add(0, bag, rows)
        return pooled.view(count, batch, self._columns).transpose(0, 1)


def arrays_of(batch: Batch, signature: Signature) -> Arrays:
    """Return the inputs of an exported model, by name, for a batch of the loader."""
    features = batch.sparse_features.to_dict()
    bags = [features[name] for name in signature.bags]
    tensors = {"dense": batch.dense_features}
    if signature.ids:
        tensors["ids"] = torch.stack([features[name].values() for name in signature.ids], dim=1).long()
    if bags:
        tensors["values"] = torch.cat([bag.values() for bag in bags]).long()
        tensors["lengths"] = torch.stack([bag.lengths() for bag in bags]).long()
        if "weights" in signature.inputs:
            tensors["weights"] = torch.cat([bag.weights() for bag in bags])
    return {name: tensors[name].contiguous().numpy() for name in signature.inputs}


def _check_half(rows: Tensor) -> None:
    if rows.numel() and float(rows.abs().max()) > torch.finfo(torch.float16).max:
        raise UserError("a weight of the tables is larger than 65,504", where="--tables", remedy="take --tables fp32")


def _buffer(numbers: Sequence[int], places: Sequence[int]) -> nn.Buffer:
    return nn.Buffer(torch.tensor([numbers[place] for place in places], dtype=torch.int64))

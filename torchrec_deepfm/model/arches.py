"""The arches of DeepFM: look-up, numeric fields, deep side. The wide side is in ``fm.py``.

Shapes: B batch, I numeric features, S categorical features, F = I + S fields, K factor_dim, D width of a packed row
(see ``fm.py``), R = K + 1 columns of a row that are read.

Everything goes by feature key. Sharding may change the order of the keys in the ``KeyedTensor``, and then ``.values()``
is silently wrong.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.collections import FeatureProcessedTables, ManagedCollisionTables
from torchrec_deepfm.model.fm import init_packed_rows_, packed_dim
from torchrec_deepfm.model.id_check import SeenIds, check_ids

Tables = EmbeddingBagCollection | FeatureProcessedTables | ManagedCollisionTables


class SparseArch(nn.Module):
    """Looks up the packed rows of the categorical features.

    Args:
        embedding_bag_collection: tables of packed rows, pooled by sum or mean; make them with ``embedding_tables``. Or
            one of ``collections.py``.
        factor_dim: K.

    Raises:
        UserError: the tables' widths differ or do not fit ``factor_dim``.

    Example:
        >>> from torchrec_deepfm import embedding_tables
        >>> tables = embedding_tables({"C1": 100, "C2": 10}, factor_dim=3)
        >>> arch = SparseArch(EmbeddingBagCollection(tables=tables), factor_dim=3)
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["C1", "C2"], torch.tensor([7, 1]), torch.tensor([1, 1]))
        >>> arch(ids).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, embedding_bag_collection: Tables, factor_dim: int) -> None:
        super().__init__()
        configs = embedding_bag_collection.embedding_bag_configs()
        _check_tables(configs, factor_dim)
        self.embedding_bag_collection = embedding_bag_collection
        self.sparse_feature_names: list[str] = [name for config in configs for name in config.feature_names]
        self._embedding_names = [name for names in get_embedding_names_by_table(configs) for name in names]
        self._num_embeddings = {
            name: min(config.num_embeddings for config in configs if name in config.feature_names)
            for name in self.sparse_feature_names
        }
        if isinstance(embedding_bag_collection, ManagedCollisionTables):
            self._num_embeddings = {}  # any id gets a row
        self._seen_ids = SeenIds()
        self._is_weighted: bool | None = embedding_bag_collection.is_weighted()
        if isinstance(embedding_bag_collection, FeatureProcessedTables):
            self._is_weighted = None  # in a pipeline the processors' weights are in the batch already
        self._read_columns = factor_dim + 1
        self._padded = packed_dim(factor_dim) > self._read_columns

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Look up and pool.

        Args:
            sparse_features: bags of ids, with the features of the tables among the keys, in any order; with weights
                where the collection is weighted.

        Returns:
            [B, S, R]: ``[sum x v | sum x w]`` of each feature's bag, in the order of the tables' features; x is 1/n in
            a bag of n that is pooled by mean. An empty bag gives zeros.

        Raises:
            UserError: the batch lacks a feature of a table; it has weights and the collection is not weighted, or the
                other way round; or, where the ids lie in host memory, an id is negative or past the end of its table.
                (On a GPU that check would stall the stream: there the ids are noted, and ``check_seen_ids`` checks
                them where the loss is read.)
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            # Under symbolic tracing it is a proxy, without keys.
            if isinstance(sparse_features, KeyedJaggedTensor):
                self._check(sparse_features)
                # The unsharded collection cannot split an empty batch. A sharded one can, and must run: each rank
                # takes part in its collectives.
                if sparse_features.stride() == 0 and isinstance(self.embedding_bag_collection, EmbeddingBagCollection):
                    device = sparse_features.values().device
                    return torch.zeros(0, len(self._embedding_names), self._read_columns, device=device)
        pooled: KeyedTensor = self.embedding_bag_collection(sparse_features)
        rows_BSD = _rows_by_name(pooled, self._embedding_names)
        return rows_BSD[:, :, : self._read_columns] if self._padded else rows_BSD

    @torch.jit.unused
    def _check(self, sparse_features: KeyedJaggedTensor) -> None:
        _check_keys(sparse_features.keys(), self.sparse_feature_names)
        if self._is_weighted is not None:
            _check_weights(sparse_features, self._is_weighted)
        if torch.compiler.is_compiling() or not self._num_embeddings:
            return
        if _in_host_memory(sparse_features.values()):
            check_ids(sparse_features, self._num_embeddings)
        else:
            self._seen_ids.add(sparse_features)

    @torch.jit.unused
    def check_seen_ids(self) -> None:
        """Check the ids of all batches so far that lay on a GPU; waits for it.

        Raises:
            UserError: an id was negative or past the end of its table.
        """
        self._seen_ids.check(self._num_embeddings)


def check_seen_ids(model: nn.Module) -> None:
    """Check the ids that a model has looked up on a GPU; call it where the loss is read, since it waits for the GPU.

    Args:
        model: holds a ``SparseArch``, sharded or not.

    Raises:
        UserError: an id was negative or past the end of its table.
    """
    for module in model.modules():
        if isinstance(module, SparseArch):
            module.check_seen_ids()


def _in_host_memory(values: Tensor) -> bool:
    return values.is_cpu


@torch.fx.wrap  # a leaf for symbolic tracing: the order of the keys is known at the call only
def _rows_by_name(pooled: KeyedTensor, names: list[str]) -> Tensor:
    """The pooled rows [B, S, D] in the order of ``names``."""
    keys, values = pooled.keys(), pooled.values()
    if keys == names:  # no copy
        return values.view(values.shape[0], len(names), values.shape[1] // len(names))
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if values.is_cpu and sorted(keys) == sorted(names):  # a plan orders the keys by rank
            order = torch.tensor([keys.index(name) for name in names])
            rows_BSD = values.view(values.shape[0], len(names), values.shape[1] // len(names))
            reordered: Tensor = _Reordered.apply(rows_BSD, order)  # type: ignore[no-untyped-call]
            return reordered
    # One split: its backward pass is one concatenation, where a slice per key would each write the full width.
    by_name = pooled.to_dict()
    return torch.stack([by_name[name] for name in names], dim=1)


class _Reordered(torch.autograd.Function):
    """Fields [B, S, D] in another order: half the CPU time of ``stack`` and the backward pass of ``split``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(1, order.argsort()), None


class DenseArch(nn.Module):
    """Gives each numeric feature a field of its own: ``x_j * [v_j | w_j]``.

    A feature of several numbers, such as the embedding of a text, is one field too: the sum of ``x_j * [v_j | w_j]``
    over its numbers, which is a linear map.

    Args:
        in_features: I; zero is allowed.
        factor_dim: K.
        widths: how many of the I numbers each field has, in their order; empty for one each.
        init_std: standard deviation of v at the start; w starts at zero. For a field of n numbers at least
            1 / sqrt(3 n).
        device: where the parameters live.

    Example:
        >>> DenseArch(in_features=2, factor_dim=3)(torch.zeros(5, 2)).shape
        torch.Size([5, 2, 4])
        >>> DenseArch(in_features=10, factor_dim=3, widths=(1, 8, 1))(torch.zeros(5, 10)).shape
        torch.Size([5, 3, 4])
    """

    def __init__(
        self,
        in_features: int,
        factor_dim: int,
        *,
        widths: Sequence[int] = (),
        init_std: float = 0.01,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._blocks = _blocks(widths or [1] * in_features)
        self._one_each = all(width == 1 for width in widths)
        self.rows = nn.Parameter(torch.empty(in_features, factor_dim + 1, device=device))
        init_packed_rows_(self.rows, factor_dim, init_std)
        for start, stop, is_one_field in self._blocks:
            if is_one_field:  # as torch's own Linear: smaller ones learn slowly (docs/results.md)
                std = max(init_std, 1 / math.sqrt(3 * (stop - start)))
                init_packed_rows_(self.rows.data[start:stop], factor_dim, std)

    def forward(self, dense_features: Tensor) -> Tensor:
        """Scale each feature's row by its value.

        Args:
            dense_features: [B, I], finite.

        Returns:
            [B, I, R], or a field per width.
        """
        if self._one_each:
            return dense_features.unsqueeze(2) * self.rows
        fields: list[Tensor] = []
        for start, stop, is_one_field in self._blocks:
            numbers, rows = dense_features[:, start:stop], self.rows[start:stop]
            if is_one_field:
                fields.append((numbers @ rows).to(rows.dtype).unsqueeze(1))
            else:
                fields.append(numbers.unsqueeze(2) * rows)
        return torch.cat(fields, dim=1)


def _blocks(widths: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(Start, stop, whether it is one field) of neighbouring fields of one number each, and of each wider field."""
    found = [(0, 0, False)]  # never empty: TorchScript needs a type
    start = 0
    for width in widths:
        if width == 1 and not found[-1][2]:
            found[-1] = (found[-1][0], start + 1, False)
        else:
            found.append((start, start + width, width > 1))
        start += width
    return found


class OverArch(nn.Module):
    """The deep side: an MLP that ends in one logit (equations 3 and 4 of the paper).

    Each hidden layer is Linear, BatchNorm1d (if asked for), activation, dropout. The last Linear has no bias: the model
    has one global bias. Under autocast the last Linear stays in the type of its weights: a logit in bfloat16 has 8
    significant bits, and thousands of samples would share one value.

    Args:
        in_features: F * K.
        layer_sizes: widths of the hidden layers; empty for a bare linear map.
        activation: makes an activation module.
        dropout: probability of dropping a hidden unit, in [0, 1).
        batch_norm: whether hidden layers are batch-normalised. Training then needs at least 2 samples a batch.
        device: where the parameters live.

    Raises:
        UserError: a layer has no units, or ``dropout`` is outside [0, 1).

    Example:
        >>> OverArch(20, (8, 4), dropout=0.0)(torch.zeros(3, 20)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.5,
        batch_norm: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if any(size < 1 for size in layer_sizes):
            raise UserError(
                "every hidden layer needs at least one unit", where=f"over_arch_layer_sizes={tuple(layer_sizes)}"
            )
        if not 0.0 <= dropout < 1.0:
            raise UserError("the probability of dropping a unit lies in [0, 1)", where=f"dropout={dropout}")
        layers: list[nn.Module] = []
        width = in_features
        for size in layer_sizes:
            layers.append(nn.Linear(width, size, device=device))
            if batch_norm:
                layers.append(nn.BatchNorm1d(size, device=device))
            layers.append(activation())
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
            width = size
        layers.append(_LogitLinear(width, 1, bias=False, device=device))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Run the MLP.

        Args:
            features: [B, F * K].

        Returns:
            [B, 1].
        """
        logits: Tensor = self.layers(features)
        return logits


class _LogitLinear(nn.Linear):
    """The last layer, in the type of its weights whatever the autocast."""

    def forward(self, features: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return nn.functional.linear(features, self.weight)
        return _linear_without_autocast(features, self.weight)


@torch.fx.wrap
def _linear_without_autocast(features: Tensor, weight: Tensor) -> Tensor:
    device_type = features.device.type
    if not torch.amp.is_autocast_available(device_type):
        return nn.functional.linear(features, weight)
    with torch.autocast(device_type, enabled=False):
        return nn.functional.linear(features.to(weight.dtype), weight)


def _check_tables(configs: Sequence[EmbeddingBagConfig], factor_dim: int) -> None:
    expected = packed_dim(factor_dim)
    widths = {config.name: config.embedding_dim for config in configs}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise UserError(
            f"tables of unequal width ({shown}), where each of a DeepFM's is {expected} wide",
            remedy="use embedding_tables()",
        )
    for config in configs:
        if config.embedding_dim != expected:
            raise UserError(
                f"table {config.name!r} is {config.embedding_dim} wide, but factor_dim={factor_dim} wants "
                f"{expected} columns [v ({factor_dim}) | w (1) | padding]",
                remedy="use embedding_tables()",
            )


def _check_keys(keys: Sequence[str], wanted: Sequence[str]) -> None:
    missing = sorted(set(wanted) - set(keys))
    if missing:
        raise UserError(f"feature {missing[0]!r} of the tables is not in the batch, whose keys are {list(keys)}")


def _check_weights(sparse_features: KeyedJaggedTensor, is_weighted: bool) -> None:
    given = sparse_features.weights_or_none() is not None
    if given and not is_weighted:  # TorchRec would leave them out without a word
        raise UserError(
            "the batch has weights, but the tables have none", remedy="make the collection with is_weighted=True"
        )
    if is_weighted and not given:
        raise UserError("the tables are weighted, but the batch has no weights", remedy="give every id one, or 1.0")

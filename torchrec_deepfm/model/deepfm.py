"""DeepFM (Guo et al., 2017, arXiv 1703.04247) on an ``EmbeddingBagCollection``.

    logit = b + <w, x> + sum_{i<j} <V_i x_i, V_j x_j> + MLP([V_1 x_1, ..., V_F x_F])

Shapes: B batch, I numeric features, F fields, K factor_dim, R = K + 1 columns of a packed row that are read.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.arches import DenseArch, OverArch, SparseArch, Tables
from torchrec_deepfm.model.fm import FMInteractionArch

Term = Literal["linear", "fm", "deep"]
TERMS: tuple[Term, ...] = ("linear", "fm", "deep")


class DeepFM(nn.Module):
    """DeepFM: b + <w, x> + sum_{i<j} <V_i x_i, V_j x_j> + MLP([V_1 x_1, ..., V_F x_F]), with one V for both.

    Every numeric feature is a field with its own ``[v_j | w_j]``; a list of numbers (``dense_widths``) is one field. A
    multi-hot feature is pooled by sum before it interacts, so pairs inside one bag are not counted. The fields go
    numeric first, then in the order of the tables.

    Args:
        embedding_bag_collection: tables of packed rows, as ``embedding_tables`` describes them. May be on ``meta`` and
            may be sharded later. ``FeatureProcessedTables`` and ``ManagedCollisionTables`` adapt TorchRec's other
            collections.
        dense_in_features: I, the number of numeric features; zero is allowed.
        over_arch_layer_sizes: hidden layers of the MLP (400-400-400 in the paper).
        factor_dim: K (10 in the paper).
        dense_widths: how many of the I numbers each numeric field has, in their order: a list of numbers, such as the
            embedding of a text, is one field by a linear map. Empty for a field per number.
        terms: which terms make up the logit besides b. ``("linear",)`` is logistic regression, ``("linear", "fm")`` a
            factorization machine, ``("deep",)`` the plain DNN.
        activation: makes the activation modules of the MLP (ReLU in the paper).
        dropout: of the MLP (0.5 in the paper).
        batch_norm: of the MLP.
        init_std: standard deviation of the numeric features' v at the start.
        dense_device: where everything but the tables lives.

    Raises:
        UserError: tables of unequal width, a width that does not fit ``factor_dim``, unknown or no terms, a negative
            ``dense_in_features``, or bad MLP options.

    Example:
        >>> from torchrec import EmbeddingBagCollection
        >>> from torchrec_deepfm import DeepFM, embedding_tables
        >>> ebc = EmbeddingBagCollection(tables=embedding_tables({"C1": 100, "C2": 10}))
        >>> model = DeepFM(ebc, dense_in_features=3, over_arch_layer_sizes=(16,))
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["C1", "C2"], torch.tensor([7, 99, 1, 3]), torch.ones(4).int())
        >>> model(torch.rand(2, 3), ids).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        embedding_bag_collection: Tables,
        dense_in_features: int,
        over_arch_layer_sizes: Sequence[int] = (400, 400, 400),
        factor_dim: int = 10,
        *,
        dense_widths: Sequence[int] = (),
        terms: Sequence[Term] = TERMS,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.5,
        batch_norm: bool = False,
        init_std: float = 0.01,
        dense_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check_terms(terms)
        if dense_in_features < 0:
            raise UserError(
                "give the number of numeric features, or 0 for none", where=f"dense_in_features={dense_in_features}"
            )
        if dense_widths and (min(dense_widths) < 1 or sum(dense_widths) != dense_in_features):
            raise UserError(
                f"give 1 or more for each field, which sum to dense_in_features={dense_in_features}",
                where=f"dense_widths={tuple(dense_widths)}",
            )
        self.terms: tuple[Term, ...] = tuple(term for term in TERMS if term in terms)
        self.factor_dim = factor_dim
        self.dense_in_features = dense_in_features
        self.sparse_arch = SparseArch(embedding_bag_collection, factor_dim)
        self.dense_arch: DenseArch | None = None
        if dense_in_features > 0:
            self.dense_arch = DenseArch(
                dense_in_features, factor_dim, widths=dense_widths, init_std=init_std, device=dense_device
            )
        self.inter_arch: FMInteractionArch | None = None
        if "linear" in terms or "fm" in terms:
            self.inter_arch = FMInteractionArch(linear="linear" in terms, fm="fm" in terms)
        self.over_arch: OverArch | None = None
        if "deep" in terms:
            num_fields = (len(dense_widths) or dense_in_features) + len(self.sparse_arch.sparse_feature_names)
            self.over_arch = OverArch(
                num_fields * factor_dim,
                over_arch_layer_sizes,
                activation=activation,
                dropout=dropout,
                batch_norm=batch_norm,
                device=dense_device,
            )
        self.bias = nn.Parameter(torch.zeros(1, device=dense_device))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Compute the logits.

        Args:
            dense_features: [B, I] numeric features; [B, 0] where there are none.
            sparse_features: the ids, B bags per feature, keys in any order.

        Returns:
            [B, 1] logits. The click probability is their sigmoid.

        Raises:
            UserError: ``dense_features`` is not [B, I], or the batch lacks a feature of the tables.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            # Under symbolic tracing it is a proxy, without a shape.
            if isinstance(dense_features, Tensor):
                _check_dense(dense_features, self.dense_in_features)
        return self.combine(dense_features, self.sparse_arch(sparse_features))

    def combine(self, dense_features: Tensor, sparse_rows: Tensor) -> Tensor:
        """Compute the logits from rows that ``sparse_arch`` has looked up.

        Args:
            dense_features: [B, I].
            sparse_rows: [B, S, R].

        Returns:
            [B, 1] logits.
        """
        rows_BFR = self.fields(dense_features, sparse_rows)
        factors_BFK, first_order_BF1 = torch.split(rows_BFR, [self.factor_dim, 1], dim=2)

        logits_B1 = self.bias
        if self.inter_arch is not None:
            logits_B1 = logits_B1 + self.inter_arch(factors_BFK, first_order_BF1.squeeze(2))
        if self.over_arch is not None:
            # Under autocast the MLP speaks bfloat16; the sum of the terms stays in the type of the rows.
            logits_B1 = logits_B1 + self.over_arch(factors_BFK.flatten(1)).to(logits_B1.dtype)
        return logits_B1

    def fields(self, dense_features: Tensor, sparse_rows: Tensor) -> Tensor:
        """Put the rows of numeric features, each times its feature, before looked-up ones.

        Args:
            dense_features: [B, I].
            sparse_rows: [B, S, R].

        Returns:
            [B, F, R]: ``[V x | w x]`` of each field.
        """
        if self.dense_arch is None:
            return sparse_rows
        return torch.cat([self.dense_arch(dense_features), sparse_rows], dim=1)

    def compile_dense_path(self, compile_mode: str = "reduce-overhead", **options: Any) -> None:
        """Compile everything after the look-ups in place; ``torchrec.models.dlrm.DLRM`` has the same method.

        Args:
            compile_mode: ``mode`` of ``torch.compile``; ``reduce-overhead`` uses CUDA graphs on a GPU.
            options: others of ``torch.compile``; with a ``backend``, the mode does not count.
        """
        if "backend" not in options:
            options["mode"] = compile_mode
        for arch in (self.dense_arch, self.inter_arch, self.over_arch):
            if arch is not None:
                arch.compile(**options)


class DeepFMTrain(nn.Module):
    """DeepFM with its loss, as TorchRec's pipelines want it (the contract of ``torchrec.models.dlrm.DLRMTrain``).

    Args:
        deepfm: the model, sharded or not.
        negative_rate: share w of the negative training rows that were kept. In training mode log(w) is taken from the
            logits before the loss: the model learns the odds of all rows, of which the kept ones show 1/w times as
            much. So its probabilities need no correction: q = p / (p + (1 - p) / w) is what it predicts.

    Example:
        >>> from torchrec import EmbeddingBagCollection
        >>> from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables
        >>> ebc = EmbeddingBagCollection(tables=embedding_tables({"C1": 100}))
        >>> train_model = DeepFMTrain(DeepFM(ebc, dense_in_features=0, over_arch_layer_sizes=(16,)))
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["C1"], torch.tensor([7, 99]), torch.ones(2).int())
        >>> batch = Batch(dense_features=torch.empty(2, 0), sparse_features=ids, labels=torch.tensor([1, 0]))
        >>> loss, (detached_loss, logits, labels) = train_model(batch)
        >>> loss.shape, logits.shape, labels.shape
        (torch.Size([]), torch.Size([2]), torch.Size([2]))
    """

    def __init__(self, deepfm: nn.Module, negative_rate: float = 1.0) -> None:
        super().__init__()
        self.model = deepfm
        self._log_rate = math.log(negative_rate)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Compute the mean binary cross entropy of a batch.

        Args:
            batch: ``dense_features`` [B, I], ``sparse_features``, ``labels`` [B] or [B, 1] of 0 and 1; or [B, 2]:
                labels, and the weight of each row.

        Returns:
            ``(loss, (loss, logits, labels))``: the loss, a scalar, to step on; and detached, beside it, the logits [B]
            and the labels [B], or [B, 2] as given. With weights the loss is the sum of the weighted losses over B. The
            loss of an empty batch is 0.
        """
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(1)
        labels = _flat(batch.labels)
        loss = _mean_loss(logits - self._log_rate if self.training and self._log_rate else logits, labels)
        return loss, (loss.detach(), logits.detach(), labels.detach())


@torch.fx.wrap  # a leaf for symbolic tracing, as the next one: shapes are known at the call only
def _flat(labels: Tensor) -> Tensor:
    return labels if labels.dim() == 2 and labels.shape[1] == 2 else labels.reshape(-1)


@torch.fx.wrap
def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    weights = None
    if labels.dim() == 2:
        labels, weights = labels.to(logits.dtype).unbind(1)
    total = nn.functional.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), weight=weights, reduction="sum"
    )
    return total / max(logits.shape[0], 1)


def _check_terms(terms: Sequence[Any]) -> None:
    unknown = [term for term in terms if term not in TERMS]
    if unknown or not terms or isinstance(terms, str):
        raise UserError(f"choose one or more of {', '.join(map(repr, TERMS))}, as a tuple", where=f"terms={terms!r}")


def _check_dense(dense_features: Tensor, dense_in_features: int) -> None:
    if dense_features.dim() != 2 or dense_features.shape[1] != dense_in_features:
        raise UserError(
            f"dense_features has shape {tuple(dense_features.shape)}, but the model was made for "
            f"[B, {dense_in_features}] (dense_in_features={dense_in_features})"
        )

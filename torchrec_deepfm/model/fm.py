"""The factorization machine, first order and pairs, and the packed row that feeds every term of DeepFM.

Shapes: B batch, F fields, K factor_dim, D width of a packed row.

One id owns one row of D = ceil4(K + 1) columns, ``[v (K) | w (1) | padding]``. ``v`` is its latent vector, shared by
the FM and the deep part; ``w`` its first-order weight. Fused embedding kernels want widths that are multiples of 4, so
the rest is padding: never read, and zero. One look-up (and, sharded, one all-to-all) then serves all three terms.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchrec_deepfm.errors import UserError


def packed_dim(factor_dim: int) -> int:
    """Width D of the packed row for latent vectors of width K.

    Args:
        factor_dim: K, the width of the latent vectors.

    Returns:
        The smallest multiple of 4 that holds K latent columns and the first-order weight.

    Raises:
        UserError: ``factor_dim`` is not positive.

    Example:
        >>> packed_dim(10), packed_dim(15), packed_dim(16)
        (12, 16, 20)
    """
    if factor_dim < 1:
        raise UserError(
            "the latent vectors need at least one column",
            where=f"factor_dim={factor_dim}",
            remedy="use 10 as in the paper",
        )
    return (factor_dim + 1 + 3) // 4 * 4


def init_packed_rows_(
    rows: Tensor, factor_dim: int, std: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """Fill packed rows in place: v ~ N(0, std^2), w = 0, padding = 0.

    A zero w starts the first order at the base rate that the bias learns first; v must not be zero, as that is a saddle
    point of the FM term (the gradient of <v_i, v_j> with respect to v_i is v_j).

    Args:
        rows: [N, D], whole packed rows; or an empty tensor of any shape, which TorchRec hands to the ranks that hold no
            shard of a table. A column shard of a row does not know which columns it holds and cannot be filled here.
        factor_dim: K.
        std: standard deviation of the latent part.
        generator: source of randomness; the global one by default.

    Returns:
        ``rows``, filled.
    """
    if rows.numel() == 0:
        return rows
    with torch.no_grad():
        rows.zero_()
        rows[:, :factor_dim].normal_(0.0, std, generator=generator)
    return rows


class FactorizationMachine(nn.Module):
    r"""Sum over all pairs of fields of their inner products, in O(F K).

    Rendle's identity (arXiv 1703.04247, equation 2; Rendle 2010, lemma 3.1):

    .. math:: \sum_{i<j} \langle v_i, v_j \rangle = \tfrac12 \sum_k \Big[ (\sum_i v_{ik})^2 - \sum_i v_{ik}^2 \Big]

    The two sums nearly cancel where the vectors point every way: in float32 the relative error of a single sample then
    reaches 2e-3. So they are taken in float64, where the products of float32 numbers are exact, unless the matrix
    products beside them are rounded far more coarsely: under autocast, and where
    ``torch.get_float32_matmul_precision()`` is not ``highest``, they are taken in float32. docs/performance.md has what
    each costs.

    Example:
        >>> fm = FactorizationMachine()
        >>> fm(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]]))  # 0 + 2 + 3
        tensor([[5.]])
    """

    def forward(self, factors: Tensor) -> Tensor:
        """Compute the second-order term.

        Args:
            factors: [B, F, K], the latent vectors of the fields, each times its feature's value.

        Returns:
            [B, 1], float32 (float64 where the input is).
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            pairs_B1 = _sum_of_pairs(factors, torch.float64)
        else:
            pairs_B1 = _second_order(factors)
        return pairs_B1.to(torch.promote_types(factors.dtype, torch.float32))


class FMInteractionArch(nn.Module):
    """The wide side: first order and factorization machine (equation 2 of the paper).

    Args:
        linear: whether the first order counts.
        fm: whether the pairs count.

    Example:
        >>> arch = FMInteractionArch()
        >>> arch(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[0.5, 0.25]]))  # 0.75 + 11
        tensor([[11.7500]])
    """

    def __init__(self, *, linear: bool = True, fm: bool = True) -> None:
        super().__init__()
        self._linear = linear
        self.factorization_machine: FactorizationMachine | None = FactorizationMachine() if fm else None

    def forward(self, factors: Tensor, first_order: Tensor) -> Tensor:
        """Sum the terms that count.

        Args:
            factors: [B, F, K], V_i x_i.
            first_order: [B, F], w_i x_i.

        Returns:
            [B, 1].
        """
        first_order_B1 = first_order.sum(dim=1, keepdim=True)
        if self.factorization_machine is None:
            return first_order_B1
        pairs_B1: Tensor = self.factorization_machine(factors)
        return first_order_B1 + pairs_B1 if self._linear else pairs_B1


def _sum_of_pairs(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Rendle's identity in ``dtype``: [B, F, K] to [B, 1]."""
    factors_BFK = factors.to(dtype)
    sum_BK = factors_BFK.sum(dim=1)
    squares_B = (factors_BFK * factors_BFK).sum(dim=[1, 2])
    return 0.5 * ((sum_BK * sum_BK).sum(dim=1) - squares_B).unsqueeze(1)


@torch.fx.wrap  # a leaf for symbolic tracing: the mode is that of the call, not of the trace
def _second_order(factors: Tensor) -> Tensor:
    if _products_are_rounded(factors.device.type):
        pairs_B1: Tensor = _FloatPairs.apply(factors)  # type: ignore[no-untyped-call]
        return pairs_B1
    return _sum_of_pairs(factors, torch.float64)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _products_are_rounded(device_type: str) -> bool:
    """Whether matrix products have fewer digits than float32 in the present mode."""
    if torch.get_float32_matmul_precision() != "highest":
        return True
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _FloatPairs(torch.autograd.Function):
    """The identity in at least float32. Autograd would keep and revisit every intermediate of the size of the input."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor) -> Tensor:
        dtype = torch.promote_types(factors.dtype, torch.float32)
        sum_BK = factors.sum(dim=1, dtype=dtype)
        ctx.save_for_backward(factors, sum_BK)
        norm_B = torch.linalg.vector_norm(factors, dim=(1, 2), dtype=dtype)
        pairs_B1: Tensor = 0.5 * ((sum_BK * sum_BK).sum(dim=1) - norm_B * norm_B).unsqueeze(1)
        return pairs_B1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        factors, sum_BK = ctx.saved_tensors
        scale_B11 = gradient.unsqueeze(2)
        if torch.is_grad_enabled():  # for a second derivative, to which the saved sum would be a constant
            others_BFK = factors.sum(dim=1, keepdim=True, dtype=gradient.dtype) - factors
            gradient_BFK: Tensor = others_BFK * scale_B11
        else:
            gradient_BFK = (sum_BK.unsqueeze(1) - factors).mul_(scale_B11)
        return gradient_BFK.to(factors.dtype)

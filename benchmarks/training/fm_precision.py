"""Relative error of the FM term against all pairs in float64, as computed by the model and in float32.

    python -m benchmarks.training.fm_precision

The factors are random in all directions, the hard case: the two sums of the O(F K) form nearly cancel. The error is
relative to each sample's value, so a sample whose pairs sum to nearly zero counts fully.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    samples: int = 4096
    """Samples of each size."""


def sum_over_pairs(factors: "Tensor") -> "Tensor":
    """Sum the inner products of all pairs: the strict upper triangle of the Gram matrix."""
    import torch

    exact = factors.double()
    return torch.einsum("bik,bjk->bij", exact, exact).triu(diagonal=1).sum(dim=(1, 2))


def fm_float32(factors: "Tensor") -> "Tensor":
    """Compute the FM term [B, 1] of factors [B, F, K] in their own precision."""
    total = factors.sum(dim=1)
    return (0.5 * ((total * total).sum(dim=1) - (factors * factors).sum(dim=(1, 2)))).unsqueeze(1)


def main(options: Options) -> None:
    import torch

    from torchrec_deepfm import FactorizationMachine

    torch.manual_seed(0)
    print(f"torch {torch.__version__}; largest and median relative error over {options.samples:,} samples")
    for fields, factor_dim in ((2, 10), (39, 10), (39, 15), (200, 128)):
        factors = 0.1 * torch.randn(options.samples, fields, factor_dim)
        exact = torch.cat([sum_over_pairs(part) for part in factors.split(256)])
        for name, term in (("float64", FactorizationMachine()), ("float32", fm_float32)):
            error = ((term(factors).squeeze(1).double() - exact) / exact).abs()
            print(f"F {fields:>3}  K {factor_dim:>3}  {name}  {error.max():.1e}  {error.median():.1e}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Relative error of the FM term against a brute force over all pairs in float64, as it is and taken in float32.

    python -m benchmarks.training.fm_precision

The factors are random and point every way, the hard case: the two sums of the O(F K) form nearly cancel. The error is
relative to each sample's own value, so a sample whose pairs happen to sum to nearly zero counts fully.
"""

import torch
from torch import Tensor

from torchrec_deepfm import FactorizationMachine


def brute_force(factors: Tensor) -> Tensor:
    """Sum the inner products of all pairs: the strict upper triangle of the Gram matrix."""
    exact = factors.double()
    return torch.einsum("bik,bjk->bij", exact, exact).triu(diagonal=1).sum(dim=(1, 2))


def float32(factors: Tensor) -> Tensor:
    total = factors.sum(dim=1)
    return (0.5 * ((total * total).sum(dim=1) - (factors * factors).sum(dim=(1, 2)))).unsqueeze(1)


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}; largest and median relative error over 4096 samples")
    for fields, factor_dim in ((2, 10), (39, 10), (39, 15), (200, 128)):
        factors = 0.1 * torch.randn(4096, fields, factor_dim)
        exact = torch.cat([brute_force(part) for part in factors.split(256)])
        for name, term in (("float64", FactorizationMachine()), ("float32", float32)):
            error = ((term(factors).squeeze(1).double() - exact) / exact).abs()
            print(f"F {fields:>3}  K {factor_dim:>3}  {name}  {error.max():.1e}  {error.median():.1e}")


if __name__ == "__main__":
    main()

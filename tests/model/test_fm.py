import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torchrec.modules.deepfm import FactorizationMachine as TorchRecFactorizationMachine

from tests.model import oracle
from torchrec_deepfm import FactorizationMachine
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.fm import init_packed_rows_, packed_dim


def pairs_oracle(factors: torch.Tensor) -> list[float]:
    return [oracle.second_order([(v, 0.0) for v in sample]) for sample in factors.double().tolist()]


def brute_force(factors: torch.Tensor) -> torch.Tensor:
    """All pairs in float64, by the Gram matrix: for sizes where plain Python takes too long."""
    gram = torch.einsum("bik,bjk->bij", factors.double(), factors.double())
    return torch.triu(gram, diagonal=1).sum(dim=(1, 2))


def test_brute_force_is_the_sum_over_pairs() -> None:
    factors = torch.randn(3, 6, 4)
    torch.testing.assert_close(brute_force(factors), torch.tensor(pairs_oracle(factors), dtype=torch.float64))


@pytest.mark.parametrize(("fields", "k"), [(1, 4), (2, 4), (3, 1), (7, 5), (39, 10)])
def test_equals_the_sum_over_all_pairs(fields: int, k: int) -> None:
    torch.manual_seed(fields)
    factors = torch.randn(5, fields, k)
    expected = pairs_oracle(factors)
    for value, reference in zip(FactorizationMachine()(factors).squeeze(1).tolist(), expected, strict=True):
        assert value == pytest.approx(reference, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("fields", "k"), [(39, 10), (200, 10), (39, 128), (200, 128)])
def test_keeps_its_precision_sample_by_sample(fields: int, k: int, scale: float) -> None:
    torch.manual_seed(k)
    factors = scale * torch.randn(256, fields, k)
    expected = brute_force(factors)
    relative = (FactorizationMachine()(factors).squeeze(1).double() - expected).abs() / expected.abs()
    assert relative.max().item() <= 1e-5


def test_float32_sums_would_not_keep_it() -> None:
    """The bound above can fail: the same identity in float32 misses it."""
    torch.manual_seed(128)
    factors = torch.randn(256, 200, 128)
    naive = 0.5 * (factors.sum(1).square().sum(1) - factors.square().sum((1, 2)))
    relative = (naive.double() - brute_force(factors)).abs() / brute_force(factors).abs()
    assert relative.max().item() > 1e-5


def test_torchrecs_factorization_machine_fails_the_oracle() -> None:
    """TorchRec's flattens to [B, F * K] first and so multiplies every pair of scalars: <(1, 0), (0, 1)> becomes 1."""
    factors = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert pairs_oracle(factors) == [0.0]
    assert FactorizationMachine()(factors).item() == 0.0
    assert TorchRecFactorizationMachine()([factors[:, 0], factors[:, 1]]).item() == 1.0


@contextmanager
def rounded_products(mode: str) -> Iterator[None]:
    """The two modes in which matrix products have fewer digits than float32."""
    before = torch.get_float32_matmul_precision()
    try:
        if mode == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", ["medium", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_in_float32_beside_rounded_products(mode: str, dtype: torch.dtype) -> None:
    """The error is a few float32 roundings of the two sums that cancel, far from one bfloat16 rounding (4e-3)."""
    torch.manual_seed(0)
    factors = torch.randn(64, 200, 16).to(dtype)
    with rounded_products(mode):
        logits = FactorizationMachine()(factors)
    assert logits.dtype is torch.float32
    squares = factors.double().square().sum((1, 2))
    error = (logits.squeeze(1).double() - brute_force(factors)).abs() / squares
    assert 0 < error.max().item() < 2e-6


@pytest.mark.parametrize("mode", ["exact", "medium", "bf16"])
def test_gradients_of_each_mode_are_those_of_autograd_in_float64(mode: str) -> None:
    torch.manual_seed(1)
    factors = torch.randn(32, 39, 15, requires_grad=True)
    exact = factors.detach().double().requires_grad_()
    weights = torch.randn(32)
    (expected,) = torch.autograd.grad((weights.double() * brute_force(exact)).sum(), exact)
    with rounded_products(mode):
        logits = FactorizationMachine()(factors)
    (gradient,) = torch.autograd.grad((weights * logits.squeeze(1)).sum(), factors)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "medium"])
def test_gradcheck(mode: str) -> None:
    factors = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    with rounded_products(mode):
        assert torch.autograd.gradcheck(FactorizationMachine(), (factors,))
        assert torch.autograd.gradgradcheck(FactorizationMachine(), (factors,))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch: int) -> None:
    assert FactorizationMachine()(torch.randn(batch, 3, 2)).shape == (batch, 1)


@pytest.mark.parametrize("factor_dim", range(1, 40))
def test_packed_dim_is_the_next_multiple_of_four(factor_dim: int) -> None:
    assert packed_dim(factor_dim) == 4 * math.ceil((factor_dim + 1) / 4)


def test_packed_dim_refuses_no_columns() -> None:
    with pytest.raises(UserError, match=r"^factor_dim=0: the latent vectors need at least one column"):
        packed_dim(0)


def test_init_fills_each_part_of_the_row() -> None:
    rows = init_packed_rows_(torch.full((4000, 12), 7.0), factor_dim=10, std=0.05)
    assert rows[:, :10].std().item() == pytest.approx(0.05, rel=0.05)
    assert rows[:, :10].mean().item() == pytest.approx(0.0, abs=0.001)
    assert rows[:, 10:].abs().max().item() == 0.0

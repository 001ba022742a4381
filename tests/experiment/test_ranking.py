import itertools

import pytest

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.ranking import agreement, rank_correlation


def by_the_book(left: list[int], right: list[int]) -> float:
    """Spearman's own formula for ranks without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    n = len(left)
    places = [[sorted(values).index(value) for value in values] for values in (left, right)]
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*places, strict=True)) / (n * (n * n - 1))


def test_rank_correlation_is_spearmans() -> None:
    for right in itertools.permutations([3, 1, 4, 15, 9]):
        found = rank_correlation([1.0, 2.0, 3.0, 4.0, 5.0], [float(value) for value in right])
        assert found == pytest.approx(by_the_book([1, 2, 3, 4, 5], list(right)), abs=1e-12)


def test_ties_share_their_mean_rank() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Pearson's correlation of those is 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx((4.5 / 5) ** 0.5)


def test_nothing_to_rank() -> None:
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0], [1.0]) is None


def test_regret_is_of_the_picked_plan() -> None:
    found = agreement(["slow", "picked", "best"], predicted=[3.0, 1.0, 2.0], measured=[40.0, 25.0, 20.0])
    assert (found.picked, found.best, found.plans) == ("picked", "best", 3)
    assert found.regret == pytest.approx(25 / 20 - 1)


def test_one_plan_is_its_own_best() -> None:
    found = agreement(["only"], [1.0], [2.0])
    assert (found.picked, found.best, found.regret, found.spearman) == ("only", "only", 0.0, None)


def test_no_plan() -> None:
    with pytest.raises(UserError, match="no plan has both a prediction and a measurement; measure at least one"):
        agreement([], [], [])

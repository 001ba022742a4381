"""How well predictions and measurements of the same plans agree. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from torchrec_deepfm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What predictions are worth for choosing a plan.

    Attributes:
        plans: how many were compared.
        spearman: Spearman's rank correlation; None where one side does not vary.
        picked: the plan with the smallest prediction.
        best: the plan with the smallest measured time.
        regret: how much longer the picked plan takes than the best one, as a share of the best: 0.1 is 10%.
    """

    plans: int
    spearman: float | None
    picked: str
    best: str
    regret: float


def agreement(names: Sequence[str], predicted: Sequence[float], measured: Sequence[float]) -> Agreement:
    """Compare the predictions of some plans with the measured times, both in any unit.

    Example:
        >>> agreement(["a", "b", "c"], predicted=[1.0, 2.0, 3.0], measured=[11.0, 10.0, 30.0])
        Agreement(plans=3, spearman=0.5, picked='a', best='b', regret=0.1)
    """
    if not names:
        raise UserError("no plan has both a prediction and a measurement", remedy="measure at least one")
    picked = min(range(len(names)), key=predicted.__getitem__)
    best = min(range(len(names)), key=measured.__getitem__)
    return Agreement(
        plans=len(names),
        spearman=rank_correlation(predicted, measured),
        picked=names[picked],
        best=names[best],
        regret=round(measured[picked] / measured[best] - 1.0, 12),
    )


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, -1 to 1; None where one side does not vary. Ties share their mean rank."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return round(float(spearmanr(left, right).statistic), 12)

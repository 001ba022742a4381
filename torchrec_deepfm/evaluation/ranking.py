"""Metrics of the order in which each user's rows are put: GAUC, NDCG@k, recall@k, MAP@k.

Everything is computed over the rows of all ranks at once, so it does not depend on how they were split. Counts are
integers, and users are added up in the order of their keys.

Shape letters: N rows, U users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
T = TypeVar("T", np.int64, np.float64)


@dataclass(frozen=True, kw_only=True)
class UserMetrics:
    """A metric of each user, and how much each counts in the mean.

    Attributes:
        values: [U]; 0 where ``weights`` is 0.
        weights: [U]; 0 for a user without a value.
    """

    values: Floats
    weights: Floats

    def mean(self, times: NDArray[np.int64] | None = None) -> float | None:
        """The weighted mean; None if no user has a value.

        Args:
            times: [U], how often each user counts, such as in a bootstrap resample; once without it.
        """
        weights = self.weights if times is None else self.weights * times
        total = float(weights.sum())
        return float((weights * self.values).sum()) / total if total else None


def user_metrics(
    users: NDArray[np.int64], logits: NDArray[np.float32], labels: NDArray[np.float32], ks: Sequence[int]
) -> Mapping[str, UserMetrics]:
    """Compute the metrics of each user.

    - ``gauc``: the AUC among the user's rows, ties counted half, of users with a click and a row without one; the mean
      is weighted by their rows (Zhou et al., Deep Interest Network, 2018).
    - ``ndcg@k``: the sum of 1 / log2(1 + place) over the clicks at places 1 to k, over its best possible value.
    - ``recall@k``: the share of the user's clicks that are at places 1 to k.
    - ``map@k``: the sum of the precision at the places 1 to k that hold a click, over min(k, clicks).

    The last three are means over the users with a click. Of equal predictions those without a click come first, so that
    a model that predicts the same for all rows gains nothing from their order.

    Args:
        users: [N], the user of each row.
        logits: [N].
        labels: [N] of 0 and 1.
        ks: the values of k.

    Returns:
        The metrics by name; their users are the same, in ascending order.

    Example:
        >>> found = user_metrics(
        ...     np.array([7, 7, 7, 9, 9]), np.float32([0.5, 0.1, 0.3, 1, 2]), np.float32([1, 0, 1, 1, 0]), [1]
        ... )
        >>> {name: metric.mean() for name, metric in found.items()}
        {'gauc': 0.6, 'ndcg@1': 0.5, 'recall@1': 0.25, 'map@1': 0.5}
    """
    order = np.lexsort((labels, -logits, users))
    users, logits, clicks = users[order], logits[order], labels[order].astype(np.int64)
    firsts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.empty(0, np.int64)
    rows = np.diff(np.r_[firsts, len(users)])
    owner = np.repeat(np.arange(len(firsts)), rows)
    positives = _sums(clicks, firsts)
    found = {"gauc": _gauc(owner, firsts, rows, positives, logits, clicks)}
    place = np.arange(len(users)) - firsts[owner] + 1
    seen = np.cumsum(clicks)
    hits = seen - (seen - clicks)[firsts][owner]  # clicks of the user down to this place
    clicked = (positives > 0).astype(np.float64)
    some = np.maximum(positives, 1)
    longest = max([int(place.max(initial=1)), *ks])
    gains = 1.0 / np.log2(1.0 + np.arange(1, longest + 1))
    best = np.cumsum(gains)
    for k in ks:
        inside = (place <= k) * clicks
        ideal = np.minimum(some, k)
        dcg = _sums(inside * gains[place - 1], firsts)
        found[f"ndcg@{k}"] = UserMetrics(values=dcg / best[ideal - 1], weights=clicked)
        found[f"recall@{k}"] = UserMetrics(values=_sums(inside, firsts) / some, weights=clicked)
        found[f"map@{k}"] = UserMetrics(values=_sums(inside * hits / place, firsts) / ideal, weights=clicked)
    return found


def _gauc(
    owner: NDArray[np.int64],
    firsts: NDArray[np.int64],
    rows: NDArray[np.int64],
    positives: NDArray[np.int64],
    logits: NDArray[np.float32],
    clicks: NDArray[np.int64],
) -> UserMetrics:
    """AUC of each user, from rows sorted by user and falling logit."""
    ties = (
        np.flatnonzero(np.r_[True, (owner[1:] != owner[:-1]) | (logits[1:] != logits[:-1])]) if len(owner) else firsts
    )
    tied_clicks = _sums(clicks, ties)
    tied_others = np.diff(np.r_[ties, len(owner)]) - tied_clicks
    above = np.cumsum(tied_others) - tied_others  # rows without a click before this tie, of all users
    before = (np.cumsum(1 - clicks) - (1 - clicks))[firsts][owner[ties]]  # of the users before this one
    others = rows - positives
    below = others[owner[ties]] - (above - before) - tied_others
    wins = np.zeros(len(firsts), np.int64)  # twice the pairs won, a tie once
    np.add.at(wins, owner[ties], tied_clicks * (2 * below + tied_others))
    both = (positives > 0) & (others > 0)
    pairs = np.where(both, positives * others, 1)
    return UserMetrics(
        values=np.where(both, wins / (2 * pairs), 0.0), weights=np.where(both, rows, 0).astype(np.float64)
    )


def _sums(values: NDArray[T], firsts: NDArray[np.int64]) -> NDArray[T]:
    """Sums of the stretches that begin at ``firsts``."""
    return np.add.reduceat(values, firsts) if len(firsts) else values[:0]

"""When to stop, and when to lower the rates: decided by a metric of the validation split. Standard library only."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchrec_deepfm.training.config import Metric


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows from one evaluation.

    Attributes:
        best: this is the best evaluation so far.
        stop: the training is to end.
        drop: the learning rates have just been lowered.
    """

    best: bool
    stop: bool
    drop: bool


class Tracker:
    """Keeps the best evaluation and counts those since that are no better.

    An evaluation is better if its metric is strictly higher (auc, auc-logloss) or lower (logloss). One that has no
    value, such as the AUC of a split with one class, or that is NaN, is no better.

    Args:
        metric: which value to look at.
        patience: evaluations in a row without a better one after which to stop; 0 never stops.
        lr_patience: the same for lowering the rates; 0 never lowers them. Counts again from each drop.
        lr_factor: what the rates are multiplied by.

    Attributes:
        best_value: the best value so far; None before the first.
        best_step: its step.
        factor: the product of all drops, 1 at the start.
        stopped: whether patience has run out.

    Example:
        >>> tracker = Tracker(metric="auc", patience=2)
        >>> [tracker.update(step, auc).stop for step, auc in enumerate([0.70, 0.72, 0.71, 0.715])]
        [False, False, False, True]
        >>> tracker.best_step, tracker.best_value
        (1, 0.72)
    """

    def __init__(self, *, metric: Metric, patience: int = 0, lr_patience: int = 0, lr_factor: float = 0.1) -> None:
        self._metric, self._patience, self._lr_patience, self._lr_factor = metric, patience, lr_patience, lr_factor
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.factor = 1.0
        self.stopped = False
        self._bad = 0
        self._bad_since_drop = 0

    def update(self, step: int, value: float | None) -> Verdict:
        """Take in an evaluation.

        Args:
            step: steps done.
            value: of the metric; None where it has none.

        Returns:
            What follows.
        """
        if self._better(value):
            self.best_value, self.best_step = value, step
            self._bad = self._bad_since_drop = 0
            return Verdict(best=True, stop=False, drop=False)
        self._bad += 1
        self._bad_since_drop += 1
        drop = 0 < self._lr_patience <= self._bad_since_drop
        if drop:
            self.factor *= self._lr_factor
            self._bad_since_drop = 0
        self.stopped = 0 < self._patience <= self._bad
        return Verdict(best=False, stop=self.stopped, drop=drop)

    def to_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(
            _State(self.best_value, self.best_step, self.factor, self.stopped, self._bad, self._bad_since_drop)
        )

    def load_json(self, values: Mapping[str, Any]) -> None:
        """Take over a state that ``to_json`` returned.

        Raises:
            TypeError: it is of another make.
        """
        state = _State(**values)
        self.best_value, self.best_step, self.factor, self.stopped = (
            state.best_value,
            state.best_step,
            state.factor,
            state.stopped,
        )
        self._bad, self._bad_since_drop = state.bad, state.bad_since_drop

    def _better(self, value: float | None) -> bool:
        if value is None or math.isnan(value):
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if self._metric == "logloss" else value > self.best_value


@dataclass(frozen=True)
class _State:
    best_value: float | None
    best_step: int | None
    factor: float
    stopped: bool
    bad: int
    bad_since_drop: int

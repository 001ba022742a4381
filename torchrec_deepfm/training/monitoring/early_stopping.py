"""Decides from a validation metric when to stop and when to lower the learning rates. No torch."""

import math
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct

from torchrec_deepfm.training.config import Metric, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The consequences of one evaluation: is it the best so far, does the training stop, have the rates dropped?"""

    best: bool
    stop: bool
    drop: bool


class TrackerState(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The state of a ``Tracker`` in a checkpoint."""

    best_value: Annotated[float, Meta(ge=-1e300, le=1e300)] | None
    best_step: Annotated[int, Meta(ge=0)] | None
    factor: Annotated[float, Meta(gt=0, le=1)]
    stopped: bool
    bad: Annotated[int, Meta(ge=0)]
    bad_since_drop: Annotated[int, Meta(ge=0)]

    def check(self, config: TrainConfig, step: int) -> None:
        """Compare the values with each other and with the options; a ``ValueError`` names a contradiction."""
        drops = round(math.log(self.factor) / math.log(config.lr_factor))
        for name, wrong in {
            "best_step": (self.best_step is None) != (self.best_value is None) or (self.best_step or 0) > step,
            "bad": self.bad > step,
            "bad_since_drop": self.bad_since_drop > self.bad or 0 < config.lr_patience <= self.bad_since_drop,
            "factor": not math.isclose(config.lr_factor**drops, self.factor, rel_tol=1e-9)
            or drops > (step if config.lr_patience else 0),
            "stopped": self.stopped != (0 < config.patience <= self.bad),
        }.items():
            if wrong:
                raise ValueError(f"tracker.{name} contradicts the other values")


class Tracker:
    """Keeps the best evaluation and counts the later ones without an improvement.

    An evaluation is better if its metric is strictly higher (auc, auc-logloss) or lower (logloss). One without
    a value, such as the AUC of a split with one class, or with a NaN, is not better.

    ``patience``: evaluations in a row without a better one after which to stop; 0 never stops. ``lr_patience``: the
    same for lowering the rates; 0 never lowers them. Counts again from each drop.

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
        """Add an evaluation.

        ``value``: of the metric; None where it has none.
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

    @property
    def state(self) -> TrackerState:
        """The state for a checkpoint; assign one to resume from it."""
        return TrackerState(
            best_value=self.best_value,
            best_step=self.best_step,
            factor=self.factor,
            stopped=self.stopped,
            bad=self._bad,
            bad_since_drop=self._bad_since_drop,
        )

    @state.setter
    def state(self, state: TrackerState) -> None:
        self.best_value, self.best_step = state.best_value, state.best_step
        self.factor, self.stopped = state.factor, state.stopped
        self._bad, self._bad_since_drop = state.bad, state.bad_since_drop

    def _better(self, value: float | None) -> bool:
        if value is None or math.isnan(value):
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if self._metric == "logloss" else value > self.best_value

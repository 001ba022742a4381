"""The options of ``evaluate``. Standard library only."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchrec_deepfm.errors import UserError, check_range

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is evaluated, and how.

    Raises:
        UserError: a value is out of its range; the message names the option.
    """

    split: Split | None = None
    """Split of a prepared folder. Default: test."""
    checkpoint: str | None = None
    """Which weights: best, last or a number of steps. Default: the run's own, those of summary.json."""
    by: tuple[str, ...] = ()
    """Columns whose values are evaluated one by one: of a prepared folder categorical ones, of raw files any."""
    slices: int = 20
    """Values listed of each such column, the most frequent ones; the others are taken together."""
    by_user: str | None = None
    """Column with the user of a row, for GAUC, NDCG@k, recall@k and MAP@k."""
    k: tuple[int, ...] = (10,)
    """Values of k."""
    bootstrap: int = 0
    """Resamples for confidence intervals, such as 1000: of rows, and of users for the metrics by user; 0: none."""
    confidence: float = 0.95
    """Share of the resamples inside an interval."""
    seed: int = 0
    """Seed of the resamples."""
    compare: Path | None = None
    """Another run, evaluated on the same rows: the differences are those of this run minus that one, and paired."""
    compare_checkpoint: str | None = None
    """Which weights of the other run, as --checkpoint."""
    output: Path | None = None
    """JSON file for the result. Default: evaluate_<split>.json in the run folder; --checkpoint adds to the name."""
    overwrite: bool = False
    """Replace that file if it holds another evaluation."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UserError(
                "give 0 for no intervals, or at least 2, such as 1000", where=f"--bootstrap {self.bootstrap}"
            )
        if not 0.0 < self.confidence < 1.0 or math.isnan(self.confidence):
            raise UserError("must lie between 0 and 1, such as 0.95", where=f"--confidence {self.confidence}")
        if self.seed < 0:
            raise UserError("must not be negative", where=f"--seed {self.seed}")
        check_range("slices", self.slices, 1)
        if not self.k or min(self.k) < 1:
            raise UserError("must be at least 1", where=f"--k {' '.join(map(str, self.k))}")
        if self.compare is None and self.compare_checkpoint is not None:
            raise UserError("name the other run with --compare", where="--compare-checkpoint")

"""What scores encoded rows, and what their logits are made of. No torch.

Shape letters: n rows, F fields (numeric ones first, then categorical ones), K factor_dim.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.data.schema import Schema


@dataclass(frozen=True, kw_only=True)
class LogitParts:
    """What the logits of n rows are made of; a term that the model was trained without is zero.

    Args:
        bias: The global bias.
        first_order: float64 [n, F], ``w_j x_j``.
        factors: float64 [n, F, K], ``V_j x_j``, whose inner products are the pairs.
        deep: float64 [n].
    """

    bias: float
    first_order: NDArray[np.float64]
    factors: NDArray[np.float64]
    deep: NDArray[np.float64]

    @property
    def logits(self) -> NDArray[np.float64]:
        """Their sum, float64 [n]."""
        squared = self.factors.sum(axis=1) ** 2 - (self.factors**2).sum(axis=1)
        pairs: NDArray[np.float64] = 0.5 * squared.sum(axis=1)
        total: NDArray[np.float64] = self.bias + self.first_order.sum(axis=1) + pairs + self.deep
        return total


class Scorer(Protocol):
    """A model that scores encoded rows: of a run, or of a package."""

    @property
    def schema(self) -> Schema:
        """The columns of encoded rows."""
        ...

    def __call__(self, rows: EncodedRows) -> NDArray[np.float32]:
        """Return the click probabilities, float32 [n]."""
        ...

    def logits(self, rows: EncodedRows) -> NDArray[Any]:
        """Return the logits, [n]."""
        ...

    def parts(self, rows: EncodedRows) -> LogitParts:
        """Return what the logits are made of."""
        ...


def sigmoid(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return probabilities in float64, where different logits stay different."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))

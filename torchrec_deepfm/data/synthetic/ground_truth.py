"""The known model behind the synthetic click logs: a small DeepFM drawn from a seed.

Shape legend: B rows, I = 13 numeric fields, F = 26 categorical fields, K width of a factor, H hidden units.

A click is drawn with probability sigmoid(logit), where, over the I + F embeddings e_i = x_i * v_i,

    logit = bias + sum_i w_i x_i + sum_{i<j} <e_i, e_j> + <c, tanh(A e + a)>.

A numeric value enters as x = log1p(max(value, 0)), a missing one as x = 0. A category enters with x = 1, and missing is
a category of its own. This is DeepFM's own form with a tanh layer as the deep part: a DeepFM can come as near to it as
the number of rows allows, a factorization machine misses the tanh layer, logistic regression the pairs as well.
"""

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np

from torchrec_deepfm.data.synthetic.columns import (
    CATEGORICAL_COLUMNS,
    NUMERIC_COLUMNS,
    Floats,
    Integers,
    draw_rows,
    shares,
)

FACTOR_DIM: Final = 4
HIDDEN: Final = 3

# Standard deviations of the parts over rows, before their sum is scaled to _LOGIT_STD. Found by experiment:
# with a million rows logistic regression, FM and DeepFM differ clearly, and DeepFM comes near the optimum.
_LINEAR_STD: Final = 0.7
_PAIRS_STD: Final = 0.9
_DEEP_STD: Final = 1.1
_LOGIT_STD: Final = 1.65
# Standard deviation of tanh's input: at 2 it saturates often, so that no sum of pairs can replace it.
_TANH_INPUT_STD: Final = 2.0
# Share of tanh's linear trend that the first order cancels, so that logistic regression can't learn it.
_TREND_TAKEN_AWAY: Final = 0.75
# Rows on which the scales and the bias are set: the click rate is then right to about 0.001.
_CALIBRATION_ROWS: Final = 131_072


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The parameters of the model that the clicks are drawn from.

    ``numeric``: [I, K + 1]: a row [v | w] for each numeric field. ``categorical``: f arrays [1 + distinct values, K +
    1] of rows [v | w]; row 0 is the missing value. ``hidden_weight``: a, [I + F, K, H]; numeric fields come first.
    ``hidden_bias``: a, [H]. ``output_weight``: c, [H].

    Example:
        >>> truth = draw_truth(seed=0, click_rate=0.25)
        >>> numbers, ids = draw_rows(np.random.default_rng(1), 5)
        >>> truth.logit(numbers, ids).shape
        (5,)
    """

    bias: float
    numeric: Floats
    categorical: tuple[Floats, ...]
    hidden_weight: Floats
    hidden_bias: Floats
    output_weight: Floats

    def logit(self, numbers: Integers, ids: Integers) -> Floats:
        """Return the true log-odds [B] of a click, for raw integers [B, I] and categories [B, F]."""
        first, pairs, hidden = _terms(self.numeric, self.categorical, self.hidden_weight, numbers, ids)
        logit = self.bias + first + pairs
        for unit, weight in enumerate(self.output_weight):
            logit += weight * np.tanh(hidden[:, unit] + self.hidden_bias[unit])
        return logit


@functools.lru_cache(maxsize=4)  # some 0.3 s
def draw_truth(*, seed: int, click_rate: float) -> Truth:
    """Draw the model and set its scales; the bias alone sets the mean click probability."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    numeric = np.concatenate(
        [
            0.25 * generator.standard_normal((NUMERIC_COLUMNS, FACTOR_DIM)),
            0.3 * generator.standard_normal((NUMERIC_COLUMNS, 1)),
        ],
        axis=1,
    )
    categorical = [_draw_table(generator, column) for column in range(CATEGORICAL_COLUMNS)]
    fields = NUMERIC_COLUMNS + CATEGORICAL_COLUMNS
    hidden_weight = generator.standard_normal((fields, FACTOR_DIM, HIDDEN))
    offset = _TANH_INPUT_STD * generator.uniform(-0.7, 0.7, HIDDEN)
    output = generator.choice([-1.0, 1.0], HIDDEN) * generator.uniform(0.7, 1.3, HIDDEN)

    sample = draw_rows(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))), _CALIBRATION_ROWS)
    first, pairs, hidden = _terms(numeric, categorical, hidden_weight, *sample)

    # The factors: pairs are quadratic in them, hence the square root. What goes into tanh is then scaled by A alone.
    factor_scale = np.sqrt(_PAIRS_STD / pairs.std())
    pairs *= factor_scale**2
    input_scale = _TANH_INPUT_STD / hidden.std(axis=0)
    hidden *= input_scale
    hidden_weight *= input_scale / factor_scale
    hidden_bias = offset - hidden.mean(axis=0)
    # The deep part, with its linear trend taken away in part: the trend is linear in e, so the first order can hold it.
    activation = np.tanh(hidden + hidden_bias)
    centred = hidden - hidden.mean(axis=0)
    trend = _TREND_TAKEN_AWAY * (centred * activation).mean(axis=0) / (centred**2).mean(axis=0)
    output *= _DEEP_STD / _weighted(activation - trend * centred, output).std()
    linear_scale = _LINEAR_STD / first.std()
    first = linear_scale * first - _weighted(hidden, trend * output)

    # The whole: every part scales by the same number, and what goes into tanh keeps its size.
    logit = first + pairs + _weighted(activation, output)
    scale = _LOGIT_STD / logit.std()
    factor = factor_scale * np.sqrt(scale)
    hidden_weight /= np.sqrt(scale)

    def rescaled(rows: Floats, field: int) -> Floats:
        v = rows[:, :FACTOR_DIM] * factor
        # v and A carry the final scales here, so v A is what goes into tanh.
        taken = np.einsum("nk,kh,h->n", v, hidden_weight[field], trend * output)
        return np.concatenate([v, (scale * (linear_scale * rows[:, FACTOR_DIM] - taken))[:, None]], axis=1)

    return Truth(
        bias=_bias(scale * logit, click_rate),
        numeric=np.concatenate([rescaled(numeric[i : i + 1], i) for i in range(len(numeric))]),
        categorical=tuple(rescaled(table, len(numeric) + i) for i, table in enumerate(categorical)),
        hidden_weight=hidden_weight,
        hidden_bias=hidden_bias,
        output_weight=scale * output,
    )


def _draw_table(generator: np.random.Generator, column: int) -> Floats:
    """Draw rows [v | w] with mean 0 over the column's distribution.

    Columns with many values get small rows, v above all: rare values give too little data to learn interactions.
    """
    share = shares(column)
    table = generator.standard_normal((len(share), FACTOR_DIM + 1))
    table -= np.einsum("n,nk->k", share, table)
    table[:, :FACTOR_DIM] *= len(share) ** -0.8
    table[:, FACTOR_DIM] *= len(share) ** -0.3
    return table


def _terms(
    numeric: Floats,
    categorical: list[Floats] | tuple[Floats, ...],
    hidden_weight: Floats,
    numbers: Integers,
    ids: Integers,
) -> tuple[Floats, Floats, Floats]:
    """Return the first order [B], the pairs [B] and A e [B, H].

    All three follow from sums over fields, so a field's table is widened to [v | w | <v, v> | v A] and gathered once.
    Sums run field by field, without a matrix product, whose rounding could depend on the number of threads.
    """
    # x = 0 for missing numbers too, since their mark is negative
    x = np.log1p(np.maximum(numbers, 0))
    total = np.zeros((len(ids), FACTOR_DIM + 2 + HIDDEN))
    for field in range(len(numeric) + len(categorical)):
        column = field - len(numeric)
        table = numeric[field : field + 1] if column < 0 else categorical[column]
        v = table[:, :FACTOR_DIM]
        squares = np.einsum("nk,nk->n", v, v)[:, None]
        wide = np.concatenate([table, squares, np.einsum("nk,kh->nh", v, hidden_weight[field])], axis=1)
        if column < 0:
            scaled = x[:, field : field + 1] * wide
            scaled[:, FACTOR_DIM + 1] *= x[:, field]  # <e, e> has x twice
            total += scaled
        else:
            total += wide[ids[:, column]]
    factors = total[:, :FACTOR_DIM]
    pairs = 0.5 * (np.einsum("bk,bk->b", factors, factors) - total[:, FACTOR_DIM + 1])
    return total[:, FACTOR_DIM].copy(), pairs, total[:, FACTOR_DIM + 2 :].copy()


def _weighted(columns: Floats, weights: Floats) -> Floats:
    result: Floats = np.einsum("bh,h->b", columns, weights)
    return result


def _bias(logit: Floats, click_rate: float) -> float:
    """Find the constant that gives the mean click probability by halving an interval that must hold it."""
    low, high = -60.0 - float(logit.max()), 60.0 - float(logit.min())
    for _ in range(80):
        middle = (low + high) / 2
        if float(probability(logit + middle).mean()) < click_rate:
            low = middle
        else:
            high = middle
    return low


def probability(logit: Floats) -> Floats:
    """Return sigmoid(logit) without overflow.

    ``logit``: any shape.

    Example:
        >>> probability(np.array([-1000.0, 0.0, 1000.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    # tanh saturates quietly where exp would overflow
    result: Floats = 0.5 * (1.0 + np.tanh(0.5 * logit))
    return result

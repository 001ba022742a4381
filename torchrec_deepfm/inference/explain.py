"""Why a row has its probability: bias + first order + pairs of fields + deep part; and which fields matter.

Shape letters: n rows, F fields (numeric ones first, then categorical ones), K factor_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.inference.parts import LogitParts, Scorer, sigmoid

_TEXT: Final = 40


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The parts of the logits of n rows.

    Args:
        fields: F names.
        values: F raw values of each row, as text; an empty text is missing.
        parts: Bias, first order, factors and deep part.

    Example:
        >>> first = np.array([[1.0, 2.0]])
        >>> parts = LogitParts(bias=0.5, first_order=first, factors=np.ones((1, 2, 3)), deep=np.zeros(1))
        >>> found = Explanation(fields=("user", "item"), values=[("anna", "7")], parts=parts)
        >>> found.logits.tolist(), found.pairs(0)
        ([6.5], [(0, 1, 3.0)])
    """

    fields: tuple[str, ...]
    values: Sequence[tuple[str, ...]]
    parts: LogitParts

    @property
    def logits(self) -> NDArray[np.float64]:
        """The sum of all parts, float64 [n]."""
        return self.parts.logits

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """The click probabilities, float64 [n]."""
        return sigmoid(self.logits)

    def pairs(self, row: int, most: int | None = None) -> list[tuple[int, int, float]]:
        """List the pairs of fields of a row, strongest first: (place, other place, inner product)."""
        factors = self.parts.factors[row]
        products = factors @ factors.T
        upper = np.triu_indices(len(self.fields), 1)
        order = np.argsort(-np.abs(products[upper]), kind="stable")[:most]
        return [(int(upper[0][at]), int(upper[1][at]), float(products[upper][at])) for at in order]

    def contributions(self) -> NDArray[np.float64]:
        """What each field adds [n, F]: its first order and half of its pairs; with bias and deep part, the logit."""
        total = self.parts.factors.sum(axis=1, keepdims=True)
        halves: NDArray[np.float64] = 0.5 * (self.parts.factors * (total - self.parts.factors)).sum(axis=2)
        return self.parts.first_order + halves

    def table(self) -> pl.DataFrame:
        """Return all parts, one a line: those of a row sum to its logit."""
        found: list[tuple[int, str, str | None, str | None, str | None, str | None, float]] = []
        for row, values in enumerate(self.values):
            found.append((row, "bias", None, None, None, None, self.parts.bias))
            for j, name in enumerate(self.fields):
                first = float(self.parts.first_order[row, j])
                found.append((row, "first order", name, values[j], None, None, first))
            for i, j, product in self.pairs(row):
                found.append((row, "pair", self.fields[i], values[i], self.fields[j], values[j], product))
            found.append((row, "deep", None, None, None, None, float(self.parts.deep[row])))
        columns = ("row", "part", "field", "value", "other field", "other value", "contribution")
        types = (pl.Int64, *[pl.String] * 5, pl.Float64)
        return pl.DataFrame(found, schema=dict(zip(columns, types, strict=True)), orient="row")

    def text(self, row: int, most: int = 5) -> str:
        """Return the parts of a row as lines for a terminal, with the strongest first orders and pairs."""
        values, first = self.values[row], self.parts.first_order[row]

        def named(j: int) -> str:
            value = values[j] if len(values[j]) <= _TEXT else values[j][:_TEXT] + "..."
            return f"{self.fields[j]}={value or '(missing)'}"

        pairs = self.pairs(row)
        lines = [
            f"row {row + 1}: probability {self.probabilities[row]:.5f}, logit {self.logits[row]:+.5f}",
            f"  {'bias':<60}{self.parts.bias:>+12.5f}",
            f"  {'first order':<60}{first.sum():>+12.5f}",
        ]
        strongest = np.argsort(-np.abs(first), kind="stable")[:most]
        lines += [f"    {named(j):<58}{first[j]:>+12.5f}" for j in strongest]
        lines.append(f"  {'pairs':<60}{sum(product for _, _, product in pairs):>+12.5f}")
        lines += [f"    {named(i) + ' x ' + named(j):<58}{product:>+12.5f}" for i, j, product in pairs[:most]]
        lines.append(f"  {'deep part':<60}{self.parts.deep[row]:>+12.5f}")
        return "\n".join(lines)


def explain_rows(scorer: Scorer, rows: EncodedRows, values: Sequence[tuple[str, ...]]) -> Explanation:
    """Take the logits of n encoded rows apart; ``values`` are their raw values as text, F of each row."""
    schema = scorer.schema
    return Explanation(fields=(*schema.numeric, *schema.categorical), values=values, parts=scorer.parts(rows))


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much a field matters over many rows.

    Args:
        field: Its name.
        contribution: Mean absolute contribution to the logit, by first order and pairs.
        auc_loss: How much the AUC falls when the values of this field are shuffled among the rows; ``None`` without
            labels of both kinds.
    """

    field: str
    contribution: float
    auc_loss: float | None


def importance(
    scorer: Scorer, rows: EncodedRows, labels: NDArray[np.int64] | None, *, seed: int = 0
) -> list[Importance]:
    """Measure how much each field matters, most important first: by the AUC's loss, without labels by contribution."""
    from sklearn.metrics import roc_auc_score  # slow to import, and predict needs none of it

    found = explain_rows(scorer, rows, [])
    contributions = np.abs(found.contributions()).mean(axis=0)
    measured = labels is not None and 0 < labels.mean() < 1
    auc = roc_auc_score(labels, scorer.logits(rows)) if measured else 0.0
    order = np.random.default_rng(seed).permutation(len(rows))
    fields = []
    for j, name in enumerate(found.fields):
        fallen = None
        if measured:
            fallen = float(auc - roc_auc_score(labels, scorer.logits(_shuffled(rows, scorer.schema, name, order))))
        fields.append(Importance(field=name, contribution=float(contributions[j]), auc_loss=fallen))
    return sorted(fields, key=lambda one: -(one.contribution if one.auc_loss is None else one.auc_loss))


def _shuffled(rows: EncodedRows, schema: Any, name: str, order: NDArray[np.int64]) -> EncodedRows:
    """The rows with the values of one field in another order."""
    if name in schema.numeric:
        dense = rows.dense.copy()
        columns = schema.dense_slice(name)
        dense[:, columns] = dense[order, columns]
        return replace(rows, dense=dense)
    if name in schema.one_hot:
        sparse = rows.sparse.copy()
        sparse[:, schema.one_hot.index(name)] = sparse[order, schema.one_hot.index(name)]
        return replace(rows, sparse=sparse)
    bags = rows.bags[name]
    ends = np.cumsum(bags.lengths)
    lists = [np.arange(ends[row] - bags.lengths[row], ends[row]) for row in order]
    places = np.concatenate(lists) if lists else np.empty(0, np.int64)
    moved = replace(
        bags,
        ids=bags.ids[places],
        lengths=bags.lengths[order],
        weights=None if bags.weights is None else bags.weights[places],
    )
    return replace(rows, bags={**rows.bags, name: moved})

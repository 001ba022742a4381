"""A loaded model as the service uses it: batches of checked rows in, an answer for each request out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.explain import Explanation, explain_rows
from torchrec_deepfm.inference.load import Predictor, load, spread
from torchrec_deepfm.inference.serve.rows import Fault, RequestColumn, RequestError, Row, as_table, columns_of


@dataclass(frozen=True, kw_only=True)
class Work:
    """The rows of a request, a table or checked rows of JSON, and whether to take their predictions apart."""

    rows: pa.Table | list[Row]
    explain: bool = False


class ServedModel:
    """A run or a package, read once and tried on a row; a link is followed now, and may move later.

    UserError: as ``load``; or it gives no probability for a row of missing values.
    """

    def __init__(self, path: Path, *, checkpoint: str | None = None, threads: int | None = None) -> None:
        self._predictor: Predictor = load(path.resolve(), checkpoint, threads=threads)
        self.name, self.sha256 = str(path), self._predictor.sha256
        self.columns: tuple[RequestColumn, ...] = columns_of(self._predictor.encoder)
        row = pa.table({column.name: column.array([None]) for column in self.columns})
        [found] = self.answer(
            [Work(rows=row)]
        )  # this also sorts the vocabularies, which the first request would wait for
        if isinstance(found, Exception):
            raise UserError(f"can't score a row of missing values ({found})", where=path, remedy="serve another model")

    def answer(self, batch: Sequence[Work]) -> list[Any]:
        """Score requests whose rows have the same columns and types, or the same form.

        Each gets float32 [n], or an ``Explanation``, or the error to answer with.
        """
        encoder, given = self._predictor.encoder, [work.rows for work in batch]
        try:
            if isinstance(given[0], pa.Table):
                table = pa.concat_tables(given)
            else:
                table = as_table(self.columns, [row for rows in given for row in rows])
            rows = encoder.encode(table, on_bad_row="skip")
            if batch[0].explain and not rows.bad:
                raw = encoder.read(table)
                return [explain_rows(self._predictor.score, rows, encoder.texts(raw))]
            scores = spread(self._predictor.score(rows), rows.bad)
        except RequestError as error:  # of one of them
            return [error] if len(batch) == 1 else [answer for work in batch for answer in self.answer([work])]
        except UserError as error:
            return [RequestError(422, Fault(str(error)))] * len(batch)
        answers: list[Any] = []
        start = 0
        for work in batch:
            stop = start + len(work.rows)
            faults = [Fault(what, row - start + 1) for row, what in sorted(rows.bad.items()) if start <= row < stop]
            if faults:
                answers.append(RequestError(422, *faults[:10]))
            elif np.isfinite(scores[start:stop]).all():
                answers.append(scores[start:stop])
            else:
                answers.append(ArithmeticError("the model gave no number for a row"))
            start = stop
        return answers


def parts(explanation: Explanation, row: int, most_pairs: int) -> dict[str, Any]:
    """Return the parts of a row's logit as ``app.RowParts`` describes them, with the ``most_pairs`` strongest pairs."""
    found, fields = explanation.parts, explanation.fields
    amounts = zip(
        fields, explanation.values[row], found.first_order[row], explanation.contributions()[row], strict=True
    )
    return {
        "probability": float(explanation.probabilities[row]),
        "logit": float(explanation.logits[row]),
        "bias": found.bias,
        "deep": float(found.deep[row]),
        "fields": [
            {"field": field, "value": value, "first_order": float(first), "contribution": float(amount)}
            for field, value, first, amount in amounts
        ],
        "pairs": [
            {"field": fields[i], "other_field": fields[j], "contribution": product}
            for i, j, product in explanation.pairs(row, most_pairs)
        ],
    }

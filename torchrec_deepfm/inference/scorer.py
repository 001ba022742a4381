"""Encoded rows through the unsharded model of a run.

Shape letters: n rows, B rows of a batch, F fields, K factor_dim.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_deepfm.data.loader.batch import key_jagged
from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.inference.parts import LogitParts, sigmoid
from torchrec_deepfm.model.deepfm import DeepFM
from torchrec_deepfm.training.scoring.evaluation import autocast, float32_products

_CPU = torch.device("cpu")


class ModelScorer:
    """Scores encoded rows in batches, as ``evaluate`` does, by a model in eval mode on the CPU."""

    def __init__(self, model: DeepFM, schema: Schema, precision: str = "float32") -> None:
        self.model, self.schema, self._precision = model, schema, precision

    def __call__(self, rows: EncodedRows) -> NDArray[np.float32]:
        """Return the click probabilities, float32 [n]."""
        return sigmoid(self.logits(rows)).astype(np.float32)

    def logits(self, rows: EncodedRows) -> NDArray[np.float32]:
        """Return the logits, float32 [n]."""
        logits = np.empty(len(rows), np.float32)
        for start, stop, dense, sparse in self.batches(rows):
            with self.computing():
                logits[start:stop] = self.model(dense, sparse).float().squeeze(1).numpy()
        return logits

    def batches(self, rows: EncodedRows) -> Iterator[tuple[int, int, Tensor, KeyedJaggedTensor]]:
        """Yield the first row and one past the last, and the model's inputs, of each of ``rows.batches()``."""
        start = 0
        for part in rows.batches():
            by_key = np.ascontiguousarray(part.sparse.T)
            sparse = key_jagged(self.schema, by_key, part.bags, len(part))
            yield start, start + len(part), torch.tensor(part.dense), sparse
            start += len(part)

    def parts(self, rows: EncodedRows) -> LogitParts:
        """Return what the logits are made of, n rows."""
        model, terms, width = self.model, self.model.terms, self.model.factor_dim
        fields = len(self.schema.numeric) + len(self.schema.categorical)
        first = np.zeros((len(rows), fields))
        factors, deep = np.zeros((len(rows), fields, width)), np.zeros(len(rows))
        for start, stop, dense, sparse in self.batches(rows):
            with self.computing():
                looked_up = model.fields(dense, model.sparse_arch(sparse))
                if "linear" in terms:
                    first[start:stop] = looked_up[:, :, width].numpy()
                if "fm" in terms:
                    factors[start:stop] = looked_up[:, :, :width].numpy()
                if model.over_arch is not None:
                    deep[start:stop] = model.over_arch(looked_up[:, :, :width].flatten(1)).float().squeeze(1).numpy()
        return LogitParts(bias=float(model.bias.detach()), first_order=first, factors=factors, deep=deep)

    def computing(self) -> AbstractContextManager[None]:
        """The precision of the run, which other work in this process does not see."""
        return computing(self._precision, torch.inference_mode())


@contextmanager
def computing(precision: str, mode: AbstractContextManager[object]) -> Iterator[None]:
    """Compute in a precision, as in ``TrainConfig``, which other work in this process does not see."""
    with float32_products(precision), mode, autocast(precision, _CPU):
        yield

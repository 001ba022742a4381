"""A DeepFM trained without sharding, pipelines or files, for small generated tables. Shape letters: n rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchrec import KeyedJaggedTensor

from torchrec_deepfm import DeepFM


@dataclass(frozen=True)
class PlainRows:
    """Numbers [n, I], ids [n, S] in the order of the model's tables, labels [n] of 0 and 1."""

    dense: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.float32]


def best_auc(
    model: DeepFM, train: PlainRows, validation: PlainRows, *, epochs: int, batch_size: int = 256, lr: float = 1e-3
) -> float:
    """Train with Adam and return the best validation AUC of the epochs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    names = model.sparse_arch.sparse_feature_names
    aucs = []
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(train.labels)).split(batch_size):
            rows = chosen.numpy()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                _logits(model, names, train, rows), torch.from_numpy(train.labels[rows])
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = _logits(model, names, validation, np.arange(len(validation.labels)))
        aucs.append(float(roc_auc_score(validation.labels, logits.numpy())))
    return max(aucs)


def _logits(model: DeepFM, names: Sequence[str], rows: PlainRows, chosen: NDArray[np.int64]) -> Tensor:
    ids = torch.from_numpy(np.ascontiguousarray(rows.ids[chosen].T).reshape(-1))
    lengths = torch.ones(len(names) * len(chosen), dtype=torch.int32)
    sparse = KeyedJaggedTensor.from_lengths_sync(list(names), ids, lengths)
    found: Tensor = model(torch.from_numpy(rows.dense[chosen]), sparse).squeeze(1)
    return found

"""Trains scikit-learn's logistic regression on a prepared folder; ``table.py`` starts this.

    python -m benchmarks.quality.workers.train_sklearn DATA RESULT.json SETTINGS.json SEED

Ids are one-hot, numbers are divided by their standard deviation. The strength of the L2 penalty is chosen from
``settings["C"]`` by validation AUC. The solver (lbfgs) is deterministic: all seeds give the same result.
"""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import sklearn
from sklearn.linear_model import LogisticRegression

from benchmarks.quality.workers.prepared_arrays import Arrays, Clock, Split, run_worker, score, write


def main(data: Path, result: Path, settings: dict[str, Any], seed: int) -> None:
    del seed
    arrays = Arrays.read(data)
    train = arrays.splits["train"]
    deviations = train.dense.std(axis=0) if train.dense.size else np.ones(0)
    deviations[deviations == 0] = 1.0
    rows = {name: features(split, arrays, deviations) for name, split in arrays.splits.items()}
    clock, tried = Clock(), []
    for strength in settings["C"]:
        model = LogisticRegression(C=strength, max_iter=settings["max_iter"]).fit(rows["train"], train.labels)
        scores = {
            name: score(split.labels, model.predict_proba(rows[name])[:, 1])
            for name, split in arrays.splits.items()
            if name != "train"
        }
        tried.append((scores["validation"]["auc"], strength, scores))
    _, strength, scores = max(tried, key=lambda one: one[0])
    versions = {"scikit-learn": sklearn.__version__}
    write(result, {**scores, "C": strength, "seconds": clock(), "epochs": None, "versions": versions})


def features(split: Split, arrays: Arrays, deviations: np.ndarray) -> sp.csr_matrix:
    """Return [N, I + all ids]: the scaled numbers, then the one-hot ids."""
    sizes = np.fromiter(arrays.num_embeddings.values(), np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = (split.sparse + starts).reshape(-1)
    ends = np.arange(len(split.labels) + 1) * len(sizes)
    ones = sp.csr_matrix((np.ones(len(places), np.float64), places, ends), shape=(len(split.labels), int(sizes.sum())))
    return sp.hstack([sp.csr_matrix(split.dense / deviations), ones], format="csr")


if __name__ == "__main__":
    run_worker(main)

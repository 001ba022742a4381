"""The three documented steps, schema infer, prepare and train, on tables with the columns that real ones have."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from tests.support.data.messy_tables import avazu_like, movielens_like
from tests.support.ranks import CPU, one_rank
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.raw.infer_schema import write_inferred
from torchrec_deepfm.data.schema import read_schema
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.trainer import train

ROWS = 20_000


def features(data: PreparedData, split: str) -> tuple[sparse.csr_matrix, NDArray[np.int32]]:
    """A split as scikit-learn takes it: the numbers, and a column of zeros and ones for each id."""
    [day] = data.days(split)
    arrays, rows = data.arrays(day), slice(day.start, day.start + day.rows)
    ids = arrays.sparse.array[rows]
    columns = [
        sparse.csr_matrix(
            (np.ones(day.rows), (np.arange(day.rows), ids[:, j])), shape=(day.rows, data.num_embeddings[name])
        )
        for j, name in enumerate(data.schema.one_hot)
    ]
    return sparse.hstack([arrays.dense.array[rows], *columns]).tocsr(), arrays.labels.array[rows, 0]


@pytest.mark.parametrize("table", [avazu_like, movielens_like], ids=["Avazu", "MovieLens"])
def test_three_steps_end_in_a_good_model(table: Callable[[Path, int], Path], tmp_path: Path) -> None:
    """Defaults beat a constant; more steps give about the AUC of logistic regression on the same columns."""
    file = table(tmp_path / ("rows.csv" if table is avazu_like else "rows.parquet"), ROWS)
    write_inferred(str(file), tmp_path / "schema.toml")
    data = prepare([file], tmp_path / "data", schema=read_schema(tmp_path / "schema.toml"))
    with one_rank():
        default = train(TrainConfig(), data, tmp_path / "default", CPU).summary
        longer = train(
            TrainConfig(batch_size=256, epochs=3, over_arch_layer_sizes=(64, 32)), data, tmp_path / "longer", CPU
        ).summary
    assert default["warnings"] == longer["warnings"] == []
    assert max(default[split]["ne"] for split in ("validation", "test")) < 1
    rows, labels = features(data, "train")
    peer = LogisticRegression(C=0.1, max_iter=300).fit(rows, labels)
    rows, labels = features(data, "test")
    auc = roc_auc_score(labels, peer.decision_function(rows))
    assert auc > 0.7
    assert longer["test"]["auc"] > auc - 0.02  # 2,000 rows carry a noise of 0.01

"""``load(run)`` takes pandas DataFrames."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import torchrec_deepfm
from tests.inference.test_load import read_raw
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError


def test_predict_and_explain(run: Path, run_data: PreparedData) -> None:
    predictor = torchrec_deepfm.load(run)
    polars = read_raw(run_data.folder.parent / "test.tsv")
    frame = pd.DataFrame(polars.to_dict(as_series=False))
    expected = predictor.predict(polars)
    text = ["user", "item", "shop"]
    for same in (
        frame,
        frame.astype(dict.fromkeys(text, "category") | {"row": "Int32"}),
        frame.astype(dict.fromkeys(text, "string")).convert_dtypes(),
        frame[::-1][::-1].drop(columns="label"),
    ):
        found = predictor.predict(same)
        assert found.dtype == np.float32
        assert found.tolist() == expected.tolist()
    assert np.abs(predictor.explain(frame).probabilities - expected).max() <= 1e-6
    gaps = frame.astype({"row": float, "user": object})
    gaps.loc[3, "row"] = gaps.loc[4, "user"] = np.nan
    rows = polars.rows(named=True)
    rows[3]["row"] = rows[4]["user"] = None
    assert predictor.predict(gaps).tolist() == predictor.predict(rows).tolist()
    with pytest.raises(UserError, match=r"^row 2, column 'user': 'zz' is not a hexadecimal number"):
        predictor.predict(frame.assign(user=["a", "zz", *frame["user"][2:]]))

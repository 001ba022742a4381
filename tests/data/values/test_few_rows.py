"""A few rows take a shorter way than many: their numbers and ids are the same, to the last bit."""

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from torchrec_deepfm.data.raw.cells import columns
from torchrec_deepfm.data.values import hashing, numeric
from torchrec_deepfm.data.values.numeric import NumericColumn


@pytest.fixture
def never_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of many rows."""
    for module, name in ((columns, "_FEW_CELLS"), (numeric, "_FEW_CELLS"), (hashing, "_FEW")):
        monkeypatch.setattr(module, name, -1)


def _all() -> list[object]:
    rng = np.random.default_rng(0)
    some = [None, 0.0, -0.0, 1.0, -1.0, 1e-300, 3e38, -3e38, *rng.uniform(-5, 5, 40), *np.exp(rng.uniform(-40, 80, 80))]
    frame = pl.DataFrame({f"n{j}": pl.Series(some, dtype=pl.Float64).shift(j) for j in range(4)})
    kinds = ("log1p", "signed_log1p", "none", "log1p")
    numbers = [
        NumericColumn(name=str(j), transform=kind, buckets=None, indicator=j in (0, 2), width=None)
        for j, kind in enumerate(kinds)
    ]
    dense = numeric.dense(frame, numbers)
    assert dense.dtype == np.float32
    integers = pl.Series("c0", [None, 0, 7, -1, 2**63 - 1, -(2**63)])
    codes = pl.Series("c1", [0, None, 2**32 - 1, 9, 10, 11], dtype=pl.UInt32)
    texts = pl.Series("c2", [None, "", "a", "ü", "a" * 300, "0"])
    ids = hashing.Hashing(duckdb.connect(), [10, 11, 1000]).block(pl.DataFrame([integers, codes, texts]), [0, 1, 2])
    cells = [None, "", "0", "00ff", "FFFFFFFF", "fffffffff", "g", "1\n", " 1", "+1", "0x1", "1_0", "٣"]
    read = columns.categories(pa.chunked_array([pa.array(cells)]), "hex")
    return [dense.view(np.int32).tolist(), ids.tolist(), read.series.to_list(), str(read.series.dtype), read.faults]


def test_few(request: pytest.FixtureRequest) -> None:
    few = _all()
    request.getfixturevalue("never_few")
    assert few == _all()
    assert few[2][:5] == [None, None, 0, 255, 2**32 - 1]  # type: ignore[index]
    assert sorted(few[4]) == list(range(5, 13))  # type: ignore[arg-type]

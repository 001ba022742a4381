"""pandas DataFrames are encoded as the same rows of a file are."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from tests.data.prepare.test_row_encoder import check_as_loaded, data_sets, encoder_of
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.raw.frames import as_arrow
from torchrec_deepfm.errors import UserError


def objects(table: pa.Table) -> pd.DataFrame:
    """Columns of Python's own values, as from records."""
    return pd.DataFrame({name: pd.Series(table[name].to_pylist(), dtype=object) for name in table.column_names})


def category(table: pa.Table) -> pd.DataFrame:
    """Text and integers as pandas' category, out of the order of their rows' numbers."""
    frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    for name in table.column_names:
        if pa.types.is_string(table[name].type) or pa.types.is_int64(table[name].type):
            frame[name] = pd.Categorical(table[name].to_pylist())
    return frame.set_index(pd.Index(range(len(table), 0, -1)))


@given(data_sets())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_table(drawn):
    schema, table, how, _ = drawn
    with TemporaryDirectory() as name:
        folder = Path(name)
        pa.parquet.write_table(table.append_column("y", pa.array([1] * len(table))), folder / "a.parquet")
        data = prepare([folder / "a.parquet"], folder / "out", schema=schema, split="none", **how)
        encoder = encoder_of(data, folder / "encoder")
        for frame in (objects(table), category(table), table.to_pandas(types_mapper=pd.ArrowDtype)):
            check_as_loaded(data, encoder.encode(frame))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pd.Series([1, 2, None]), [1.0, 2.0, None]),
        (pd.Series([1, None, 2**60 + 1], dtype="Int64"), [1, None, 2**60 + 1]),
        (pd.Series([0.5, None, 2], dtype="Float32"), [0.5, None, 2.0]),
        (pd.Series([True, None, False], dtype="boolean"), [True, None, False]),
        (pd.Series([True, pd.NA, False]), [True, None, False]),
        (pd.Series(["a", None, float("nan")]), ["a", None, None]),
        (pd.Series(["a", pd.NA, "b"], dtype="string"), ["a", None, "b"]),
        (pd.Series([pd.NaT, "a", pd.NA], dtype=object), [None, "a", None]),
        (pd.Series([1, pd.NA, "z"], dtype=object), ["1", None, "z"]),
        (pd.Series([np.nan, pd.NA, None], dtype=object), [None, None, None]),
        (pd.Series([np.nan, np.nan]), [None, None]),
        (pd.Series([1, 0, 2], dtype="Sparse[int]"), [1, 0, 2]),
        (pd.Series([[1, 2], None, np.array([3])]), [[1, 2], None, [3]]),
    ],
    ids=str,
)
def test_values(values, expected):
    frame = pd.DataFrame({"other": range(len(values)), "a": values}).set_index("other")
    assert as_arrow(frame, ["a"])["a"].to_pylist() == expected


def test_numbers_as_names():
    assert as_arrow(pd.DataFrame([[5, "a"]]), ["1"]).to_pylist() == [{"1": "a"}]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "^column 'a' appears twice; give every column a name of its own$"),
        (pd.DataFrame({"b": [1]}), "^column 'a' is absent; the rows have b$"),
        (pd.Series([1], name="a"), "^rows of type Series can't be read; give a pandas or polars DataFrame"),
        (pd.DataFrame({"a": [1, [2]]}), r"^row 2, column 'a': \[2\] does not go with 1 before it; give one type$"),
        (pd.DataFrame({"a": [2j, 1j]}), r"^row 1, column 'a': 2j of type complex can't be read; give a number"),
    ],
    ids=str,
)
def test_wrong_frames(frame, message):
    with pytest.raises(UserError, match=message):
        as_arrow(frame, ["a"])

import subprocess
import sys

import pytest

from torchrec_deepfm.data.schema import CRITEO_KAGGLE, CRITEO_TERABYTE, Schema, named_schema
from torchrec_deepfm.errors import UserError


def test_criteo_has_a_label_13_numbers_and_26_categories():
    for schema in (CRITEO_KAGGLE, CRITEO_TERABYTE):
        assert schema.label == "label"
        assert schema.numeric == tuple(f"I{i}" for i in range(1, 14))
        assert (len(schema.categorical), schema.categorical[0], schema.categorical[-1]) == (26, "C1", "C26")
        assert len(schema.columns) == 40


def test_json_round_trip():
    schema = Schema(label="y", numeric=(), categorical=("é", "b c"))
    assert Schema.from_json(schema.to_json()) == schema


def test_unknown_name_lists_the_known_ones():
    assert named_schema("criteo-terabyte") is CRITEO_TERABYTE
    with pytest.raises(UserError) as caught:
        named_schema("criteo")
    assert str(caught.value) == "--schema: there is no schema 'criteo'; choose one of criteo-kaggle, criteo-terabyte"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("y", ("a",), ()), "schema: no categorical column; name at least one under 'categorical'"),
        (("y", ("a",), ("a",)), "schema: column 'a' appears twice; give every column a name of its own"),
        (("y", ("y",), ("a",)), "schema: column 'y' appears twice; give every column a name of its own"),
        (("", ("b",), ("a",)), "schema: '' is no column name; give every column a non-empty name"),
    ],
)
def test_bad_columns(columns, message):
    label, numeric, categorical = columns
    with pytest.raises(UserError) as caught:
        Schema(label=label, numeric=numeric, categorical=categorical)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value", [{}, {"label": "y", "numeric": []}, {"label": "y", "numeric": "ab", "categorical": ["c"]}]
)
def test_damaged_json(value):
    with pytest.raises(UserError, match=r"^schema: "):
        Schema.from_json(value)


def test_reading_a_schema_loads_no_heavy_library():
    code = (
        "import sys, torchrec_deepfm.data.schema as s; sys.exit(bool({'torch', 'numpy', 'duckdb'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

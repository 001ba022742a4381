import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from torchrec_deepfm.data.schema import (
    CRITEO_KAGGLE,
    CRITEO_TERABYTE,
    Column,
    Schema,
    load_schema,
    read_schema,
)
from torchrec_deepfm.errors import UserError


def test_criteo_has_a_label_13_numbers_and_26_categories():
    for schema in (CRITEO_KAGGLE, CRITEO_TERABYTE):
        assert schema.label == "label"
        assert schema.numeric == tuple(f"I{i}" for i in range(1, 14))
        assert (len(schema.categorical), schema.categorical[0], schema.categorical[-1]) == (26, "C1", "C26")
        assert len(schema.names) == 40


def test_json_round_trip():
    schema = Schema(label="y", numeric=(), categorical=("é", "b c"))
    assert Schema.from_json(schema.to_json()) == schema


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ("y", ("a",), ()),
            (
                "schema: no categorical column; name at least one under 'categorical', "
                'or give a number transform = "bucketize"'
            ),
        ),
        (("y", ("a",), ("a",)), "schema: column 'a' appears twice; give every column a different name"),
        (("y", ("y",), ("a",)), "schema: column 'y' appears twice; give every column a different name"),
        (("", ("b",), ("a",)), "schema: '' is not a valid column name; give every column a non-empty name"),
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


# TOML -----------------------------------------------------------------------------------------------------------------

WHOLE = """
label = "click"
numeric = ["price", "user age"]
categorical = ["user/id", "täg", "day"]
numeric_transform = "log1p"
delimiter = ";"

[columns.price]
transform = "bucketize"

[columns."user/id"]
type = "integer"
min_count = 3
num_embeddings = 1000

[columns]
"täg" = { list = true, separator = "|", weights = "loads" }
"""


def test_every_key_is_read(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(WHOLE, encoding="utf-8")
    schema = read_schema(path)
    assert schema == Schema(
        label="click",
        numeric=("price", "user age"),
        categorical=("user/id", "täg", "day"),
        columns={
            "price": Column(transform="bucketize"),
            "user/id": Column(type="integer", min_count=3, num_embeddings=1000),
            "täg": Column(list=True, separator="|", weights="loads"),
        },
        layout="table",
        numeric_transform="log1p",
        delimiter=";",
    )
    assert (schema.multi_hot, schema.one_hot, schema.weighted) == (("täg",), ("user/id", "day"), ("täg",))
    assert schema.columns_read == ("click", "price", "user age", "user/id", "täg", "day", "loads")
    assert schema.options("täg").separator == "|"
    assert schema.options("day") == Column()
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert load_schema(str(path)) == schema
    assert {schema: 1}[read_schema(path)] == 1


def test_a_bom_and_crlf_are_taken(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_bytes(WHOLE.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_schema(path).label == "click"


def test_layout_is_table_unless_said(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text('label = "y"\nnumeric = []\ncategorical = ["c"]\n')
    assert read_schema(path).layout == "table"
    path.write_text('layout = "criteo"\nlabel = "y"\nnumeric = []\ncategorical = ["c"]\n')
    assert read_schema(path).layout == "criteo"
    assert CRITEO_KAGGLE.layout == "criteo"


def test_json_of_version_1_is_read():
    schema = Schema.from_json({"label": "y", "numeric": ["n"], "categorical": ["c"]})
    assert schema == Schema(label="y", numeric=("n",), categorical=("c",), layout="criteo")


LISTS = "categorical: numeric and categorical must be lists of column names; give text in [ ]"
KEYS = (
    "choose one of label, numeric, categorical, columns, layout, numeric_transform, delimiter, missing, weight, header"
)
OPTIONS = (
    "choose one of list, separator, weights, type, min_count, num_embeddings, transform, buckets, width, "
    "missing_indicator, of, part, format, timezone, until, cross"
)
OF_CATEGORICAL = "only valid for a categorical column; remove it"
UNNAMED = "is not among label, numeric and categorical; name it there"
MOST = 2**31 - 1
GOOD = 'label = "y"\nnumeric = ["price"]\ncategorical = ["c", "d"]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "'label' is missing; give label, numeric and categorical"),
        ('label = "y"\nnumeric = []\n', "'categorical' is missing; give label, numeric and categorical"),
        ("labels = 1\n" + GOOD, f"labels: unknown key; {KEYS} (did you mean 'label'?)"),
        (GOOD.replace('"y"', "1"), "label: 1 is not a valid column name; give a text"),
        (GOOD.replace('["c", "d"]', '"c"'), LISTS),
        (GOOD.replace('"d"', "3"), LISTS),
        (GOOD.replace('"d"', '"y"'), "column 'y' appears twice; give every column a different name"),
        (
            GOOD + 'layout = "tabel"',
            "layout: 'tabel' is not valid; choose one of criteo, table (did you mean 'table'?)",
        ),
        (GOOD + "layout = 1", "layout: 1 is not valid; choose one of criteo, table"),
        (GOOD + 'delimiter = "||"', "delimiter: '||' is not valid; give one ASCII character, not a quote or newline"),
        (
            GOOD + 'numeric_transform = "log2"',
            (
                "numeric_transform: 'log2' is not valid; choose one of standard, minmax, clip, quantile, log1p, "
                "signed_log1p, log, bucketize, fuxictr, none (did you mean 'log'?)"
            ),
        ),
        (GOOD + "columns = 1", "columns: not a table; write [columns.NAME] and the options below it"),
        (GOOD + "[columns]\nc = 1", "columns.c: not a table; write [columns.NAME] and the options below it"),
        (
            GOOD + "[columns.c]\nmincount = 1",
            f"columns.c.mincount: unknown option; {OPTIONS} (did you mean 'min_count'?)",
        ),
        (GOOD + "[columns.prize]\n", f"columns.prize: 'prize' {UNNAMED} (did you mean 'price'?)"),
        (GOOD + '[columns]\n"a b" = {}', f"columns.\"a b\": 'a b' {UNNAMED}"),
        (
            GOOD + '[columns]\nc = { list = true, weights = "w" }\nw = {}',
            f"columns.w: 'w' {UNNAMED}; put options of the list at 'c'",
        ),
        (GOOD + "[columns.c]\nlist = 1", "columns.c.list: 1 is not true or false; give one of them"),
        (
            GOOD + '[columns.c]\nseparator = "|"',
            "columns.c.separator: only valid for a list column; add list = true, or remove it",
        ),
        (
            GOOD + '[columns.c]\nlist = true\nweights = ""',
            "columns.c.weights: '' is not a text; give a non-empty string",
        ),
        (
            GOOD + '[columns.c]\ntype = "int"',
            "columns.c.type: 'int' is not valid; choose one of string, integer (did you mean 'integer'?)",
        ),
        (
            GOOD + "[columns.c]\nmin_count = 0",
            f"columns.c.min_count: 0 is not a valid count; give a whole number from 1 to {MOST}",
        ),
        (
            GOOD + "[columns.c]\nmin_count = true",
            f"columns.c.min_count: True is not a valid count; give a whole number from 1 to {MOST}",
        ),
        (
            GOOD + "[columns.c]\nnum_embeddings = 1",
            f"columns.c.num_embeddings: 1 is not a valid count; give a whole number from 2 to {MOST}",
        ),
        (
            GOOD + '[columns.c]\ntransform = "log"',
            "columns.c.transform: only valid for a numeric column; remove it",
        ),
        (GOOD + "[columns.price]\nlist = true", f"columns.price.list: {OF_CATEGORICAL}"),
        (GOOD + "[columns.y]\nmin_count = 2", f"columns.y.min_count: {OF_CATEGORICAL}"),
        (
            GOOD + '[columns.c]\nlist = true\nweights = "d"',
            "columns.c.weights: 'd' is also listed as a column; remove it there",
        ),
        (
            GOOD + '[columns]\nc = {list=true, weights="w"}\nd = {list=true, weights="w"}',
            "columns.c.weights: 'w' serves 2 lists; give each a separate column",
        ),
        (
            'layout = "criteo"\n' + GOOD + "[columns.c]\nlist = true",
            'columns.c.list: not valid for Criteo\'s text; set layout = "table"',
        ),
    ],
)
def test_mistakes_in_toml(tmp_path, text, expected):
    path = tmp_path / "schema.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_schema(str(path))
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"label = \n", "not valid TOML (Invalid value (at line 1, column 9)); correct it there"),
        (b"\xff", "byte 0 is not valid UTF-8; save it as UTF-8, or name a TOML file, or write one: schema infer"),
        (
            b"#" * (1 << 20) + b"\n",
            "larger than 1.0 MiB, not a schema; name a TOML file, or write one: schema infer",
        ),
        (b"a = " + b"[" * 9999, None),
        (None, "no such file; name a TOML file, or write one: schema infer"),
    ],
)
def test_files_that_are_not_a_schema(tmp_path, content, expected):
    path = tmp_path / "schema.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_schema(path)
    if expected is None:
        assert str(caught.value).startswith(f"{path}: not valid TOML (")
    else:
        assert str(caught.value) == f"{path}: {expected}"


def test_a_folder_is_not_a_schema(tmp_path):
    with pytest.raises(UserError, match="this can't be read"):
        read_schema(tmp_path)


def test_load_schema_knows_names():
    assert load_schema("criteo-terabyte") is CRITEO_TERABYTE
    with pytest.raises(UserError) as caught:
        load_schema("criteo-kagle")
    assert str(caught.value) == (
        "--schema: unknown schema 'criteo-kagle'; choose one of criteo-kaggle, criteo-terabyte, criteo-x1, "
        "criteo-x4, frappe-x1, or name a .toml "
        "file (did you mean 'criteo-kaggle'?)"
    )


def test_options_do_not_follow_the_mapping_they_came_from():
    columns = {"c": Column(min_count=2)}
    schema = Schema(label="y", numeric=(), categorical=("c",), columns=columns)
    columns["c"] = Column(min_count=3)
    assert schema.options("c").min_count == 2


def test_a_schema_survives_a_process_border():
    schema = Schema(label="y", numeric=(), categorical=("c",), columns={"c": Column(min_count=2)})
    assert pickle.loads(pickle.dumps(schema)) == schema
    assert copy.deepcopy(schema) == schema
    assert dataclasses.replace(schema, label="z").options("c") == Column(min_count=2)

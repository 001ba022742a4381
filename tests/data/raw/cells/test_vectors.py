"""Lists of numbers, from the cells of any kind of file to the dense array; plain Python has the expected values."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_deepfm.data.raw.infer_schema import infer_schema
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, Schema, parse_schema
from torchrec_deepfm.errors import UserError

VECTORS = [[0.5, -1.0, 3e30], [0.0, 1.0, 2.0], [4.0, 5.0, 6.0]]
HEAD = 'label = "y"\nnumeric = ["e"]\ncategorical = ["u"]\n[columns.e]\n'


def schema(**options: Any) -> Schema:
    return Schema(
        label="y", numeric=("x", "e"), categorical=("u",), layout="table", columns={"e": Column(width=3, **options)}
    )


def table(vectors: Any, kind: pa.DataType | None) -> pa.Table:
    rows = len(vectors)
    return pa.table({"y": [1, 0, 1, 0][:rows], "x": [7.0] * rows, "e": pa.array(vectors, kind), "u": ["a"] * rows})


def read(path: Path, schema: Schema, **options: Any) -> list[tuple[Any, ...]]:
    [source] = open_tables(str(path), schema, **options)
    return [row for piece in source.pieces() for row in piece.frame.select("n0", "n1").rows()]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 3), pa.list_(pa.decimal128(38, 4))],
    ids=str,
)
def test_every_kind_of_list_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    vectors = [[1.5, -2.0, 0.25], *VECTORS[1:]]
    given = [[round(x * 4) for x in row] for row in vectors] if "decimal" in str(kind) else vectors
    pq.write_table(table(given, kind), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", schema()) == [(7.0, [float(x) for x in row]) for row in given]


def test_texts_and_json_are_read_as_lists(tmp_path: Path) -> None:
    expected = [(7.0, [float(np.float32(x)) for x in row]) for row in VECTORS]
    lines = [f"1,7,{' '.join(map(str, row))},a" for row in VECTORS]
    (tmp_path / "t.csv").write_text("\n".join(["y,x,e,u", *lines]) + "\n")
    assert read(tmp_path / "t.csv", schema(separator=" ")) == expected
    pl.DataFrame({"y": [1] * 3, "x": [7] * 3, "e": VECTORS, "u": ["a"] * 3}).write_ndjson(tmp_path / "t.jsonl")
    assert read(tmp_path / "t.jsonl", schema()) == expected


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (None, "the list is missing (expected 3, the column's width)"),
        ([], "the list has 0 numbers (expected 3, the column's width)"),
        ([1.0, 2.0], "the list has 2 numbers (expected 3, the column's width)"),
        ([1.0, 2.0, 3.0, 4.0], "the list has 4 numbers (expected 3, the column's width)"),
        ([1.0, None, 3.0], "number 2 of the list: is missing"),
        ([1.0, 2.0, float("nan")], "number 3 of the list: is missing"),
        ([float("-inf"), 2.0, 3.0], "number 1 of the list: -inf is not finite"),
        ([1.0, 1e39, 3.0], "number 2 of the list: 1e+39 is beyond the range of float32"),
    ],
)
def test_a_list_that_does_not_fit_makes_a_bad_row(bad: Any, what: str, tmp_path: Path) -> None:
    pq.write_table(table([VECTORS[1], bad, VECTORS[2]], pa.list_(pa.float64())), tmp_path / "t.parquet")
    [source] = open_tables(str(tmp_path / "t.parquet"), schema())
    with pytest.raises(UserError) as caught:
        list(source.pieces())
    assert str(caught.value) == f"{tmp_path / 't.parquet'}: row 2, column 'e': {what}; repair or remove the row"
    [piece] = source.pieces(skip_bad=True)
    assert piece.frame["n1"].to_list() == VECTORS[1:]  # the neighbours' numbers have not moved


@pytest.mark.parametrize(
    ("options", "column", "what"),
    [
        ({}, pa.array([1.0, 2.0, 3.0]), "it holds decimal numbers, not lists of numbers"),
        ({}, pa.array(["a", "b", "c"]), 'it holds text, which must be cut into numbers; set separator, such as "|"'),
        ({}, pa.array([["a"], ["b"], ["c"]]), "it holds lists of text, not lists of numbers"),
    ],
)
def test_columns_of_other_types_are_refused(
    options: dict[str, Any], column: pa.Array, what: str, tmp_path: Path
) -> None:
    pq.write_table(table(VECTORS, None).set_column(2, "e", column), tmp_path / "t.parquet")
    with pytest.raises(UserError) as caught:
        open_tables(str(tmp_path / "t.parquet"), schema(**options))
    assert f"column 'e': {what}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("width = 1", "columns.e.width: 1 is not a valid count; give a whole number from 2 to 16384"),
        ('width = 3\ntransform = "log1p"', "columns.e.transform: log1p is not valid for lists of numbers (width)"),
        ("width = 3\nmissing_indicator = true", "columns.e.missing_indicator: not valid beside width"),
        ('separator = "|"', "columns.e.separator: only valid for a list column"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_schema(HEAD + options, Path("s.toml"))
    assert what in str(caught.value)


def test_a_category_is_not_a_list_of_numbers() -> None:
    with pytest.raises(UserError, match="only valid for a numeric column"):
        Schema(label="y", numeric=(), categorical=("e",), layout="table", columns={"e": Column(width=3)})
    columns = {"e": Column(width=2)}
    with pytest.raises(UserError, match=r"a name such as 'x\[0\]' beside a list"):
        Schema(label="y", numeric=("e", "e[1]"), categorical=("u",), layout="table", columns=columns)


def test_names_and_places_of_the_dense_array() -> None:
    found = schema()
    assert found.widths == (1, 3)
    assert found.dense_names == ("x", "e[0]", "e[1]", "e[2]")
    assert found.dense_slice("x") == slice(0, 1)
    assert found.dense_slice("e") == slice(1, 4)


def test_infer_finds_lists_of_one_length(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ragged = [[0.5] * (1 + i % 3) for i in range(200)]
    frame = pl.DataFrame(
        {
            "click": [i % 2 for i in range(200)],
            "user": [f"u{i % 9}" for i in range(200)],
            "title": random.normal(size=(200, 4)).tolist(),
            "ragged": ragged,
            "same": [[1.0, 2.0]] * 200,
            "gaps": [None if i == 7 else [1.0, float(i)] for i in range(200)],
        }
    )
    frame.write_parquet(tmp_path / "t.parquet")
    text = infer_schema(str(tmp_path / "t.parquet"))
    found = parse_schema(text, tmp_path / "s.toml")
    assert found.numeric == ("title",)
    assert found.options("title") == Column(width=4, transform="standard")
    assert "4 numbers in every row, as embeddings have" in text
    left_out = text[text.index("# Left out:") :]
    assert all(f'"{name}"' in left_out for name in ("ragged", "same", "gaps"))
    assert len(read_all(tmp_path / "t.parquet", found)) == 200


def read_all(path: Path, found: Schema) -> list[Any]:
    [source] = open_tables(str(path), found)
    return [row for piece in source.pieces() for row in piece.frame["n0"].to_list()]

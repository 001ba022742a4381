"""What is wrong with a user's table is reported in one line: file, row, column, remedy."""

import gzip
import math

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data.tables import BAGS, SMALL, message, parquet, rows_of, small, text_file
from torchrec_deepfm.data.raw import table_files
from torchrec_deepfm.data.raw.table_source import open_tables, unify
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"y": [0, 2]}, "row 2, column 'y': 2 is not a valid label (expected 0 or 1); repair or remove the row"),
        ({"y": [0.5, 1]}, "row 1, column 'y': 0.5 is not a valid label (expected 0 or 1); repair or remove the row"),
        ({"y": [1, None]}, "row 2, column 'y': the label is missing (expected 0 or 1); repair or remove the row"),
        (
            {"y": [math.nan, 1]},
            "row 1, column 'y': nan is not a valid label (expected 0 or 1); repair or remove the row",
        ),
        ({"y": ["0", "1"]}, "column 'y': it holds text, but a label is a boolean or a number 0 or 1; convert it"),
        ({"n": [1.0, -math.inf]}, "row 2, column 'n': -inf is not finite; repair or remove the row"),
        ({"n": ["1", "2"]}, "column 'n': it holds text, not numbers; list it under categorical"),
        (
            {"n": pa.array([1, 2], pa.timestamp("ms"))},
            "column 'n': it holds timestamp[ms], not numbers; convert it to a number",
        ),
        ({"n": [[1], [2]]}, "column 'n': it holds lists of integers, not numbers; list it under categorical"),
        (
            {"c": [0.5, 1]},
            (
                "column 'c': it holds decimal numbers, which are not categories; list it under numeric, or set "
                'type = "integer" under [columns.c] if they are whole'
            ),
        ),
        (
            {"c": pa.array([1, 2], pa.date32())},
            "column 'c': it holds date32[day]; convert it to text or an integer, or remove it from the schema",
        ),
        ({"c": [["a"], []]}, "column 'c': it holds lists of text; set list = true under [columns.c]"),
        (
            {"c": pa.array([2**64 - 1, 1], pa.uint64())},
            "row 1, column 'c': 18446744073709551615 is beyond a 64-bit integer; repair or remove the row",
        ),
        ({"c": [b"a", b"\xff"]}, "row 2, column 'c': b'\\xff' is not UTF-8; repair or remove the row"),
        ({"c": [b"\xff" * 99, b"a"]}, None),
    ],
)
def test_wrong_columns_of_parquet(tmp_path, columns, expected):
    path = small(tmp_path / "t.parquet", **columns)
    if expected is None:
        assert len(message(path)) < 200 + len(str(path))
    else:
        assert message(path) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        (Column(type="integer"), [1.0, 2.5], "row 2, column 'c': 2.5 is not an integer; repair or remove the row"),
        (Column(type="integer"), [2.0**53 + 2], ("row 1, column 'c': 9007199254740994.0 is too large for an exact "
                                                "integer; repair or remove the row")),
        (Column(type="integer"), ["7", "7.0"], "row 2, column 'c': '7.0' is not an integer; repair or remove the row"),
        (Column(type="integer"), ["9" * 19], (f"row 1, column 'c': '{'9' * 19}' is beyond a 64-bit integer; repair or "
                                             "remove the row")),
        (Column(list=True), [1], "column 'c': it holds integers, one per row; remove list = true under [columns.c]"),
        (Column(list=True), ["a"], ("column 'c': it holds text, which must be cut into lists; set separator, such as "
                                   '"|", under [columns.c]')),
        (Column(list=True), [[0.5]], ("column 'c': it holds lists of decimal numbers, which are not categories; list it "  # noqa: E501
                                     'under numeric, or set type = "integer" under [columns.c] if they are whole')),
        (Column(list=True, type="integer"), [["1"], ["2", "x"]], ("row 2, column 'c': 'x' is not an integer; repair or "
                                                                 "remove the row")),
        (Column(list=True), [[b"a"], [], [b"a", b"\xff"]], ("row 3, column 'c': b'\\xff' is not UTF-8; repair or remove "  # noqa: E501
                                                           "the row")),
        (Column(list=True, separator="|"), [b"a|b", None, b"\xff|a"], ("row 3, column 'c': b'\\xff|a' is not UTF-8; "
                                                                      "repair or remove the row")),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_their_options(tmp_path, options, values, expected):
    schema = Schema(label="y", numeric=(), categorical=("c",), columns={"c": options}, layout="table")
    path = parquet(tmp_path / "t.parquet", {"y": [1] * len(values), "c": values})
    assert message(path, schema) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([["a"], ["a", "b"]], [[1.0], [1.0]], "row 2, column 'w': 2 values have 1 weights"),
        ([["a"], ["a"]], [[1.0], None], "row 2, column 'w': 1 values have 0 weights"),
        ([[], ["a"]], [[2.0], [1.0]], "row 1, column 'w': 0 values have 1 weights"),
        ([["a"], ["a", "b"]], [[1.0], [2.0, None]], "row 2, column 'w': a weight is missing"),
        ([["a"], ["a"]], [[1.0], [math.nan]], "row 2, column 'w': a weight nan is not a finite number"),
        ([["a", "b"], ["a"]], [[1.0, 1e300], [1.0]], "row 1, column 'w': a weight 1e+300 is not a finite number"),
        # A missing list takes its weights with it, and a fault before does not shift what is reported.
        ([None, ["a", "b"]], [[9.0], [2.0, math.inf]], "row 2, column 'w': a weight inf is not a finite number"),
        (["a|b", "c"], ["1|x", "1"], "row 1, column 'w': a weight 'x' is not a finite number"),
    ],
)
def test_wrong_weights(tmp_path, values, weights, expected):
    path = parquet(tmp_path / "t.parquet", {"y": [1, 1], "b": values, "w": weights})
    assert message(path, BAGS) == f"{path}: {expected}; repair or remove the row"


def test_bad_rows_of_a_table_with_lists_are_left_out(tmp_path):
    columns = {
        "y": [1, 1, 7, 0, 1],
        "b": [["a", None], ["b", "c"], ["d"], None, ["e", "f"]],
        "w": [[0.5, math.nan], [1.0], [1.0], [3.0, 4.0], [1.0, math.inf]],
    }
    [source] = open_tables(str(parquet(tmp_path / "t.parquet", columns)), BAGS)
    [piece] = source.pieces(skip_bad=True)
    assert piece.frame.rows() == [(1, ["a"], [0.5]), (0, None, None)]
    assert [(one.line, one.reason) for one in piece.skipped] == [
        (2, "column 'w': 2 values have 1 weights"),
        (3, "column 'y': 7 is not a valid label (expected 0 or 1)"),
        (5, "column 'w': a weight inf is not a finite number"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y,n,c\n1,2,a\nx,2,a\n", "row 3, column 'y': 'x' is not a valid label (expected 0 or 1); repair or remove the row"),  # noqa: E501
        ("y,n,c\n,2,a\n", "row 2, column 'y': the label is missing (expected 0 or 1); repair or remove the row"),
        ("y,n,c\n1,1_0,a\n", "row 2, column 'n': '1_0' is not a number; repair or remove the row"),
        ("y,n,c\n1,1e999,a\n", "row 2, column 'n': '1e999' is not finite; repair or remove the row"),
        ("y,n,c\n1,2\n", "row 2, the row has 2 cells, the header 3; repair or remove the row"),
        (b"y,n,c\n1,2,\xff\n", "row 2, column 'c': b'\\xff' is not UTF-8; repair or remove the row"),
        (b"y,n,\xff\n1,2,a\n", "the header is not UTF-8; save the file as UTF-8"),
        ("y,n,c\n", None),
        ("", "the file is empty; give a CSV whose first row holds the column names"),
        ("1,2,a\n0,2,a\n", ("no column 'y'; the file has '1', '2', 'a'; its first row looks like data: add a "
                             "first row that holds the column names")),
        ("Y,n,c\n1,2,a\n", ("no column 'y'; the file has 'Y', 'n', 'c' (did you mean 'Y'?); correct the name "
                             "in the schema, or add the column")),
        ("y;n;c\n1;2;a\n", ("no column 'y'; the file has 'y;n;c'; its cells are separated by ';': set "
                             'delimiter = ";" in the schema')),
        ("y,n,c,c\n1,2,a,b\n", "column 'c' appears twice; give every column a different name"),
        ('y,n,c\n1,2,a\n1,2,"b\n1,2,c\n', ("a quoted cell is not closed; close the quote, or download the "
                                          "file again if it is cut off")),
    ],
)  # fmt: skip
def test_wrong_csv(tmp_path, text, expected):
    path = text_file(tmp_path / "t.csv", text)
    assert message(path) == f"{path}: {expected or 'the table has no rows; give one with data or leave it out'}"


def test_a_last_cell_may_end_in_a_newline(tmp_path):
    assert rows_of(text_file(tmp_path / "t.csv", 'y,n,c\n1,2,"b\n"\n'), SMALL) == [(1, 2.0, "b\n")]


def test_a_row_that_is_larger_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "_BLOCK_BYTES", 1 << 20)
    path = text_file(tmp_path / "t.csv", 'y,n,c\n1,2,"' + "b,\n" * (1 << 20))
    assert message(path) == f"{path}: a row is longer than 1 MiB; close the quote if one is open, or shorten the row"


def test_separator_is_needed_in_a_csv(tmp_path):
    schema = Schema(label="y", numeric=(), categorical=("a b",), columns={"a b": Column(list=True)}, layout="table")
    path = text_file(tmp_path / "t.csv", "y,a b\n1,x\n")
    assert message(path, schema) == (
        f"{path}: column 'a b': a CSV's cells must be cut into lists; set separator, such as \"|\", under "
        '[columns."a b"]'
    )


def test_columns_that_are_absent_or_double(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"y": [1], "Näme": [1], "c": ["a"]})
    schema = Schema(label="y", numeric=("näme",), categorical=("c",), layout="table")
    assert message(path, schema) == (
        f"{path}: no column 'näme'; the file has 'y', 'Näme', 'c' (did you mean 'Näme'?); correct the name in "
        "the schema, or add the column"
    )
    twice = pa.table([[1], [1], ["a"], ["b"]], names=["y", "n", "c", "c"])
    pq.write_table(twice, path)
    assert message(path) == f"{path}: column 'c' appears twice; give every column a different name"


def test_damaged_files(tmp_path):
    whole = small(tmp_path / "t.parquet").read_bytes()
    for content in (b"", whole[:-6], whole[: len(whole) // 2], b"not Parquet"):
        path = text_file(tmp_path / "t.parquet", content)
        assert message(path).startswith(f"{path}: the file can't be read as Parquet (")
    # The footer is whole, a page is not.
    path = text_file(tmp_path / "t.parquet", whole[:4] + b"\xff" * 60 + whole[64:])
    assert message(path).startswith(f"{path}: the file can't be read as Parquet (")
    text = ("y,n,c\n" + "".join(f"1,{i},{i * i}\n" for i in range(9999))).encode()
    packed = gzip.compress(text)
    for content in (
        packed[:-20],
        packed[:4000] + b"\0\0" + packed[4002:],
        packed[:-5] + b"x" + packed[-4:],
    ):
        path = text_file(tmp_path / "t.csv.gz", content)
        assert message(path).startswith(f"{path}: the .gz data are damaged or cut off (")
    packed = pa.Codec("zstd").compress(text, asbytes=True)
    for content in (packed[:-20], packed[: len(packed) // 2]):
        path = text_file(tmp_path / "t.csv.zst", content)
        assert message(path).startswith(f"{path}: the .zst data are damaged or cut off (")


def test_files_must_agree_in_type(tmp_path):
    one, other = small(tmp_path / "a.parquet", c=["1", "2"]), small(tmp_path / "b.parquet", c=[1, 2])
    nothing = small(tmp_path / "c.parquet", c=[None, None], n=[1.5, None])
    assert message(tmp_path) == (
        f"{other}: column 'c' holds integers, but text in {one}; write both the same way, or set type = \"string\" "
        "under [columns.c]"
    )
    text = Schema(label="y", numeric=("n",), categorical=("c",), columns={"c": Column(type="string")}, layout="table")
    assert [row[2] for row in rows_of(tmp_path, text)] == ["1", "2", "1", "2", None, None]
    # Also over several addresses; a column of nothing takes the type of the others.
    sources = unify([*open_tables(str(nothing), SMALL), *open_tables(str(other), SMALL)])
    assert [next(source.pieces()).frame.schema["c0"] for source in sources] == [pl.Int64, pl.Int64]
    with pytest.raises(UserError, match="holds integers, but text in"):
        unify([*open_tables(str(one), SMALL), *open_tables(str(other), SMALL)])

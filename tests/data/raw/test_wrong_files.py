"""Files that are not what their name or the schema says: the message says what they are and what to do."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pytest

from tests.support.data.tables import BAGS, SMALL, message, parquet, rows_of, text_file
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.raw.criteo_text import TextLog
from torchrec_deepfm.data.raw.infer_schema import infer_schema
from torchrec_deepfm.data.schema import CRITEO_KAGGLE, Column, Schema
from torchrec_deepfm.errors import UserError

CSV = b"y,n,c\n1,2,a\n0,3,b\n"
PACKED = gzip.compress(CSV, mtime=0)  # without the time, which would be in the names of tests
ZSTD = pa.Codec("zstd").compress(CSV, asbytes=True)
OTHERS = "other bytes follow the end of the"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv.gz", CSV, "this is not gzip data; if it is plain text, remove .gz from its name"),
        ("t.csv.zst", CSV, "this is not Zstandard data; if it is plain text, remove .zst from its name"),
        ("t.csv", PACKED, "this is gzip data, but its name does not end in .gz; rename it"),
        ("t.csv", ZSTD, "this is Zstandard data, but its name does not end in .zst; rename it"),
        (
            "t.csv.gz",
            PACKED + b"more",
            f"{OTHERS} .gz data; remove them, or compress the file again",
        ),
        ("t.csv.zst", ZSTD + b"more", f"{OTHERS} .zst data; remove them, or compress the file again"),
        ("t.csv", b"PAR1\x15\0", "this is a Parquet file, but its name does not end in .parquet; rename it"),
        ("t.parquet", PACKED, "this is gzip data, but its name does not end in .gz; rename it"),
        ("t.csv", b"PK\x03\x04..", "this is a ZIP archive or an Excel sheet; unpack it, or save the sheet as CSV"),
        ("t.csv", CSV.decode().encode("utf-16"), "this is UTF-16 text; save it as UTF-8"),
        ("t.csv", CSV.decode().encode("utf-16-le"), "this is binary data or UTF-16 text; give text in UTF-8"),
        (
            "t.csv",
            b'{"y": 1}\n',
            "this is JSON; name it .jsonl if it has an object in each line, or write it as Parquet",
        ),
        ("t.csv", b"<!DOCTYPE html>", "this is a web page; download the file itself"),
        ("t.csv", b"\n\n", "the file is empty; give a CSV whose first row holds the column names"),
    ],
)
def test_a_file_of_another_kind(tmp_path, name, content, expected):
    path = text_file(tmp_path / name, content)
    assert message(path) == f"{path}: {expected}"


def test_gzip_in_several_members_and_a_column_named_like_a_magic_number(tmp_path):
    halves = gzip.compress(CSV[:10]) + gzip.compress(CSV[10:])
    assert rows_of(text_file(tmp_path / "t.csv.gz", halves), SMALL) == [(1, 2.0, "a"), (0, 3.0, "b")]
    schema = Schema(label="y", numeric=(), categorical=("PAR1",), layout="table")
    assert rows_of(text_file(tmp_path / "t.csv", "PAR1,y\na,1\n"), schema) == [(1, "a")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.tsv.gz", b"1\t2\n", "this is not gzip data; if it is plain text, remove .gz from its name"),
        ("d.tsv", gzip.compress(b"1\t2\n", mtime=0), "this is gzip data, but its name does not end in .gz; rename it"),
    ],
)
def test_a_text_log_of_another_kind(tmp_path, name, content, expected):
    path = text_file(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        TextLog(path, CRITEO_KAGGLE)
    assert str(caught.value) == f"{path}: {expected}"


def test_a_table_without_a_schema(tmp_path):
    table = parquet(tmp_path / "t.parquet", {"y": [1, 0], "c": [1, 2]})
    csv = text_file(tmp_path / "t.csv", CSV)
    for path, what in ((table, "this is a Parquet file, not Criteo's text"), (csv, "line 1 has 1 columns")):
        with pytest.raises(UserError) as caught:
            prepare([path], tmp_path / "out")
        assert str(caught.value).startswith(f"{path}: {what}")
        assert str(caught.value).endswith(
            "schema infer FILE --output schema.toml, then prepare with --schema schema.toml"
        )
        assert "repair" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_trailing_bytes_of_a_text_log(tmp_path):
    path = text_file(tmp_path / "d.gz", gzip.compress(b"1\t5\tab\n") + b"more")
    log = TextLog(path, Schema(label="y", numeric=("n",), categorical=("c",)))
    with pytest.raises(UserError, match=f"{OTHERS} .gz data; remove them"):
        list(log.pieces(start=0, line=0, skip_bad=False))


def test_a_csv_without_a_header(tmp_path):
    path = text_file(tmp_path / "t.csv", "1,0.5,a\n0,2,b\n" * 9)
    with pytest.raises(UserError) as caught:
        infer_schema(str(path))
    assert str(caught.value).startswith(
        f"{path}: its first row looks like data ('1', '0.5', 'a'), and a CSV begins with"
    )


def test_lists_of_lists_and_missing_weights(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"y": [1], "b": [[["a"]]], "w": [[1.0]]})
    assert message(path, BAGS) == (
        f"{path}: column 'b': it holds lists of lists; write one flat list of text or integers per row"
    )
    plain = Schema(label="y", numeric=(), categorical=("b",), layout="table")
    assert message(path, plain).endswith("lists of lists; write one flat list of text or integers per row")
    path = parquet(tmp_path / "t.parquet", {"y": [1], "b": [["a"]]})
    assert message(path, BAGS) == (
        f"{path}: no column 'w', the weights of column 'b'; the file has 'y', 'b'; correct the name in the "
        "schema, or add the column"
    )


@pytest.mark.parametrize(("transform", "value"), [("none", 1e39), ("none", -1e300), ("log", 0.5), ("log", 2.0**31)])
def test_a_number_that_its_transform_does_not_take_is_a_bad_row(tmp_path, transform, value):
    columns = {"n": Column(transform=transform)}
    schema = Schema(label="y", numeric=("n",), categorical=("c",), columns=columns, layout="table")
    path = parquet(tmp_path / "t.parquet", {"y": [1, 0, 1], "n": [1.0, value, 3.0], "c": ["a", "b", "c"]})
    assert message(path, schema).startswith(f"{path}: row 2, column 'n': {value} is ")
    assert rows_of(path, schema, skip_bad=True) == [(1, 1.0, "a"), (1, 3.0, "c")]
    data = prepare([path], tmp_path / "out", schema=schema, on_bad_row="skip", split="none", min_count=1)
    assert data.rows("train") == 2
    log1p = Schema(label="y", numeric=("n",), categorical=("c",), layout="table", numeric_transform="log1p")
    assert len(rows_of(path, log1p)) == 3


def test_the_transform_of_the_command_decides(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"y": [1, 0], "n": [1e39, 3.0], "c": ["a", "b"]})
    options = {"schema": SMALL, "on_bad_row": "skip", "split": "none", "min_count": 1}
    assert prepare([path], tmp_path / "out", **options).rows("train") == 1
    assert prepare([path], tmp_path / "logs", numeric_transform="log1p", **options).rows("train") == 2
    [skipped] = json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]
    assert [bad["line"] for bad in skipped["first"]] == [1]


CHILD = """
import sys
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.errors import UserError

schema = Schema(label="y", numeric=("n",), categorical=("c",), layout="table")
try:
    open_tables(sys.argv[1], schema)
except UserError:
    sys.exit(2)
"""


def test_a_csv_error_ends_the_process_with_its_own_code(tmp_path):
    rows = "".join(f"{i % 2},{i},c{i}\n" for i in range(200))
    paths = [
        text_file(tmp_path / "delimiter.csv", "y;n;c\n" + rows.replace(",", ";")),
        text_file(tmp_path / "missing.csv", "y,m,c\n" + rows),
        text_file(tmp_path / "twice.csv", "y,n,n\n" + rows),
    ]
    for _ in range(4):
        children = [subprocess.Popen([sys.executable, "-c", CHILD, path]) for path in paths]
        assert [child.wait(timeout=120) for child in children] == [2, 2, 2]


@pytest.mark.parametrize("address", ["hdfs://host/t.parquet", "ftp://127.0.0.1:1/t.csv", "zip://t.csv::/none.zip"])
def test_an_address_whose_driver_cannot_start(address):
    assert message(address).startswith(f"{address}: {address.partition(':')[0]}:// can't be opened (")


def test_a_prepared_folder_is_opened_by_a_text_too(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"y": [1, 0], "n": [1, 2], "c": ["a", "b"]})
    prepare([path], tmp_path / "out", schema=SMALL, split="none", min_count=1)
    assert PreparedData.open(str(tmp_path / "out")).folder == tmp_path / "out"


def test_a_broken_row_that_is_not_utf_8(tmp_path, capfd):
    path = text_file(tmp_path / "t.csv", b"y,n,c\n1,2,a\n1,2,\xe9,3\n")
    assert message(path) == (
        f"{path}: row 3, the row has 4 cells, the header 3, and its text is not UTF-8; save the file as UTF-8, or "
        "repair or remove the row"
    )
    assert capfd.readouterr().err == ""  # Python reports what a callback raises


def test_a_link_to_itself(tmp_path):
    path = tmp_path / "t.csv"
    path.symlink_to(path)
    with pytest.raises(UserError, match=r"t\.csv: "):
        prepare([path], tmp_path / "out", schema=SMALL)

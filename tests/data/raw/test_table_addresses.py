"""Where tables lie: folders, addresses, and names that are none."""

import gzip
import importlib.util
import io
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from tests.support.data.tables import SMALL, message, parquet, rows_of, small, text_file
from torchrec_deepfm.data.raw.table_source import open_tables


def test_a_folder_in_natural_order(tmp_path):
    folder = tmp_path / "clicks.parquet"
    folder.mkdir()
    for number in (10, 9, 1):
        small(folder / f"part-{number}.parquet", c=[f"{number}", "x"])
    parquet(
        folder / "part-2.parquet",
        {"y": pa.array([], pa.int8()), "n": pa.array([], pa.int8()), "c": pa.array([], "string")},
    )
    for name in ("_SUCCESS", "_temporary", ".part-1.parquet.crc", "schema.toml", "README.md"):
        (folder / name).write_text("")
    sources = open_tables(str(folder), SMALL)
    assert [Path(source.path).name for source in sources] == ["part-1.parquet", "part-9.parquet", "part-10.parquet"]
    assert [row[2] for row in rows_of(folder, SMALL)] == ["1", "x", "9", "x", "10", "x"]


def test_memory_file_system():
    memory = fsspec.filesystem("memory")
    memory.makedirs("/clicks", exist_ok=True)
    try:
        for name, content in {"b.csv": "y,n,c\n1,2,b\n", "a.csv": "c,y,n\nä,0,\n"}.items():
            memory.pipe(f"/clicks/{name}", content.encode())
        memory.pipe("/clicks 2.csv.gz", gzip.compress(b"y,n,c\n1,2,b\n"))
        out = io.BytesIO()
        parquet(out, {"y": [1], "n": [1], "c": ["x"]})
        memory.pipe("/one.parquet", out.getvalue())
        assert rows_of("memory://clicks", SMALL) == [(0, None, "ä"), (1, 2.0, "b")]
        assert [source.path for source in open_tables("memory://clicks/", SMALL)] == [
            "memory://clicks/a.csv",
            "memory://clicks/b.csv",
        ]
        assert rows_of("memory://clicks 2.csv.gz", SMALL) == [(1, 2.0, "b")]
        [source] = open_tables("memory://one.parquet", SMALL)
        assert source.bytes == len(out.getvalue())
        assert [piece.frame.rows() for piece in source.pieces()] == [[(1, 1.0, "x")]]
        memory.pipe("/one.parquet", out.getvalue()[:-9])
        assert message("memory://one.parquet").startswith("memory://one.parquet: the file can't be read as Parquet (")
        assert message("memory://none.csv") == "memory://none.csv: nothing exists at this address; check it"
    finally:
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="needs an environment without s3fs")
def test_a_missing_driver_is_named():
    assert message("s3://bucket/t.parquet") == (
        "s3://bucket/t.parquet: s3:// needs the package s3fs, which is not installed; run: pip install s3fs"
    )


def test_an_unknown_protocol():
    assert message("nonsense://a.csv") == (
        "nonsense://a.csv: Protocol not known: nonsense; give a local path or an address that fsspec knows, such as s3://"
    )


KINDS = (
    "a Parquet file (.parquet), a CSV with a header (.csv, .tsv, also .gz or .zst), ORC (.orc), Arrow (.arrow, "
    ".feather) or JSON lines (.jsonl)"
)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], f"no data in this folder; give {KINDS}, or a folder of such files"),
        (["a.csv", "b.pq"], "the folder mixes Parquet and CSV files; name the files, or use two folders"),
        (["a.csv", "b.csv.bz2"], f"'b.csv.bz2' is not {KINDS}; move it, or name the files one by one"),
        (["a.orc", "d/b.jsonl"], "the folder mixes ORC and JSON lines files; name the files, or use two folders"),
        (["day=1/a.csv", "b.csv"], "only some files lie in a folder day=...; name the folders of one kind"),
        (["_delta_log/0.json", "a.parquet"], ("a Delta table, whose folder also holds rows that were deleted; write it "
                                              "as plain Parquet first")),
        (["_temporary/0.parquet", "a.parquet"], ("Spark has not finished writing this folder (_temporary is there, "
                                                 "_SUCCESS is not); let the job end, or run it again")),
    ],
)  # fmt: skip
def test_folders_that_are_not_a_table(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert message(tmp_path) == f"{tmp_path}: {expected}"


def test_no_such_file(tmp_path):
    path = tmp_path / "t.parquet"
    assert message(path) == f"{path}: no such file or folder; check the path"
    path = text_file(tmp_path / "t.data", "y,n,c\n")
    assert message(path) == (f"{path}: the name has no known ending; give {KINDS}, or a folder of such files")

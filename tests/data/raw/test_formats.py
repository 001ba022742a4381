"""Every format, folder and frame gives the rows that Parquet gives; polars and pyarrow write the files."""

import gzip
import random
from pathlib import Path

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

from tests.support.data.tables import SMALL, message, rows_of
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.raw import table_source
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, Schema, read_schema
from torchrec_deepfm.errors import UserError

SCHEMA = Schema(
    label="y",
    numeric=("price",),
    categorical=("user", "city", "tags"),
    columns={"tags": Column(list=True)},
    layout="table",
)


def table(rows: int = 300) -> pa.Table:
    draw = random.Random(2)
    return pa.table(
        {
            "y": [draw.randrange(2) for _ in range(rows)],
            "price": [None if draw.random() < 0.2 else draw.random() for _ in range(rows)],
            "user": [draw.randrange(-5, 99) for _ in range(rows)],
            "city": [draw.choice(["Łódź", "Rome", "", None]) for _ in range(rows)],
            "tags": [[draw.choice("abß") for _ in range(draw.randrange(3))] for _ in range(rows)],
            "unused": [draw.random() for _ in range(rows)],
        }
    )


def json_lines(rows: pa.Table) -> bytes:
    return pl.DataFrame(rows).write_ndjson().encode()


WRITERS = {
    "t.orc": lambda rows, path: pa.orc.write_table(rows, path, stripe_size=4096),
    "t.arrow": lambda rows, path: pl.DataFrame(rows).write_ipc(path),
    "t.feather": lambda rows, path: pa.feather.write_feather(rows, path, chunksize=70),
    "t.ipc": lambda rows, path: pa.feather.write_feather(rows, path, compression="zstd", chunksize=110),
    "t.jsonl": lambda rows, path: path.write_bytes(json_lines(rows)),
    "t.ndjson.gz": lambda rows, path: path.write_bytes(gzip.compress(json_lines(rows))),
    "t.jsonl.zst": lambda rows, path: path.write_bytes(pa.compress(json_lines(rows), "zstd", asbytes=True)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(tmp_path, name, monkeypatch):
    monkeypatch.setattr(table_source, "BATCH_ROWS", 32)
    rows = table()
    pq.write_table(rows, tmp_path / "t.parquet")
    WRITERS[name](rows, tmp_path / name)
    [wanted] = open_tables(str(tmp_path / "t.parquet"), SCHEMA, piece_rows=64)
    [source] = open_tables(str(tmp_path / name), SCHEMA, piece_rows=64)
    pieces, expected = list(source.pieces()), list(wanted.pieces())
    assert [piece.frame.rows() for piece in pieces] == [piece.frame.rows() for piece in expected]
    for at, piece in enumerate(pieces):  # resumed after any piece
        rest = [other.frame.rows() for other in source.pieces(start=piece.end)]
        assert rest == [other.frame.rows() for other in expected[at + 1 :]]


def test_damaged_files_in_one_line(tmp_path):
    for name in ("t.orc", "t.feather", "t.jsonl"):
        WRITERS[name](table(), tmp_path / name)
        path = tmp_path / f"cut {name}"
        path.write_bytes((tmp_path / name).read_bytes()[:-9])
        assert "; download or write the file again" in message(path, SCHEMA), name
    (tmp_path / "t.feather").rename(tmp_path / "a.orc")
    text = "a.orc: this is an Arrow (Feather) file, but its name does not end in .arrow; rename it"
    assert message(tmp_path / "a.orc", SCHEMA).endswith(text)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_folders_of_partitions(tmp_path, ending):
    """What Spark leaves: nested folders whose names are columns, _SUCCESS, checksums, a missing value."""
    frames = {("2024-01-01", "7"): 3, ("2024-01-01", "10"): 4, ("2024-01-02", "__HIVE_DEFAULT_PARTITION__"): 5}
    for (day, shop), n in frames.items():
        folder = tmp_path / f"day={day}" / f"shop={shop}"
        folder.mkdir(parents=True)
        frame = pl.DataFrame({"y": [0, 1], "n": [float(n), n + 0.5], "c": ["a", "b"]})
        path = folder / f"part-0.{ending}"
        {"parquet": frame.write_parquet, "csv": frame.write_csv, "jsonl": frame.write_ndjson}[ending](path)
        (folder / f".part-0.{ending}.crc").write_text("")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / f"x.{ending}").write_text("")
    types = {"shop": Column(type="integer")}
    schema = Schema(label="y", numeric=("n",), categorical=("c", "day", "shop"), columns=types, layout="table")
    wanted = {
        (y, n + y / 2, c, day, int(shop) if shop.isdecimal() else None)
        for (day, shop), n in frames.items()
        for y, c in ((0, "a"), (1, "b"))
    }
    assert set(rows_of(tmp_path, schema)) == wanted


def test_patterns(tmp_path):
    for name in ("part-10", "part-2", "other"):
        pl.DataFrame({"y": [1], "n": [1], "c": [name]}).write_csv(tmp_path / f"{name}.csv")
    assert [row[2] for row in rows_of(tmp_path / "part-*.csv", SMALL)] == ["part-2", "part-10"]
    assert message(tmp_path / "none-*.csv") == f"{tmp_path / 'none-*.csv'}: nothing matches this pattern; check it"
    (tmp_path / "a[1].csv").write_text("y,n,c\n0,1,odd\n")
    assert rows_of(tmp_path / "a[1].csv", SMALL) == [(0, 1.0, "odd")]
    memory = fsspec.filesystem("memory")
    try:
        for name in ("day=1/b", "day=2/a"):
            memory.pipe(f"/nested/{name}.csv", f"y,n,c\n1,2,{name[-1]}\n".encode())
        schema = Schema(label="y", numeric=("day",), categorical=("c",), layout="table")
        assert rows_of("memory://nested", schema) == [(1, 1.0, "b"), (1, 2.0, "a")]
        assert rows_of("memory://nested/*/a.csv", SMALL) == [(1, 2.0, "a")]
    finally:
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]


def test_a_csv_without_names(tmp_path):
    (tmp_path / "t.csv").write_text("1,2.5,a\n0,,b\n0,1\n1,7,c\n")
    (tmp_path / "schema.toml").write_text(
        'label = "y"\nnumeric = ["n"]\ncategorical = ["c"]\nheader = ["y", "n", "c"]\n'
    )
    schema = read_schema(tmp_path / "schema.toml")
    assert rows_of(tmp_path / "t.csv", schema, skip_bad=True) == [(1, 2.5, "a"), (0, None, "b"), (1, 7.0, "c")]
    assert "row 3, the row has 2 cells, the header 3" in message(tmp_path / "t.csv", schema)
    assert Schema.from_json(schema.to_json()) == schema
    for header, fault in (('"y"', "'y' is not a list of column names"), ('["y", "y"]', "header: names a column twice")):
        text = f'label = "y"\nnumeric = []\ncategorical = ["c"]\nheader = {header}\n'
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(UserError, match=fault):
            read_schema(tmp_path / "bad.toml")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_rows_in_memory_become_the_folder_of_their_file(tmp_path):
    rows, test = table(), table(40)
    pq.write_table(rows, tmp_path / "t.parquet")
    pq.write_table(test, tmp_path / "v.parquet")
    options = {"schema": SCHEMA, "min_count": 1}
    files = prepare([tmp_path / "t.parquet"], tmp_path / "files", test=[tmp_path / "v.parquet"], **options)
    wanted = content(files.folder)
    frames = {
        "arrow": (rows, test),
        "polars": (pl.DataFrame(rows), pl.LazyFrame(test)),
        "dicts": (rows.to_pylist(), test.to_pylist()),
    }
    for name, (train, held_out) in frames.items():
        data = prepare(train, tmp_path / name, test=held_out, **options)
        assert content(data.folder) == wanted, name
        assert data.made["sources"]["train"][0]["name"] == "train rows"
    again = prepare(rows, tmp_path / "arrow", test=test, **options)  # finished already
    assert again.made == prepare(rows, tmp_path / "arrow", test=test, **options).made
    with pytest.raises(UserError, match=r"it was made from other content of train rows"):
        prepare(rows.slice(1), tmp_path / "arrow", test=test, **options)
    with pytest.raises(UserError, match=r"^train rows: column 'city' is absent; the rows have y, price"):
        prepare(rows.drop(["city"]), tmp_path / "no", **options)
    with pytest.raises(UserError, match=r"^rows in memory need a schema of named columns"):
        prepare(rows, tmp_path / "no")


def test_pandas_and_hugging_face(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = table()
    wanted = content(prepare(rows, tmp_path / "arrow", schema=SCHEMA, min_count=1).folder)
    frame = rows.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert content(prepare(frame, tmp_path / "pandas", schema=SCHEMA, min_count=1).folder) == wanted
    data = datasets.Dataset(rows.take(list(range(299, -1, -1)))).select(range(299, -1, -1))
    assert content(prepare(data, tmp_path / "datasets", schema=SCHEMA, min_count=1).folder) == wanted

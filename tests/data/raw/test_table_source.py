"""Tables of a user's own, against the plain Python values that were written into them."""

import csv
import decimal
import gzip
import importlib.util
import io
import itertools
import math
import pickle
import random
import struct
from pathlib import Path

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.data_tables import BAGS, SMALL, message, parquet, rows_of, small, text_file
from torchrec_deepfm.data.raw import table_files
from torchrec_deepfm.data.raw import table_source as table_module
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, Schema

MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def maybe(values):
    return st.none() | values


def between(low, high):
    return st.integers(low, high)


def decimals(digits, places):
    bound = 10**digits - 1
    return between(-bound, bound).map(lambda n: decimal.Decimal(f"{n}e-{places}"))


FLOATS = st.floats(allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)


def number(value):
    """What a number of any type becomes."""
    return None if value is None or math.isnan(value) else float(value)


def same(value):
    return value


# Arrow type -> values, and what each becomes.
LABELS = [
    (pa.bool_(), st.booleans(), int),
    (pa.int8(), between(0, 1), int),
    (pa.uint64(), between(0, 1), int),
    (pa.float32(), st.sampled_from([0.0, 1.0, -0.0]), int),
    (pa.decimal128(5, 2), st.sampled_from([decimal.Decimal(0), decimal.Decimal(1)]), int),
    (pa.dictionary(pa.int8(), pa.int64()), between(0, 1), int),
]
NUMBERS = [
    (pa.bool_(), maybe(st.booleans()), number),
    (pa.int64(), maybe(between(-(2**63), 2**63 - 1)), number),
    (pa.uint64(), maybe(between(0, 2**64 - 1)), number),
    (pa.float32(), maybe(st.floats(width=32, allow_infinity=False)), number),
    (pa.float64(), maybe(FLOATS), number),
    (pa.float16(), maybe(st.floats(width=16, allow_infinity=False)), number),
    (pa.decimal128(12, 3), maybe(decimals(12, 3)), number),
    (pa.decimal128(30, 0), maybe(decimals(30, 0)), number),
    (pa.null(), st.none(), number),
]
SCALARS = {
    "integer": [
        (pa.bool_(), maybe(st.booleans()), lambda value: None if value is None else int(value)),
        (pa.int8(), maybe(between(-128, 127)), same),
        (pa.uint32(), maybe(between(0, 2**32 - 1)), same),
        (pa.int64(), maybe(between(-(2**63), 2**63 - 1)), same),
        (pa.uint64(), maybe(between(0, 2**63 - 1)), same),
        (pa.decimal128(25, 0), maybe(decimals(18, 0)), lambda value: None if value is None else int(value)),
        (pa.dictionary(pa.int8(), pa.int32()), maybe(between(0, 9)), same),
    ],
    "string": [
        (pa.string(), maybe(TEXTS), same),
        (pa.large_string(), maybe(TEXTS), same),
        (pa.binary(), maybe(TEXTS.map(str.encode)), lambda value: None if value is None else value.decode()),
        (pa.dictionary(pa.int32(), pa.string()), maybe(TEXTS), same),
    ],
}


@st.composite
def tables(draw):
    """(Arrow table, schema, the rows that its pieces must hold)."""
    rows = draw(between(1, 12))

    def column(values):
        return draw(st.lists(values, min_size=rows, max_size=rows))

    arrow, expected, options = {}, {}, {}

    def add(name, key, choice):
        kind, values, becomes = choice
        cells = column(values)
        arrow[name] = pa.array(cells, kind)
        expected[key] = [becomes(value) for value in cells]

    add("the label/é", "label", draw(st.sampled_from(LABELS)))
    numeric = [f"n {j}" for j in range(draw(between(0, 2)))]
    for j, name in enumerate(numeric):
        add(name, f"n{j}", draw(st.sampled_from(NUMBERS)))
    categorical = [f"c.{j}" for j in range(draw(between(1, 4)))]
    for j, name in enumerate(categorical):
        kind, values, becomes = draw(st.sampled_from(SCALARS["integer"] + SCALARS["string"]))
        if not draw(st.booleans()):
            add(name, f"c{j}", (kind, values, becomes))
            continue
        size = draw(st.sampled_from([None, 2]))
        lists = column(maybe(st.lists(values, min_size=size or 0, max_size=size or 4)))
        arrow[name] = pa.array(lists, pa.list_(kind, size or -1))
        expected[f"c{j}"] = [None if bag is None else [becomes(v) for v in bag if v is not None] for bag in lists]
        weights = draw(st.booleans())
        options[name] = Column(list=True, weights=f"w/{j}" if weights else None)
        if weights:
            weigh = st.floats(-1e30, 1e30)
            loads = [[draw(weigh) for _ in bag or ()] for bag in lists]
            arrow[f"w/{j}"] = pa.array(
                loads, draw(st.sampled_from([pa.list_(pa.float64()), pa.large_list(pa.float32())]))
            )
            expected[f"w{j}"] = [
                None if bag is None else [float32(w) for v, w in zip(bag, load, strict=True) if v is not None]
                for bag, load in zip(lists, loads, strict=True)
            ]
    schema = Schema(
        label="the label/é",
        numeric=tuple(numeric),
        categorical=tuple(categorical),
        columns=options,
        layout="table",
    )
    return pa.table(arrow), schema, list(zip(*expected.values(), strict=True))


@MANY
@given(tables(), st.data())
def test_parquet_holds_what_was_written(tmp_path, made, data):
    table, schema, expected = made
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=data.draw(between(1, 13)), use_dictionary=data.draw(st.booleans()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "BATCH_ROWS", data.draw(between(1, 9)))
        check_pieces(path, schema, expected, data)


def check_pieces(path, schema, expected, data):
    [source] = open_tables(str(path), schema, piece_rows=data.draw(between(1, 13)))
    pieces = list(source.pieces(start=0, line=0, skip_bad=data.draw(st.booleans())))
    assert [row for piece in pieces for row in piece.frame.rows()] == expected
    assert pieces[-1].end == pieces[-1].line == len(expected)
    assert pieces[-1].done == 1.0
    assert all(piece.skipped == () for piece in pieces)
    # From any piece's end on: the same pieces.
    at = data.draw(between(0, len(pieces) - 1))
    again = list(source.pieces(start=pieces[at].end, line=pieces[at].line, skip_bad=False))
    assert [(p.end, p.line) for p in again] == [(p.end, p.line) for p in pieces[at + 1 :]]
    for one, other in zip(again, pieces[at + 1 :], strict=True):
        assert one.frame.equals(other.frame)
        assert one.frame.schema == other.frame.schema


def test_numbers_that_are_none_are_missing(tmp_path):
    columns = {"y": [1, 0], "n": [math.nan, None], "c": ["", None]}
    assert rows_of(parquet(tmp_path / "t.parquet", columns), SMALL) == [(1, None, ""), (0, None, None)]
    path = text_file(tmp_path / "t.csv", "y,n,c\n1,NaN,\n0,,x\n1,  ,x\n0, 7 , x\n")
    assert rows_of(path, SMALL) == [(1, None, None), (0, None, "x"), (1, None, "x"), (0, 7.0, " x")]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(pa.int8(), pl.Int64), (pa.uint64(), pl.Int64), (pa.string(), pl.String), (pa.bool_(), pl.Int64)],
)
def test_types_of_a_frame(tmp_path, kind, dtype):
    schema = Schema(
        label="y", numeric=("n",), categorical=("c", "b"), columns={"b": Column(list=True, weights="w")}, layout="table"
    )
    columns = {
        "y": pa.array([True]),
        "n": pa.array([None], pa.int8()),
        "c": pa.array([None], kind),
        "b": pa.array([[]], pa.list_(kind)),
        "w": pa.array([[]], pa.list_(pa.float64())),
    }
    [source] = open_tables(str(parquet(tmp_path / "t.parquet", columns)), schema)
    [piece] = source.pieces()
    lists = {"b": pl.List(dtype), "w": pl.List(pl.Float32)}
    assert dict(piece.frame.schema) == {
        "label": pl.UInt8,
        "n0": pl.Float64,
        "c0": dtype,
        "c1": lists["b"],
        "w1": lists["w"],
    }
    assert piece.frame.rows() == [(1, None, None, [], [])]
    assert (source.path, source.bytes) == (str(tmp_path / "t.parquet"), (tmp_path / "t.parquet").stat().st_size)


# CSV ------------------------------------------------------------------------------------------------------------------

CSV = Schema(
    label="y",
    numeric=("n 1",),
    categorical=("tëxt", "number", "bag"),
    columns={
        "number": Column(type="integer"),
        "bag": Column(list=True, separator="|", type="integer", weights="loads"),
    },
    layout="table",
)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
CSV_ROWS = st.tuples(
    st.sampled_from(["0", "1", "true", "FALSE", "1.0", " 0"]),
    maybe(FLOATS | between(-(10**25), 10**25)),
    maybe(CELLS),
    maybe(between(-(2**63), 2**63 - 1)),
    maybe(st.lists(maybe(between(-9, 10**12)), min_size=1, max_size=3)),
)


def csv_expected(row):
    label, value, text, whole, bag = row
    bag = None if bag is None or bag == [None] else bag  # an empty cell is a missing list
    kept = None if bag is None else [v for v in bag if v is not None]
    weights = None if bag is None else [j + 0.5 for j, v in enumerate(bag) if v is not None]
    return (1 if label.strip().lower() in ("1", "true", "1.0") else 0, number(value), text, whole, kept, weights)


def cell(value):
    return "" if value is None else str(value)


def csv_text(rows, *, delimiter=",", ending="\r\n"):
    out = io.StringIO(newline="")
    # Python 3.11 quotes a lone CR only where CR is among the line's end.
    quoting = csv.QUOTE_MINIMAL if ending == "\r\n" else csv.QUOTE_ALL
    writer = csv.writer(out, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerow(["unread", "bag", "y", "n 1", "tëxt", "number", "loads"])
    for label, value, text, whole, bag in rows:
        cells = "|".join(map(cell, bag or ()))
        loads = "|".join(f"{j + 0.5}" for j, _ in enumerate(bag or ())) if cells else ""
        writer.writerow(["x", cells, label, cell(value), cell(text), cell(whole), loads])
    return out.getvalue()


@MANY
@given(st.lists(CSV_ROWS, min_size=1, max_size=12), st.data())
@example([("1", 1e400, 'é,\n"', 3, [None, 4])], None)
def test_csv_holds_what_was_written(tmp_path, rows, data):
    def draw(values, otherwise):
        return otherwise if data is None else data.draw(values)

    rows = [(label, None if value == math.inf else value, *rest) for label, value, *rest in rows]
    suffix = draw(st.sampled_from([".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst"]), ".csv")
    text = csv_text(
        rows, delimiter="\t" if ".tsv" in suffix else ",", ending=draw(st.sampled_from(["\n", "\r\n"]), "\n")
    )
    content = text.encode("utf-8-sig" if draw(st.booleans(), False) else "utf-8")
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    if suffix.endswith(".zst"):
        content = bytes(pa.Codec("zstd").compress(content, asbytes=True))
    path = text_file(tmp_path / f"t{suffix}", content)
    [source] = open_tables(str(path), CSV, piece_rows=draw(between(1, 13), 1))
    pieces = list(source.pieces())
    assert [row for piece in pieces for row in piece.frame.rows()] == [csv_expected(row) for row in rows]
    at = draw(between(0, len(pieces) - 1), 0)
    again = list(source.pieces(start=pieces[at].end))
    assert [p.frame.rows() for p in again] == [p.frame.rows() for p in pieces[at + 1 :]]


def test_broken_and_bad_rows_are_left_out_and_listed_wherever_reading_begins(tmp_path, monkeypatch):
    """Against a plain count of the rows, over many blocks, with blank lines, and newlines in cells."""
    monkeypatch.setattr(table_files, "_BLOCK_BYTES", 300)
    draw = random.Random(5)
    lines, good, bad = [], [], []
    for number in range(2, 900):
        kind = draw.choices(["good", "many", "few", "label", "number"], [20, 1, 1, 1, 1])[0]
        value = f"v{number}\n" if draw.random() < 0.1 else f"v{number}"
        lines.append(
            {
                "good": f'1,{number},"{value}"',
                "many": f"1,{number},x,y,z",
                "few": "1",
                "label": f"{number},2,x",
                "number": f"0,two,{number}",
            }[kind]
            + ("\n\n" if draw.random() < 0.1 else "\n")
        )
        if kind == "good":
            good.append((1, float(number), value))
        else:
            bad.append(
                (
                    number,
                    {
                        "many": "the row has 5 cells, the header 3",
                        "few": "the row has 1 cells, the header 3",
                        "label": f"column 'y': '{number}' is not a valid label (expected 0 or 1)",
                        "number": "column 'n': 'two' is not a number",
                    }[kind],
                )
            )
    path = text_file(tmp_path / "t.csv", "y,n,c\n" + "".join(lines))
    for piece_rows in (7, 64, 1000):
        [source] = open_tables(str(path), SMALL, piece_rows=piece_rows)
        pieces = list(source.pieces(skip_bad=True))
        assert [row for piece in pieces for row in piece.frame.rows()] == good
        assert [(one.line, one.reason) for piece in pieces for one in piece.skipped] == bad
        assert [piece.end for piece in pieces] == [*range(piece_rows, 898, piece_rows), 898]
        for before, piece in itertools.pairwise(pieces):
            again = next(iter(source.pieces(start=before.end, skip_bad=True)))
            assert (again.frame.rows(), again.skipped, again.end) == (piece.frame.rows(), piece.skipped, piece.end)
    number, reason = bad[0]
    assert message(path) == f"{path}: row {number}, {reason}; repair or remove the row"


def test_a_csv_that_ends_in_broken_rows(tmp_path):
    path = text_file(tmp_path / "t.csv", "y,n,c\n1,2,a\n1,2\n1\n")
    [source] = open_tables(str(path), SMALL)
    [piece] = source.pieces(skip_bad=True)
    assert piece.frame.rows() == [(1, 2.0, "a")]
    assert [one.line for one in piece.skipped] == [3, 4]
    assert (piece.end, piece.line) == (3, 4)
    assert list(source.pieces(start=3, skip_bad=True)) == []


def test_delimiter_of_the_schema(tmp_path):
    schema = Schema(label="y", numeric=("n",), categorical=("c",), layout="table", delimiter=";")
    assert rows_of(text_file(tmp_path / "t.csv", "y;n;c\n1;1.5;a,b\n"), schema) == [(1, 1.5, "a,b")]


def test_options_that_change_a_type(tmp_path):
    schema = Schema(
        label="y",
        numeric=(),
        categorical=("a", "b", "c"),
        columns={"a": Column(type="integer"), "b": Column(type="string"), "c": Column(type="integer")},
        layout="table",
    )
    columns = {
        "y": [0, 1, 1],
        "a": [1.0, math.nan, None],
        "b": pa.array([2**64 - 1, 7, None], pa.uint64()),
        "c": ["007", "+1", " "],
    }
    assert rows_of(parquet(tmp_path / "t.parquet", columns), schema) == [
        (0, 1, "18446744073709551615", 7),
        (1, None, "7", 1),
        (1, None, None, None),
    ]


def test_lists_of_dictionary_values_over_row_groups(tmp_path):
    """Arrow refuses to join them."""
    kind = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    bags = [[f"v{number}", "é"] for number in range(40)]
    table = pa.table({"y": [1] * 40, "b": pa.array(bags, kind)})
    path = parquet(tmp_path / "t.parquet", table, row_group_size=7)
    schema = Schema(label="y", numeric=(), categorical=("b",), columns={"b": Column(list=True)}, layout="table")
    assert [row[1] for row in rows_of(path, schema)] == bags


def test_text_lists_in_parquet_are_cut(tmp_path):
    columns = {"y": [0, 1, 0, 1], "b": ["é|b", "", None, "x||y"], "w": ["1|2", "", None, "1|2|4"]}
    assert rows_of(parquet(tmp_path / "t.parquet", columns), BAGS) == [
        (0, ["é", "b"], [1.0, 2.0]),
        (1, [], []),
        (0, None, None),
        (1, ["x", "y"], [1.0, 4.0]),
    ]


# Where tables lie -----------------------------------------------------------------------------------------------------


def test_a_folder_in_natural_order(tmp_path):
    folder = tmp_path / "clicks.parquet"
    folder.mkdir()
    for number in (10, 9, 1):
        small(folder / f"part-{number}.parquet", c=[f"{number}", "x"])
    parquet(
        folder / "part-2.parquet",
        {"y": pa.array([], pa.int8()), "n": pa.array([], pa.int8()), "c": pa.array([], "string")},
    )
    for name in ("_SUCCESS", ".part-1.parquet.crc", "schema.toml", "README.md"):
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
    ],
)  # fmt: skip
def test_folders_that_are_no_table(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert message(tmp_path) == f"{tmp_path}: {expected}"


def test_no_such_file(tmp_path):
    path = tmp_path / "t.parquet"
    assert message(path) == f"{path}: no such file or folder; check the path"
    path = text_file(tmp_path / "t.data", "y,n,c\n")
    assert message(path) == (f"{path}: the name has no known ending; give {KINDS}, or a folder of such files")


def test_long_values_end_a_piece_early_and_always_at_the_same_row(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 8)
    monkeypatch.setattr(table_module, "BATCH_ROWS", 8)
    monkeypatch.setattr(table_module, "_PIECE_BYTES", 4000)
    draw = random.Random(3)
    values = [["é" * draw.randrange(60)] * draw.randrange(5) for _ in range(200)]
    path = parquet(tmp_path / "t.parquet", {"y": [1] * 200, "b": values}, row_group_size=7)
    schema = Schema(label="y", numeric=(), categorical=("b",), columns={"b": Column(list=True)}, layout="table")
    [source] = open_tables(str(path), schema, piece_rows=60)
    pieces = list(source.pieces())
    assert [row[1] for piece in pieces for row in piece.frame.rows()] == values
    ends = [piece.end for piece in pieces]
    assert min(b - a for a, b in itertools.pairwise(ends[:-1])) < 56  # as many rows would fit into a piece
    for at, end in enumerate(ends):
        assert [piece.end for piece in source.pieces(start=end)] == ends[at + 1 :]


def test_frappe(shared_data):
    path = shared_data / "frappe" / "validation.parquet"
    names = pq.read_schema(path).names
    schema = Schema(label="label", numeric=(), categorical=tuple(names[1:]), layout="table")
    [source] = open_tables(str(path), schema, piece_rows=10_000)
    pieces = list(source.pieces())
    assert [piece.end for piece in pieces] == [*range(10_000, 57_722, 10_000), 57_722]
    assert [row for piece in pieces for row in piece.frame.rows()] == [
        tuple(row.values()) for row in pq.read_table(path).to_pylist()
    ]


def test_a_source_can_go_to_another_process(tmp_path):
    [source] = open_tables(str(small(tmp_path / "t.parquet")), SMALL)
    copied = pickle.loads(pickle.dumps(source))
    assert [piece.frame.rows() for piece in copied.pieces()] == [[(0, 1.0, "a"), (1, 2.0, "b")]]

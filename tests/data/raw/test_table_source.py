"""Parquet tables of a user's own, against the plain Python values that were written into them."""

import decimal
import itertools
import math
import pickle
import random
import struct

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.data.tables import BAGS, SMALL, parquet, rows_of, small, text_file
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


def to_number(value):
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
    (pa.bool_(), maybe(st.booleans()), to_number),
    (pa.int64(), maybe(between(-(2**63), 2**63 - 1)), to_number),
    (pa.uint64(), maybe(between(0, 2**64 - 1)), to_number),
    (pa.float32(), maybe(st.floats(width=32, allow_infinity=False)), to_number),
    (pa.float64(), maybe(FLOATS), to_number),
    (pa.float16(), maybe(st.floats(width=16, allow_infinity=False)), to_number),
    (pa.decimal128(12, 3), maybe(decimals(12, 3)), to_number),
    (pa.decimal128(30, 0), maybe(decimals(30, 0)), to_number),
    (pa.null(), st.none(), to_number),
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

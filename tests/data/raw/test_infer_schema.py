"""`schema infer`: the guess is read back by the reader of schemas, and says why each column stands where it does."""

import random
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data.messy_tables import avazu_like, movielens_like
from tests.support.data.tables import parquet, text_file
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.raw.infer_schema import infer_schema, write_inferred
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, read_schema
from torchrec_deepfm.errors import UserError

ROWS = 400
NO_LABEL = (
    "no column named label, click, clicked, is_click, is_clicked, target, y holds values 0 and 1; pass label= or "
    "--label NAME"
)


def columns():
    draw = random.Random(1)
    bags = [[f"t{draw.randrange(9)}" for _ in range(draw.randrange(4))] for _ in range(ROWS)]
    return {
        "click": [draw.randrange(2) for _ in range(ROWS)],
        "userId": [draw.randrange(10**9) for _ in range(ROWS)],
        "hour": [draw.randrange(24) for _ in range(ROWS)],
        "shop": [draw.randrange(300) for _ in range(ROWS)],
        "views": [draw.randrange(51) * 1000 + draw.randrange(9) for _ in range(ROWS)],
        "hash": [draw.randrange(-(2**62), 2**62) for _ in range(ROWS)],
        "event_time": [1_700_000_000_000 + draw.randrange(10**9) for _ in range(ROWS)],
        "price": [draw.random() for _ in range(ROWS)],
        'a "quoted"\nné/w': ["x\ty" if draw.random() < 0.5 else "z" for _ in range(ROWS)],
        "constant": ["same"] * ROWS,
        "key": [f"k{j}" for j in range(ROWS)],
        "is new": [draw.random() < 0.5 for _ in range(ROWS)],
        "tags": bags,
        "tag loads": [[draw.random() for _ in bag] for bag in bags],
        "embedding": [[1.0, 2.0]] * ROWS,
        "day": pa.array([1] * ROWS, pa.date32()),
        "nothing": pa.array([None] * ROWS, pa.string()),
        "big": pa.array([2**64 - 1 - draw.randrange(5) for _ in range(ROWS)], pa.uint64()),
        "old_id": [None if draw.random() < 0.5 else float(draw.randrange(99)) for _ in range(ROWS)],
    }


def read_back(tmp_path, text):
    path = tmp_path / "inferred.toml"
    path.write_text(text, encoding="utf-8")
    return read_schema(path)


def reason(text, name):
    [line] = [
        line
        for line in text.splitlines()
        if line.strip().startswith(("#   " + name, name)) and not line.startswith(f"{name} = ")
    ]
    return line.partition(",  # ")[2] or line.partition(": ")[2]


def test_kinds_of_columns(tmp_path):
    path = parquet(tmp_path / "clicks.parquet", columns())
    text = infer_schema(str(path))
    schema = read_back(tmp_path, text)
    assert schema.label == "click"
    assert schema.numeric == ("views", "price")
    assert schema.categorical == (
        "hour",
        "shop",
        "event_time_hour",
        "event_time_weekday",
        'a "quoted"\nné/w',
        "is new",
        "tags",
        "day_weekday",
        "big",
        "old_id",
    )
    time = partial(Column, of="event_time", format="ms", timezone="UTC")
    assert dict(schema.columns) == {
        "tags": Column(list=True, weights="tag loads"),
        "big": Column(type="string"),
        **{f"event_time_{part}": time(part=part) for part in ("hour", "weekday")},
        "day_weekday": Column(of="day", part="weekday"),
        "old_id": Column(type="integer"),
        "views": Column(transform="standard"),
        "price": Column(transform="standard"),
    }
    different = len(set(columns()["shop"]))
    low, high = min(columns()["shop"]), max(columns()["shop"])
    seen = f"integers, {different} distinct, {low} to {high}"
    assert reason(text, '"shop"') == f"{seen}: they fill their range, as numbered ids do"
    assert reason(text, '"hour"') == "integers, 24 distinct, 0 to 23: few values"
    for key in ("userId", "hash", "key"):
        assert reason(text, f'"{key}"').endswith(": another value in each row, as a row's key has")
    assert reason(text, '"views"').endswith(": a range with gaps, as counts have; numbers")
    assert reason(text, '"constant"') == 'text, 1 distinct, such as "same": the same value in every row'
    missing = columns()["old_id"].count(None) / ROWS
    assert f"{missing:.1%} missing" in reason(text, '"old_id"')
    assert reason(text, '"event_time_hour"').endswith(": hour of times as ms")
    assert reason(text, '"embedding"').endswith("the same list in every row")
    assert reason(text, '"nothing"') == "no value in these rows"
    # The table can be read with it as it stands.
    [source] = open_tables(str(path), schema)
    assert sum(piece.frame.height for piece in source.pieces()) == ROWS


def test_csv(tmp_path):
    draw = random.Random(2)
    lines = [
        f"{draw.choice(['true', 'false'])},{draw.randrange(10**6)},00{draw.randrange(9)},{draw.random()},"
        f"{draw.choice(['a|b', 'c|a|d'])},{draw.choice(['', ' 7', '8.0'])},{draw.choice(['0.5|1', '|2'])}"
        for _ in range(99)
    ]
    path = text_file(tmp_path / "t.csv", "\n".join(["Target,user id,zip,price,tags,part_id,loads", *lines]))
    text = infer_schema(str(path))
    schema = read_back(tmp_path, text)
    assert (schema.label, schema.numeric) == ("Target", ("price",))
    assert schema.categorical == ("user id", "zip", "tags", "part_id", "loads")
    assert schema.options("user id") == Column(type="integer")
    assert schema.options("zip") == Column()
    assert reason(text, '"loads"').endswith("the weights of a list? Then name it there as weights, and not here")
    assert reason(text, '"tags"').endswith('Then write below [columns]: "tags" = { list = true, separator = "|" }')


def test_an_advertising_log(tmp_path):
    """Ids with gaps are categories, counts are not; a key, a constant and a leak of the label are out."""
    text = infer_schema(str(avazu_like(tmp_path / "clicks.csv", 5000)))
    schema = read_back(tmp_path, text)
    assert (schema.label, schema.numeric) == ("click", ("visits",))
    assert schema.categorical == (*("hour_hour", "hour_weekday", "banner_pos", "device_ip", "C14", "C17", "C20"),)
    assert schema.options("hour_weekday") == Column(of="hour", part="weekday", format="%y%m%d%H")
    assert schema.options("C20") == Column(type="integer")
    assert schema.options("visits") == Column(transform="log1p")
    assert reason(text, '"id"').endswith(": another value in each row, as a row's key has")
    assert reason(text, '"constant"').endswith(": the same value in every row")
    assert "it alone gives the label away (AUC 1.000)" in reason(text, '"paid"')


def test_ratings(tmp_path):
    text = infer_schema(str(movielens_like(tmp_path / "ratings.parquet", 5000)))
    schema = read_back(tmp_path, text)
    assert (schema.label, schema.numeric) == ("label", ("price",))
    assert schema.categorical == ("user_id", "item.id", "timestamp_hour", "timestamp_weekday", "age")
    assert schema.options("timestamp_hour") == Column(of="timestamp", part="hour", format="s", timezone="UTC")
    assert schema.options("price") == Column(transform="standard", missing_indicator=True)
    frame = pq.read_table(tmp_path / "ratings.parquet").column("price")
    assert f", {frame.null_count / 5000:.1%} missing, " in reason(text, '"price"')


def test_negative_numbers_keep_their_sign(tmp_path):
    draw = random.Random(4)
    cells = {"label": [draw.randrange(2) for _ in range(500)], "c": [draw.choice("abc") for _ in range(500)]}
    cells |= {"balance": [draw.gauss(0, 10) ** 7 for _ in range(500)], "score": [draw.gauss(0, 1) for _ in range(500)]}
    text = infer_schema(str(parquet(tmp_path / "t.parquet", cells)))
    assert dict(read_back(tmp_path, text).columns) == {
        "balance": Column(transform="signed_log1p"),
        "score": Column(transform="standard"),
    }
    assert reason(text, '"balance"').endswith(": a long tail")


@pytest.mark.parametrize("flipped", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["number", "missing", "text"])
def test_columns_that_give_the_label_away(tmp_path, kind, flipped):
    """Whether by size, by being absent, or by value; a column that is right nine times in ten stays."""
    draw = random.Random(3)
    label = [draw.randrange(2) for _ in range(1000)]
    known = [one != (draw.random() < flipped) for one in label]
    cell = {
        "number": lambda one: draw.random() - 2 * one,
        "missing": lambda one: draw.random() if one else None,
        "text": lambda one: f"{'won' if one else 'lost'} {draw.randrange(20)}",
    }[kind]
    cells = {"label": label, "leak": [cell(one) for one in known], "c": [draw.choice("abc") for _ in label]}
    text = infer_schema(str(parquet(tmp_path / "t.parquet", cells)))
    schema = read_back(tmp_path, text)
    assert ("leak" in schema.names) == bool(flipped)
    assert ("gives the label away" in text) == (not flipped)


def test_a_csv_with_another_delimiter(tmp_path):
    path = text_file(tmp_path / "t.csv", "y;c\n1;a,b\n0;c\n")
    schema = read_back(tmp_path, infer_schema(str(path)))
    assert (schema.delimiter, schema.label, schema.categorical) == (";", "y", ("c",))
    [source] = open_tables(str(path), schema)
    assert next(source.pieces()).frame.rows() == [(1, "a,b"), (0, "c")]


def test_only_the_first_rows_are_read(tmp_path):
    for name, value in (("1", "x"), ("2", None)):
        parquet(
            tmp_path / f"part-{name}.parquet", {"y": [0, 1] * 5, "c": ["a"] * 10, "d": pa.array([value] * 10, "string")}
        )
    assert "its first 10 rows" in infer_schema(str(tmp_path), sample_rows=10)
    assert "its first 20 rows" in infer_schema(str(tmp_path))


@pytest.mark.parametrize(
    ("cells", "label", "expected"),
    [
        (
            {"yes": [0, 1], "c": ["a", "b"]},
            None,
            NO_LABEL + " (these hold 0 and 1: 'yes')",
        ),
        (
            {"label": [0, 2], "c": ["a", "b"]},
            None,
            NO_LABEL,
        ),
        (
            {"user_id": [1, 2, 3], "rating": [1, 4, 5]},
            None,
            NO_LABEL + "; a rating becomes one by a threshold, such as --label 'rating >= 4'",
        ),
        ({"rating": [1, 5]}, "rating > 5", "column 'rating', rating > 5 holds in no row; name another --label"),
        (
            {"rating": [1, None]},
            "rating > 5",
            "column 'rating', row 2: the label is missing (expected a number, for rating > 5); name another --label",
        ),
        (
            {"rating": [1, 5]},
            "ratin > 5",
            "no column 'ratin'; the file has 'rating' (did you mean 'rating'?); name another --label",
        ),
        ({"rating": [1, 5]}, "rating", "column 'rating' holds other values than 0 and 1; name another --label"),
        (
            {"rating": [1, 0]},
            "ratings",
            "no column 'ratings'; the file has 'rating' (did you mean 'rating'?); name another --label",
        ),
        (
            {"y": [1, 0], "price": [None, None]},
            None,
            (
                "no column looks like a feature, and a model needs one; write the schema by hand, docs/tables.md; "
                "'price' is left out: no value in these rows"
            ),
        ),
        ({"y": pa.array([], "int8")}, None, "the table has no rows; give one with data"),
    ],
)
def test_tables_that_give_no_schema(tmp_path, cells, label, expected):
    path = parquet(tmp_path / "t.parquet", cells)
    with pytest.raises(UserError) as caught:
        infer_schema(str(path), label=label)
    assert str(caught.value) == f"{path}: {expected}"


def test_numbers_alone_are_cut_into_buckets(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"y": [1, 0, 1], "price": [0.5, 1.25, 2.5], "x": [0.5, 1, 1.5]})
    schema = read_back(tmp_path, infer_schema(str(path)))
    assert (schema.numeric, schema.categorical) == (("price", "x", "price_bucket", "x_bucket"), ())
    assert schema.options("x_bucket") == Column(of="x", transform="bucketize", buckets=16)
    data = prepare([path], tmp_path / "data", schema=schema, split="none", min_count=1)
    assert (data.schema.numeric, data.schema.categorical) == (("price", "x"), ("price_bucket", "x_bucket"))


def test_whatever_can_be_read_is_kept_if_asked(tmp_path):
    rows = range(200)
    cells = {
        "y": [i % 2 for i in rows],
        "key": [f"k{i}" for i in rows],
        "same": ["a"] * 200,
        "leak": [i % 2 for i in rows],
    }
    path = parquet(tmp_path / "t.parquet", cells | {"id": list(rows), "empty": [None] * 200})
    with pytest.raises(UserError, match="no column looks like a feature"):
        infer_schema(str(path))
    schema = read_back(tmp_path, infer_schema(str(path), keep=True))
    assert schema.categorical == ("key", "same", "leak", "id")


def test_a_label_by_a_threshold(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"rating": [3.5, 4.0, 5.0, 1.0], "user_id": [1, 2, 1, 2]})
    text = infer_schema(str(path), label="rating >= 4")
    schema = read_back(tmp_path, text)
    assert (schema.label, schema.label_column, schema.names[1:]) == ("rating >= 4", "rating", ("user_id",))
    assert "# 50.0% ones" in text
    [source] = open_tables(str(path), schema)
    assert next(source.pieces()).frame["label"].to_list() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "values", "is_weight"),
    [
        ("sample_weight", [0.5, 2.0, 0.0, 1.0], True),
        ("Row_Weight", [1, 2, 3, 1], True),
        ("weight", [0.5, 2.0, 0.0, 1.0], False),  # of a parcel?
        ("sample_weight", [0.5, -2.0, 0.0, 1.0], False),
        ("sample_weight", [0.5, None, 0.0, 1.0], False),
    ],
)
def test_weights_of_rows(tmp_path, name, values, is_weight):
    path = parquet(tmp_path / "t.parquet", {"click": [0, 1, 1, 0], name: values, "user_id": [1, 2, 1, 2]})
    schema = read_back(tmp_path, infer_schema(str(path)))
    assert schema.weight == (name if is_weight else None)
    assert (name in schema.names[1:]) == (not is_weight)


def test_a_named_label_goes_before_others(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"label": [0, 1], "bought": [True, False]})
    schema = read_back(tmp_path, infer_schema(str(path), label="bought"))
    assert (schema.label, schema.categorical) == ("bought", ("label",))


def test_nothing_is_overwritten(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"y": [0, 1], "c": ["a", "b"]})
    output = tmp_path / "schema.toml"
    write_inferred(str(path), output)
    assert read_schema(output).categorical == ("c",)
    output.write_text("mine")
    with pytest.raises(UserError) as caught:
        write_inferred(str(path), output)
    assert str(caught.value) == (
        f"{output}: the file exists, and its corrections would be lost; name another or remove it"
    )
    assert output.read_text() == "mine"
    with pytest.raises(UserError, match="it can't be written"):
        write_inferred(str(path), tmp_path / "none" / "schema.toml")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), unique=True, min_size=1, max_size=4))
def test_any_name_returns(tmp_path_factory, names):
    """Names with quotes, newlines, control characters, and in types too: what is written is TOML with these names."""
    folder = tmp_path_factory.mktemp("names")
    names = [name for name in names if name != "label"]
    cells = {name: ["a", "b"] for name in names} | {"label": [0, 1], "more": ["a", "b"]}
    cells["odd"] = pa.array([None, None], pa.struct([(name, pa.int8()) for name in names]))
    text = infer_schema(str(parquet(folder / "t.parquet", cells)), label="label")
    schema = read_back(folder, text)
    assert schema.categorical == tuple(name for name in cells if name not in ("label", "odd"))


def test_frappe(shared_data, tmp_path):
    path = shared_data / "frappe" / "train.parquet"
    schema = read_back(tmp_path, infer_schema(str(path)))
    assert schema.label == "label"
    assert schema.numeric == ()
    assert schema.categorical == tuple(pq.read_schema(path).names[1:])
    assert dict(schema.columns) == {}

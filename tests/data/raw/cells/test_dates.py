"""Parts of dates and times against Python's datetime and zoneinfo; crosses and labels by a threshold."""

import random
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest

from tests.support.data.tables import parquet, text_file
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, Schema, read_schema
from torchrec_deepfm.errors import UserError

BERLIN = ZoneInfo("Europe/Berlin")
PARTS = ("hour", "weekday", "day", "month")


def expected(time: datetime | None) -> tuple[int | None, ...]:
    if time is None:
        return (None,) * len(PARTS)
    return (time.hour, time.isoweekday(), time.day, time.month)


def read(path, options: Column, categorical=PARTS) -> list[tuple]:
    columns = {part: Column(of="t", part=part, format=options.format, timezone=options.timezone) for part in PARTS}
    schema = Schema(label="y", numeric=(), categorical=categorical, columns=columns, layout="table")
    [source] = open_tables(str(path), schema)
    return [row for piece in source.pieces() for row in piece.frame.drop("label").rows()]


draw = random.Random(5)
# Around the changes of the clock in Berlin too, and before 1970.
MOMENTS = [
    *(datetime(2024, 3, 31, hour, 30, tzinfo=UTC) for hour in range(4)),
    *(datetime(2024, 10, 27, hour, 30, tzinfo=UTC) for hour in range(4)),
    *(datetime(1999, 1, 1, tzinfo=UTC) + timedelta(seconds=draw.randrange(10**9)) for _ in range(50)),
    datetime(1965, 5, 5, 5, 5, tzinfo=UTC),
    None,
]
LOCAL = [None if time is None else time.astimezone(BERLIN) for time in MOMENTS]
SECONDS = [None if time is None else int(time.timestamp()) for time in MOMENTS]
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@pytest.mark.parametrize("kind", ["integer", "float", "csv"])
@pytest.mark.parametrize("unit", UNITS)
def test_numbers_since_1970(tmp_path, unit, kind):
    values = [None if one is None else one * UNITS[unit] for one in SECONDS]
    if kind == "csv":
        cells = [f"0,{'' if one is None else one}" for one in values]
        path = text_file(tmp_path / "t.csv", "\n".join(["y,t", *cells]))
    else:
        arrow = pa.array(values if kind == "integer" else [one and float(one) for one in values])
        path = parquet(tmp_path / "t.parquet", {"y": [0] * len(values), "t": arrow})
    assert read(path, Column(part="hour", format=unit, timezone="Europe/Berlin")) == [expected(time) for time in LOCAL]
    utc = [expected(time) for time in MOMENTS]
    assert read(path, Column(part="hour", format=unit)) == utc


@pytest.mark.parametrize("unit", UNITS)
def test_timestamps(tmp_path, unit):
    """With a zone they are instants; without one, or as dates, they are taken as they stand."""
    zoned = pa.array(MOMENTS, pa.timestamp(unit, "America/Lima"))
    path = parquet(tmp_path / "zoned.parquet", {"y": [0] * len(MOMENTS), "t": zoned})
    assert read(path, Column(part="hour", timezone="Europe/Berlin")) == [expected(time) for time in LOCAL]
    naive = pa.array([None if time is None else time.replace(tzinfo=None) for time in MOMENTS], pa.timestamp(unit))
    path = parquet(tmp_path / "naive.parquet", {"y": [0] * len(MOMENTS), "t": naive})
    assert read(path, Column(part="hour", timezone="Europe/Berlin")) == [expected(time) for time in MOMENTS]
    days = [None if time is None else time.date() for time in MOMENTS]
    path = parquet(tmp_path / "days.parquet", {"y": [0] * len(days), "t": pa.array(days, pa.date32())})
    midnights = [None if day is None else datetime(day.year, day.month, day.day) for day in days]
    assert read(path, Column(part="hour")) == [expected(time) for time in midnights]


@pytest.mark.parametrize(
    ("format_", "write", "zoned"),
    [
        (None, lambda time: time.isoformat(), True),
        (None, lambda time: time.isoformat().replace("+00:00", "Z").replace("T", " "), True),
        (None, lambda time: time.replace(tzinfo=None).isoformat(), False),
        (None, lambda time: time.date().isoformat(), False),
        ("%d.%m.%Y %H:%M:%S", lambda time: time.strftime("%d.%m.%Y %H:%M:%S"), False),
        ("%Y%m%d", lambda time: time.strftime("%Y%m%d"), False),
        ("%y%m%d%H", lambda time: time.strftime("%y%m%d%H"), False),
        ("%Y-%m-%d %H:%M:%S %z", lambda time: time.strftime("%Y-%m-%d %H:%M:%S %z"), True),
    ],
)
@pytest.mark.parametrize("csv", [False, True], ids=["parquet", "csv"])
def test_texts(tmp_path, format_, write, zoned, csv):
    given = [time for time in MOMENTS if time is None or time.year > 1970]
    texts = [None if time is None else write(time) for time in given]
    if csv:
        path = text_file(tmp_path / "t.csv", "\n".join(["y,t", *(f"0,{text or ''}" for text in texts)]))
    else:
        path = parquet(tmp_path / "t.parquet", {"y": [0] * len(texts), "t": pa.array(texts, pa.string())})
    wanted = []
    for time in given:
        local = time.astimezone(BERLIN) if zoned and time else time
        if (time is not None and "%H" not in (format_ or "%H")) or (time is not None and len(write(time)) == 10):
            local = datetime(time.year, time.month, time.day)
        wanted.append(expected(local))
    if format_ == "%y%m%d%H":
        wanted = [expected(time and time.replace(minute=0)) for time in given]
    assert read(path, Column(part="hour", format=format_, timezone="Europe/Berlin")) == wanted


def test_numbers_that_are_written_dates(tmp_path):
    """Avazu's hour; a year below 10 has lost its zero as a number."""
    path = parquet(tmp_path / "t.parquet", {"y": [0] * 3, "t": [14_102_100, 14_103_023, 9_010_105]})
    wanted = [datetime(2014, 10, 21, 0), datetime(2014, 10, 30, 23), datetime(2009, 1, 1, 5)]
    assert read(path, Column(part="hour", format="%y%m%d%H")) == [expected(time) for time in wanted]


def test_age_in_days(tmp_path):
    born = [date(2000, 2, 29), date(2024, 1, 1), None]
    seen = [datetime(2024, 2, 29, 12), datetime(2024, 1, 1, 6), datetime(2024, 1, 1)]
    path = parquet(tmp_path / "t.parquet", {"y": [0] * 3, "born": born, "seen": seen, "c": [1] * 3})
    columns = {
        "age": Column(of="born", part="age", until="seen"),
        "then": Column(of="born", part="age", until="2024-02-29", transform="log1p"),
    }
    schema = Schema(label="y", numeric=tuple(columns), categorical=("c",), columns=columns, layout="table")
    [source] = open_tables(str(path), schema)
    frame = next(source.pieces()).frame
    day = timedelta(days=1)
    ages = [(end - datetime(one.year, one.month, one.day)) / day for one, end in zip(born[:2], seen[:2], strict=True)]
    assert frame["n0"].to_list() == [*ages, None]
    assert frame["n1"].to_list() == [(date(2024, 2, 29) - one).days for one in born[:2]] + [None]


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([1, 2], {}, 'column \'t\': it holds integers, not times; set format = "s" (seconds since 1970), "ms", "us"'),
        ([[1], [2]], {}, "column 't': it holds lists of integers, not times; convert it"),
        (["2024-02-30", "x"], {}, "row 1, column 'hour': '2024-02-30' is not a time; set or correct its format"),
        ([1700000000000, 1], {"format": "s"}, "is not a time of our days (year 55840); correct its format"),
        ([13, 1], {"format": "%y%m%d"}, "row 1, column 'hour': 13 is not a time"),
    ],
)
def test_what_is_not_a_time(tmp_path, cells, options, message):
    path = parquet(tmp_path / "t.parquet", {"y": [0, 1], "t": cells})
    columns = {"hour": Column(of="t", part="hour", **options)}
    schema = Schema(label="y", numeric=(), categorical=("hour",), columns=columns, layout="table")
    with pytest.raises(UserError) as caught:
        [list(source.pieces()) for source in open_tables(str(path), schema)]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_crosses_keep_pairs_apart(tmp_path):
    values = [("a", "b|"), ("a|", "b"), ("a", None), (None, "a"), ("a|,", "b"), ("a", "|,b"), ("a", "-"), (None, "-")]
    a, b = zip(*values, strict=True)
    path = parquet(tmp_path / "t.parquet", {"y": [0] * len(values), "a": a, "b": b, "n": range(len(values))})
    columns = {"ab": Column(cross=("a", "b")), "an": Column(cross=("n", "a"))}
    schema = Schema(label="y", numeric=(), categorical=("ab", "a", "b", "n", "an"), columns=columns, layout="table")
    [source] = open_tables(str(path), schema)
    frame = next(source.pieces()).frame
    assert frame["c0"].n_unique() == len(values)
    assert frame["c4"].null_count() == 0
    assert frame.select("c0", "c1", "c2").unique(maintain_order=True).height == len(values)


def test_a_rule_against_python(tmp_path):
    numbers = [3.5, 4.0, -1.0, 4.0001]
    path = parquet(tmp_path / "t.parquet", {"a rating": numbers, "c": [1] * 4})
    for text, rule in {
        "a rating >= 4": lambda x: x >= 4,
        "a rating<4": lambda x: x < 4,
        "a rating == -1.0": lambda x: x == -1,
        "a rating != 4e0": lambda x: x != 4,
    }.items():
        schema = Schema(label=text, numeric=(), categorical=("c",), layout="table")
        [source] = open_tables(str(path), schema)
        assert next(source.pieces()).frame["label"].to_list() == [int(rule(x)) for x in numbers]
        assert Schema.from_json(schema.to_json()) == schema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'label = ["a", "b"]\nnumeric = []\ncategorical = ["c"]',
            "label: ['a', 'b'] are several, and a model here learns one",
        ),
        ('label = "r >= 4"\nnumeric = ["r"]\ncategorical = ["c"]', "'r' is the label, and would give itself away"),
        ('cross = ["c"]', "columns.x.cross: ['c'] does not name two different columns"),
        ('cross = ["c", "d"]', "columns.x.cross: 'd' is not a categorical column with one value per row"),
        ('cross = ["c", "x"]', "columns.x.cross: 'x' is not a categorical column with one value per row"),
        ('of = "t"\npart = "hours"', "columns.x.part: 'hours' is not valid; choose one of hour, weekday"),
        ('of = "t"\npart = "age"', "columns.x.until: is missing; give a date"),
        ('of = "t"\nformat = "s"', "columns.x.format: only valid for a part of a time"),
        ('of = "t"\npart = "hour"\ntimezone = "Mars"', "columns.x.timezone: 'Mars' is not a time zone of this machine"),
    ],
)
def test_schemas_that_are_refused(tmp_path, text, message):
    path = tmp_path / "schema.toml"
    head = 'label = "y"\nnumeric = []\ncategorical = ["c", "x"]\n[columns.x]\n'
    path.write_text(text if text.startswith("label") else head + text)
    with pytest.raises(UserError) as caught:
        read_schema(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")

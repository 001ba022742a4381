"""Tables with text, integers, lists and weights through the whole of prepare, against plain Python."""

import hashlib
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.support.data.raw_oracle import splits_of
from torchrec_deepfm.data.dataset.verify import verify
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.passes import stage
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.sources.inputs import BYTES_OF_A_ROW
from torchrec_deepfm.data.schema import Column, Schema, read_schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.errors import UserError

FRAPPE = Path("../shared/data/frappe")
SCHEMA = Schema(
    label="click",
    numeric=("price", "count"),
    categorical=("city", "tags", "user", "shops"),
    columns={
        "tags": Column(list=True, weights="tag weights", min_count=3),
        "shops": Column(list=True, num_embeddings=7),
        "count": Column(transform="log1p"),
        "user": Column(num_embeddings=50),
    },
    layout="table",
)


def rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        tags = None if draw.random() < 0.1 else [draw.choice("äßçdeæ") for _ in range(draw.randrange(4))]
        found.append(
            {
                "click": draw.randrange(2),
                "price": None if draw.random() < 0.2 else draw.randrange(-50, 100) / 8,
                "count": draw.randrange(0, 1000),
                "city": None if draw.random() < 0.1 else draw.choice(["Łódź", "Köln", "köln", "", "Rome"]),
                "tags": tags,
                "tag weights": None if tags is None else [draw.randrange(8) / 8 for _ in tags],
                "user": draw.randrange(-5, 200),
                "shops": [draw.randrange(-3, 40) for _ in range(draw.randrange(3))],
            }
        )
    return found


def write(path: Path, table_rows: list[dict]) -> Path:
    types = {"tags": pl.List(pl.String), "tag weights": pl.List(pl.Float64), "shops": pl.List(pl.Int64)}
    pl.DataFrame(table_rows, schema_overrides=types, infer_schema_length=None).write_parquet(path, row_group_size=70)
    return path


def numbering(values, min_count):
    counts = Counter(values)
    kept = [value for value, count in counts.items() if count >= min_count]

    def key(value):
        return (
            -counts[value],
            value is not None,
            0 if value is None else value if isinstance(value, int) else value.encode(),
        )

    return {value: i for i, value in enumerate(sorted(kept, key=key), 1)}


def bag(row, name):
    return row[name] or []


def ids_of(train, hashed):
    """Per column: the function from a value to its id."""
    if hashed:

        def hashing(size):
            def ident(value):
                if value is None:
                    return 0
                if isinstance(value, str):
                    value = int.from_bytes(hashlib.md5(value.encode()).digest()[8:], "little")
                return 1 + value % (size - 1)

            return ident

        return {"city": hashing(100), "tags": hashing(100), "user": hashing(50), "shops": hashing(7)}
    tables = {name: numbering([row[name] for row in train], 2) for name in ("city", "user")} | {
        name: numbering([value for row in train for value in bag(row, name)], count)
        for name, count in (("tags", 3), ("shops", 2))
    }
    return {name: lambda value, known=known: known.get(value, 0) for name, known in tables.items()}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "PIECE_SHARE", 60 * BYTES_OF_A_ROW / PrepareOptions().memory_bytes)
    monkeypatch.setattr(module, "_ROW_BYTES", 1)
    monkeypatch.setattr(module, "BLOCK_SHARE", 4 * 4 * 100 / PrepareOptions().memory_bytes)


@pytest.mark.parametrize("hashed", [False, True], ids=["vocabulary", "hash"])
@pytest.mark.usefixtures("small")
def test_every_value_of_a_table(tmp_path, hashed):
    train, test = rows(400, 1), rows(90, 2)
    paths = [write(tmp_path / "train.parquet", train), write(tmp_path / "test.parquet", test)]
    options = {"hash": True, "num_embeddings": 100} if hashed else {"min_count": 2}
    data = prepare(paths[:1], tmp_path / "out", test=paths[1:], schema=SCHEMA, **options)
    idents = ids_of(train, hashed)
    for split, wanted in (("train", train), ("test", test)):
        (day,) = data.days(split)
        arrays = data.arrays(day)
        assert arrays.labels[:][:, 0].tolist() == [row["click"] for row in wanted]
        numbers = np.array([[row["price"] or 0.0, np.log1p(row["count"])] for row in wanted])
        np.testing.assert_array_max_ulp(arrays.dense[:], numbers.astype(np.float32))
        assert arrays.sparse[:].tolist() == [
            [idents["city"](row["city"]), idents["user"](row["user"])] for row in wanted
        ]
        for name in ("tags", "shops"):
            bags, values = arrays.bags[name], [value for row in wanted for value in bag(row, name)]
            assert bags.offsets[:].tolist() == np.cumsum([0, *(len(bag(row, name)) for row in wanted)]).tolist()
            assert bags.ids[:].tolist() == [idents[name](value) for value in values]
        assert arrays.bags["shops"].weights is None
        assert arrays.bags["tags"].weights[:].tolist() == [w for row in wanted for w in bag(row, "tag weights")]
    verify(data.folder)
    # And the loader yields them.
    batch = Loader(data, "train", batch_size=len(train)).batch(0)
    features = batch.sparse_features.to_dict()
    assert features["tags"].values().tolist() == [idents["tags"](v) for row in train for v in bag(row, "tags")]
    assert features["tags"].weights().tolist() == [w for row in train for w in bag(row, "tag weights")]
    assert features["shops"].lengths().tolist() == [len(bag(row, "shops")) for row in train]


@pytest.mark.parametrize("hashed", [False, True], ids=["vocabulary", "hash"])
@pytest.mark.usefixtures("small")
def test_a_stopped_table_resumes(tmp_path, monkeypatch, hashed):
    path = write(tmp_path / "train.parquet", rows(400, 3))
    options = {"schema": SCHEMA, **({"hash": True, "num_embeddings": 100} if hashed else {"min_count": 2})}
    whole = prepare([path], tmp_path / "whole", **options).folder
    add = stage.Stager._add

    for stop in range(1, 7):
        count = 0

        def stopping(self, *arguments, stop=stop):
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt
            add(self, *arguments)

        monkeypatch.setattr(stage.Stager, "_add", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare([path], tmp_path / "out", **options)
        monkeypatch.setattr(stage.Stager, "_add", add)
        found = prepare([path], tmp_path / "out", **options).folder
        assert {p.name: p.read_bytes() for p in found.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
        shutil.rmtree(found)


def test_a_vocabulary_of_text_for_integers(tmp_path):
    schema = Schema(label="y", numeric=(), categorical=("c",), layout="table")
    for name, values in (("text", ["a", "b"] * 20), ("numbers", [1, 2] * 20)):
        pl.DataFrame({"y": [0, 1] * 20, "c": values}).write_parquet(tmp_path / f"{name}.parquet")
    first = prepare([tmp_path / "text.parquet"], tmp_path / "first", schema=schema, split="none").folder
    with pytest.raises(UserError, match="column 'c' holds String there and Int64 here"):
        prepare([], tmp_path / "out", test=[tmp_path / "numbers.parquet"], schema=schema, vocabulary=first)


def test_a_column_without_values_takes_any_vocabulary(tmp_path):
    schema = Schema(label="y", numeric=(), categorical=("c",), layout="table")
    pl.DataFrame({"y": [0, 1] * 20, "c": [1, 2] * 20}).write_parquet(tmp_path / "a.parquet")
    empty = pl.Series("c", [None] * 4, dtype=pl.String)
    pl.DataFrame([pl.Series("y", [0, 1, 0, 1]), empty]).write_parquet(tmp_path / "b.parquet")
    first = prepare([tmp_path / "a.parquet"], tmp_path / "first", schema=schema, split="none").folder
    data = prepare([], tmp_path / "out", test=[tmp_path / "b.parquet"], schema=schema, vocabulary=first)
    assert data.arrays(data.days("test")[0]).sparse[:].tolist() == [[0]] * 4


def test_log_of_a_table(tmp_path):
    schema = Schema(label="y", numeric=("n",), categorical=("c",), layout="table", numeric_transform="log")
    pl.DataFrame({"y": [0, 1, 1], "n": [5, None, -3], "c": [1, 2, 3]}).write_parquet(tmp_path / "a.parquet")
    data = prepare([tmp_path / "a.parquet"], tmp_path / "out", schema=schema, split="none")
    wanted = np.log(np.array([10, 5, 2], np.float32))  # the smallest number becomes 2, a missing one counts as 0
    assert data.arrays(data.days("train")[0]).dense[:, 0].tolist() == wanted.tolist()
    pl.DataFrame({"y": [0, 1], "n": [5.0, 0.5], "c": [1, 2]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: row 2, column 'n': 0.5 is not an integer of 32 bits"):
        prepare([tmp_path / "b.parquet"], tmp_path / "no", schema=schema, split="none")


@pytest.mark.parametrize("split", ["8:1:1", "last-day"])
@pytest.mark.usefixtures("small")
def test_lists_in_every_split(tmp_path, split):
    tables = [rows(200, seed) for seed in (4, 5)]
    paths = [write(tmp_path / f"day_{i}.parquet", found) for i, found in enumerate(tables)]
    data = prepare(paths, tmp_path / "out", schema=SCHEMA, split=split, hash=True, num_embeddings=100)
    idents = ids_of([], True)
    if split == "last-day":
        wanted = {"train": tables[0], "validation": tables[1][:100], "test": tables[1][100:]}
    else:
        wanted = {"train": [], "validation": [], "test": []}
        for i, found in enumerate(tables):
            for name, row in zip(splits_of(0, i, 200), found, strict=True):
                wanted[name].append(row)
    for name, found in wanted.items():
        batch = Loader(data, name, batch_size=len(found)).batch(0).sparse_features.to_dict()
        assert batch["tags"].values().tolist() == [idents["tags"](v) for row in found for v in bag(row, "tags")]
        assert batch["tags"].weights().tolist() == [w for row in found for w in bag(row, "tag weights")]
        assert batch["shops"].lengths().tolist() == [len(bag(row, "shops")) for row in found]
        assert batch["user"].values().tolist() == [idents["user"](row["user"]) for row in found]


def test_the_same_file_in_a_folder_and_by_itself(tmp_path):
    schema = Schema(label="y", numeric=(), categorical=("c",), layout="table")
    (tmp_path / "parts").mkdir()
    for name in ("a", "b"):
        pl.DataFrame({"y": [0, 1] * 20, "c": [1, 2] * 20}).write_parquet(tmp_path / "parts" / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: the same file is named twice"):
        prepare([tmp_path / "parts"], tmp_path / "out", test=[tmp_path / "parts" / "b.parquet"], schema=schema)
    data = prepare([tmp_path / "parts"], tmp_path / "out", schema=schema, split="none", min_count=1)
    assert [day.stem for day in data.days("train")] == ["day_0", "day_1"]


def test_frappe(tmp_path):
    if not FRAPPE.exists():
        pytest.skip(f"{FRAPPE} is not here")
    frames = {name: pl.read_parquet(FRAPPE / f"{name}.parquet") for name in ("train", "validation")}
    columns = [name for name in frames["train"].columns if name != "label"]
    (tmp_path / "schema.toml").write_text(f'label = "label"\nnumeric = []\ncategorical = {json.dumps(columns)}\n')
    data = prepare(
        [FRAPPE / "train.parquet"],
        tmp_path / "out",
        validation=[FRAPPE / "validation.parquet"],
        schema=read_schema(tmp_path / "schema.toml"),
        min_count=1,
    )
    tables = {name: numbering(frames["train"][name].to_list(), 1) for name in columns}
    assert dict(data.num_embeddings) == {name: 1 + len(known) for name, known in tables.items()}
    for split, frame in frames.items():
        (day,) = data.days(split)
        arrays = data.arrays(day)
        assert arrays.labels[:][:, 0].tolist() == frame["label"].cast(pl.Int64).to_list()
        for j, name in enumerate(columns):
            assert arrays.sparse[:, j].tolist() == [tables[name].get(value, 0) for value in frame[name].to_list()]


def test_signed_logarithms():
    given = [-3.5, -1e300, 0.0, None, 1e-9, 7.0]
    dense = numeric.dense(pl.DataFrame({"n0": given}), [numeric.NumericColumn(name="a", transform="signed_log1p")])
    expected = [math.copysign(math.log1p(abs(x)), x) if x is not None else 0.0 for x in given]
    assert dense[:, 0].tolist() == pytest.approx(expected, rel=1e-6)

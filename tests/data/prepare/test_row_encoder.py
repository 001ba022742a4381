"""New rows are encoded as the loader reads the same rows after prepare."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.data.prepare.test_prepare import write
from tests.support.data.raw_oracle import SMALL, random_text
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.raw.cells import columns as cells
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.data.values import hashing, vocabulary
from torchrec_deepfm.data.values.numeric import BUCKETS, LEARNED
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal


def encoder_of(data, folder):
    RowEncoder.save(data, folder)
    return RowEncoder.open(folder)


def raw_frame(text: bytes) -> pl.DataFrame:
    fields = [line.split("\t") for line in text.decode().splitlines()]
    columns = list(zip(*fields, strict=True))[1:]
    numbers = {n: [int(v) if v else None for v in c] for n, c in zip(SMALL.numeric, columns, strict=False)}
    return pl.DataFrame(numbers | dict(zip(SMALL.categorical, columns[2:], strict=True)))


def check_as_loaded(data, encoded) -> None:
    """Compare with the tensors of the loader, bit for bit."""
    [batch] = Loader(data, "train", batch_size=data.rows("train"), rank=0, world_size=1, shuffle=False)
    features = batch.sparse_features
    assert encoded.dense.tobytes() == batch.dense_features.numpy().tobytes()
    for name in data.schema.categorical:
        jagged = features[name]
        if name in encoded.bags:
            bags = encoded.bags[name]
            ids, lengths, weights = bags.ids, bags.lengths, bags.weights
        else:
            ids = encoded.sparse[:, data.schema.one_hot.index(name)]
            lengths, weights = np.ones(len(ids), np.int64), None
        assert ids.tolist() == jagged.values().tolist(), name
        assert lengths.tolist() == jagged.lengths().tolist(), name
        if data.schema.weighted:
            weights = np.ones(len(ids), np.float32) if weights is None else weights
            assert weights.tobytes() == jagged.weights().numpy().tobytes(), name


@pytest.mark.parametrize(
    "numbers", ["log1p", "signed_log1p", "log", "bucketize", "fuxictr", "none", "standard", "clip"]
)
@pytest.mark.parametrize("hashed", [False, True], ids=["vocabulary", "hash"])
def test_criteo(tmp_path, numbers, hashed):
    text = random_text(300, 1, SMALL)
    options = {"hash": True, "num_embeddings": 50} if hashed else {"min_count": 3}
    paths = write(tmp_path, a=text)
    data = prepare(paths, tmp_path / "out", schema=SMALL, split="none", numeric_transform=numbers, **options)
    encoder, frame = encoder_of(data, tmp_path / "encoder"), raw_frame(text)
    check_as_loaded(data, encoder.encode(frame))
    codes = frame.with_columns(
        pl.col(name).replace("", None).str.to_integer(base=16, dtype=pl.Int64) for name in SMALL.categorical
    )
    check_as_loaded(data, encoder.encode(codes.rows(named=True)))


SCALARS = {
    "string": st.none() | st.sampled_from(["", "a", "b", "ß", "Łódź", "a|b", "7", "nan", " x"]),
    "integer": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 6),
    "boolean": st.none() | st.booleans(),
    "float": st.none() | st.just(float("nan")) | st.integers(-3, 5).map(float),
}
NUMBERS = st.none() | st.just(float("nan")) | st.integers(-9, 2**31 - 3).map(float) | st.floats(-1e30, 1e30)
INTEGERS = st.none() | st.integers(-(2**31) + 2, 2**31 - 3) | st.integers(-3, 3)
ARROW = {"string": pa.string(), "integer": pa.int64(), "boolean": pa.bool_(), "float": pa.float64()}


@st.composite
def data_sets(draw):
    """A schema, and columns of raw values with their Arrow types."""
    count = draw(st.integers(1, 12))
    logs = draw(st.booleans())
    columns, options, types = {}, {}, {}
    numeric = [f"n{i}" for i in range(draw(st.integers(0, 2)))]
    for name in numeric:
        transform = draw(
            st.sampled_from(
                ["log", "bucketize"] if logs else ["log1p", "signed_log1p", "none", "bucketize", "fuxictr", *LEARNED]
            )
        )
        options[name] = Column(
            transform=transform,
            buckets=draw(st.none() | st.integers(2, 4)) if transform == "bucketize" else None,
            missing_indicator=draw(st.booleans()) and transform not in ("log", *BUCKETS),
        )
        values = draw(st.lists(INTEGERS if transform == "log" else NUMBERS, min_size=count, max_size=count))
        columns[name], types[name] = values, pa.int64() if transform == "log" else pa.float64()
    categorical = [f"c{i}" for i in range(draw(st.integers(1, 3)))]
    for name in categorical:
        kind = draw(st.sampled_from(list(SCALARS)))
        wanted = "integer" if kind == "float" else draw(st.sampled_from([None, "string", "integer"]))
        if kind == "string" and wanted == "integer":
            kind = "integer"
        how = draw(st.sampled_from(["one", "list", "cut"]))
        if how == "cut" and kind != "string":
            how = "list"
        scalars = SCALARS[kind]
        if how == "one":
            values, types[name] = st.lists(scalars, min_size=count, max_size=count), ARROW[kind]
            columns[name], options[name] = draw(values), Column(type=wanted)
            continue
        weighted = draw(st.booleans())
        lists = draw(st.lists(st.none() | st.lists(scalars, max_size=4), min_size=count, max_size=count))
        options[name] = Column(
            type=wanted, list=True, separator="|" if how == "cut" else None, weights=f"w{name}" if weighted else None
        )
        if how == "cut":
            texts = [None if one is None else "|".join(value or "" for value in one) for one in lists]
            lists = [None if cell is None else cell.split("|") for cell in texts]
            columns[name], types[name] = texts, pa.string()
        else:
            columns[name], types[name] = lists, pa.list_(ARROW[kind])
        if weighted:
            weight = st.floats(-4, 4, width=32)
            given = [None if one is None else [draw(weight) for _ in one] for one in lists]
            columns[f"w{name}"], types[f"w{name}"] = given, pa.list_(pa.float32())
    times = st.lists(st.none() | st.integers(-(10**9), 4 * 10**9), min_size=count, max_size=count)
    columns["t"], types["t"] = draw(times), pa.int64()
    zone = draw(st.sampled_from([None, "Asia/Kathmandu"]))
    for part in draw(st.lists(st.sampled_from(["hour", "weekday"]), unique=True)):
        options[part] = Column(of="t", part=part, format="s", timezone=zone)
        categorical.append(part)
    if draw(st.booleans()):
        transform = draw(st.sampled_from(["log"] if logs else ["none", "standard"]))
        if transform != "log":
            numeric.append("age")
            options["age"] = Column(of="t", part="age", until="2024-02-29", format="s", transform=transform)
    singles = [name for name in categorical if not options[name].list]
    if len(singles) > 1 and draw(st.booleans()):
        categorical.append("cross")
        options["cross"] = Column(cross=tuple(singles[:2]))
    schema = Schema(
        label=draw(st.sampled_from(["y", "y > 0.5"])),
        numeric=tuple(numeric),
        categorical=tuple(categorical),
        columns=options,
        layout="table",
        missing=draw(st.sampled_from(["value", "rare"])),
    )
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    hashed = draw(st.booleans())
    how = (
        {"hash": True, "num_embeddings": draw(st.integers(2, 9))} if hashed else {"min_count": draw(st.integers(1, 2))}
    )
    return schema, table, how, draw(st.sampled_from(["few", "large vocabularies", "many"]))


@given(data_sets())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_table(drawn):
    schema, table, how, size = drawn
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        pa.parquet.write_table(table.append_column("y", pa.array([1] * len(table))), folder / "a.parquet")
        data = prepare([folder / "a.parquet"], folder / "out", schema=schema, split="none", **how)
        encoder = encoder_of(data, folder / "encoder")
        if size == "large vocabularies":
            patch.setattr(vocabulary, "_DICTIONARY", 0)
        elif size == "many":
            for module in (cells, hashing, vocabulary):
                patch.setattr(module, "_FEW", 0)
        frames = [table, pl.DataFrame(table), table.to_pylist()]
        for frame in frames:
            check_as_loaded(data, encoder.encode(frame))
        whole = encoder.encode(table)
        for row in range(len(table)):
            one = encoder.encode(table.slice(row, 1))
            assert one.dense.tobytes() == whole.dense[row : row + 1].tobytes()
            assert one.sparse.tolist() == whole.sparse[row : row + 1].tolist()
            for each, bags in whole.bags.items():
                first, last = bags.lengths[:row].sum(), bags.lengths[: row + 1].sum()
                assert one.bags[each].ids.tolist() == bags.ids[first:last].tolist()


@given(
    st.lists(st.none() | st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), unique=True),
    st.lists(st.none() | st.integers(-6, 6)),
    st.sampled_from([pl.Int64, pl.String, pl.UInt32]),
    st.sampled_from([0, 100]),
)
@settings(deadline=None)
def test_a_vocabulary_is_a_dictionary(kept, asked, dtype, dictionary):
    if dtype == pl.UInt32:
        kept = list(dict.fromkeys(None if one is None else abs(one) % 2**32 for one in kept))
        asked = [None if one is None else abs(one) for one in asked]
    ids = {value: place for place, value in enumerate(kept, 1)}
    kept_series = pl.Series(kept, dtype=pl.Int64).cast(dtype)
    assume(kept_series.n_unique() == len(kept))
    words = vocabulary.Vocabulary(kept_series)
    expected = [ids.get(value, 0) for value in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_DICTIONARY", dictionary)
        assert words.ids(pl.Series(asked, dtype=pl.Int64).cast(dtype)).tolist() == expected
        for value, wanted in zip(asked, expected, strict=True):
            assert words.ids(pl.Series([value], dtype=pl.Int64).cast(dtype)).tolist() == [wanted]


def test_rows_that_do_not_fit(tmp_path):
    paths = write(tmp_path, a=random_text(50, 1, SMALL))
    data = prepare(paths, tmp_path / "out", schema=SMALL, split="none", min_count=1)
    encoder, good = encoder_of(data, tmp_path / "encoder"), raw_frame(random_text(5, 2, SMALL))
    with pytest.raises(UserError, match=r"^column 'c2' is absent; the rows have n1, n2, c1, c3$"):
        encoder.encode(good.drop("c2"))
    with pytest.raises(UserError, match=r"^row 2, column 'c1': 'xyz' is not a hexadecimal number of at most 8 digits;"):
        encoder.encode(good.with_columns(c1=pl.Series(["a", "xyz", "b", "", None])))
    with pytest.raises(UserError, match=r"^row 4, column 'c3': '-1' is not a hexadecimal number of at most 8 digits;"):
        encoder.encode(good.with_columns(c3=pl.Series(["a", "b", "c", "-1", "+1"])))
    with pytest.raises(UserError, match=r"^row 3: column 'n2' is absent"):
        encoder.encode([*good.rows(named=True)[:2], {"n1": 1, "c1": "a", "c2": "a", "c3": "a"}])
    with pytest.raises(UserError, match=r"^row 2, column 'n1': \[2\] does not go with 1 before it"):
        encoder.encode([{"n1": n, "n2": 1, "c1": "a", "c2": "a", "c3": "a"} for n in (1, [2])])
    with pytest.raises(UserError, match=r"^column 'n1': it holds text, not numbers"):
        encoder.encode(good.with_columns(n1=pl.lit("12")))
    with pytest.raises(UserError, match=r"^rows of type int can't be read; give a pandas or polars DataFrame"):
        encoder.encode(7)
    skipped = encoder.encode(good.with_columns(c1=pl.Series(["a", "xyz", "b", "", None])), on_bad_row="skip")
    assert len(skipped) == 4
    assert list(skipped.bad) == [1]
    assert "'xyz' is not a hexadecimal" in skipped.bad[1]


def test_below_the_smallest_number(tmp_path):
    data = prepare(
        write(tmp_path, a=b"1\t-3\t5\ta\ta\ta\n"),
        tmp_path / "out",
        schema=SMALL,
        split="none",
        min_count=1,
        numeric_transform="log",
    )
    row = {"n1": -100, "n2": 5, "c1": "a", "c2": "a", "c3": "a"}
    assert encoder_of(data, tmp_path / "encoder").encode([row]).dense.tolist() == [np.log([2, 10], dtype="f").tolist()]


def damage(folder, what):
    if what == "vocabulary":
        path = folder / "vocabulary_1.parquet"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif what == "other vocabulary":
        (folder / "vocabulary_0.parquet").replace(folder / "vocabulary_1.parquet")
    elif what == "json":
        path = folder / "encoder.json"
        path.write_bytes(path.read_bytes().replace(b"criteo", b"criteO"))
    elif what == "newer":
        content = json.loads((folder / "encoder.json").read_bytes())
        (folder / "encoder.json").write_bytes(seal(content | {"format_version": 2, "more": 1}))
    else:
        (folder / "encoder.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vocabulary", "vocabulary of column 'c2' is damaged or of another run"),
        ("other vocabulary", "vocabulary_0.parquet: the vocabulary can't be read"),
        ("json", "the file is damaged"),
        ("newer", "format_version is 2, this version reads 1"),
        ("missing", "can't be read"),
    ],
)
def test_damage(tmp_path, what, message):
    data = prepare(write(tmp_path, a=random_text(50, 1, SMALL)), tmp_path / "out", schema=SMALL, split="none")
    RowEncoder.save(data, tmp_path / "encoder")
    damage(tmp_path / "encoder", what)
    with pytest.raises(UserError, match=message) as error:
        RowEncoder.open(tmp_path / "encoder")
    assert "\n" not in str(error.value)

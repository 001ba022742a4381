"""Transforms that learn from the training rows, against scikit-learn fitted on the same rows."""

import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from sklearn.preprocessing import KBinsDiscretizer, MinMaxScaler, QuantileTransformer, StandardScaler

from tests.support.data.raw_oracle import splits_of
from tests.support.data.stopped_prepare import StoppedError, content, stopping
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.prepare.sources.inputs import BYTES_OF_A_ROW
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.data.values import statistics as learning
from torchrec_deepfm.errors import UserError

ROWS = 2000
COLUMNS = {
    "standard": Column(transform="standard"),
    "minmax": Column(transform="minmax"),
    "clip": Column(transform="clip"),
    "quantile": Column(transform="quantile", missing_indicator=True),
    "ties": Column(transform="quantile"),
    "buckets": Column(transform="bucketize", buckets=7),
}
SCHEMA = Schema(label="y", numeric=tuple(COLUMNS), categorical=("c",), columns=COLUMNS, layout="table")


def frame(rows: int = ROWS, seed: int = 0) -> pl.DataFrame:
    draw = np.random.default_rng(seed)
    columns = {
        "standard": draw.normal(5e6, 2e5, rows),
        "minmax": draw.integers(-50, 900, rows).astype(float),
        "clip": draw.standard_cauchy(rows),
        "quantile": draw.lognormal(0, 3, rows),
        "ties": draw.integers(0, 5, rows).astype(float),
        "buckets": draw.gamma(0.5, 9, rows),
    }
    for name in ("standard", "quantile", "buckets"):
        columns[name][draw.random(rows) < 0.2] = np.nan
    return pl.DataFrame({"y": draw.integers(0, 2, rows), "c": draw.integers(0, 9, rows), **columns})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[pl.DataFrame, np.ndarray, PreparedData]:
    """The rows, which of them train, and what prepare makes of them."""
    folder, rows = tmp_path_factory.mktemp("learned"), frame()
    rows.write_parquet(folder / "a.parquet")
    data = prepare([folder / "a.parquet"], folder / "out", schema=SCHEMA, min_count=1)
    return rows, np.array(splits_of(0, 0, ROWS)), data


def arrays(data: PreparedData, splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dense and sparse arrays in the order of the raw rows."""
    [train] = data.days("train")
    dense = np.empty((len(splits), data.arrays(train).dense[:].shape[1]))
    sparse = np.empty((len(splits), data.arrays(train).sparse[:].shape[1]), np.int64)
    for split in ("train", "validation", "test"):
        [day] = data.days(split)
        dense[splits == split], sparse[splits == split] = data.arrays(day).dense[:], data.arrays(day).sparse[:]
    return dense, sparse


def test_scikit_learn_gives_the_same(prepared):
    rows, splits, data = prepared
    dense, sparse = arrays(data, splits)
    numbers = {name: rows[name].to_numpy()[:, None] for name in COLUMNS}
    train = {name: values[splits == "train"] for name, values in numbers.items()}
    mean = {name: np.nanmean(values) for name, values in train.items()}
    full = {name: np.where(np.isnan(values), mean[name], values) for name, values in numbers.items()}
    low, high = np.percentile(train["clip"], [1, 99])
    expected = {
        "standard": StandardScaler().fit(train["standard"]).transform(full["standard"]),
        "minmax": MinMaxScaler().fit(train["minmax"]).transform(full["minmax"]),
        "clip": (np.clip(full["clip"], low, high) - low) / (high - low),
    }
    for name in ("quantile", "ties"):
        peer = QuantileTransformer(n_quantiles=1001, subsample=None).fit(train[name])
        expected[name] = np.nan_to_num(peer.transform(numbers[name]), nan=0.5)
    assert data.schema.numeric == ("standard", "minmax", "clip", "quantile", "ties", "quantile_missing")
    for j, name in enumerate(expected):
        np.testing.assert_allclose(dense[:, j], expected[name][:, 0], rtol=1e-5, atol=1e-6, err_msg=name)
    assert dense[:, 5].tolist() == np.isnan(numbers["quantile"][:, 0]).tolist()
    assert data.schema.categorical == ("buckets", "c")
    given = ~np.isnan(train["buckets"][:, 0])
    peer = KBinsDiscretizer(7, encode="ordinal", strategy="quantile", quantile_method="linear", subsample=None)
    peer.fit(train["buckets"][given])
    buckets = peer.transform(full["buckets"])[:, 0]
    buckets[np.isnan(numbers["buckets"][:, 0])] = -1
    # One id for each bucket, and one for missing.
    assert len(set(zip(buckets, sparse[:, 0], strict=True))) == len(set(sparse[:, 0])) == 8


def test_the_manifest_and_the_encoder_keep_them(prepared, tmp_path):
    rows, splits, data = prepared
    kept = json.loads((data.folder / "manifest.json").read_text())["encoding"]["statistics"]
    train = rows.filter(pl.Series(splits == "train"))
    assert kept["standard"]["missing"] == int(train["standard"].is_nan().sum())
    assert kept["minmax"]["rows"] == len(train)
    assert (kept["minmax"]["minimum"], kept["minmax"]["maximum"]) == (train["minmax"].min(), train["minmax"].max())
    assert math.isclose(kept["minmax"]["std"], float(train["minmax"].std(ddof=0)), rel_tol=1e-12)
    assert len(kept["buckets"]["quantiles"]) == 8
    RowEncoder.save(data, tmp_path / "encoder")
    encoder = RowEncoder.open(tmp_path / "encoder")
    encoded = encoder.encode(rows.drop("y"))
    dense, sparse = arrays(data, splits)
    assert encoded.dense.tobytes() == dense.astype(np.float32).tobytes()
    assert encoded.sparse.tolist() == sparse.tolist()
    texts = encoder.texts(encoder.read(rows.drop("y")[:50]))
    assert [text[5] for text in texts] == [str(int(math.isnan(value))) for value in rows["quantile"][:50].to_list()]


def test_neither_pieces_nor_files_in_between_matter(prepared, tmp_path, monkeypatch):
    """Blocks of several sizes of pieces; with fewer drawn rows the quantiles are still the same ones."""
    rows, _, _ = prepared
    monkeypatch.setattr(learning, "BLOCK_ROWS", 300)
    monkeypatch.setattr(learning, "SAMPLE_ROWS", 500)
    for i in range(3):
        rows[i * 600 : (i + 1) * 600].write_parquet(tmp_path / f"{i}.parquet", row_group_size=70)
    found = []
    for name, piece in (("whole", 10_000), ("small", 64), ("odd", 171)):
        monkeypatch.setattr(module, "PIECE_SHARE", piece * BYTES_OF_A_ROW / PrepareOptions().memory_bytes)
        paths = [tmp_path / f"{i}.parquet" for i in range(3)]
        found.append(content(prepare(paths, tmp_path / name, schema=SCHEMA, min_count=1).folder))
    assert found[0] == found[1] == found[2]
    kept = json.loads(found[0]["manifest.json"])["encoding"]["statistics"]["quantile"]["quantiles"]
    assert kept[500] == pytest.approx(float(rows["quantile"][:1800].fill_nan(None).median()), rel=0.5)


def test_a_source_that_changed_changes_them_all(tmp_path):
    """Stopped after the first file is staged; then the second one changes, and with it the scale of the first."""
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for i, path in enumerate(paths):
        frame(300, i).write_parquet(path)
    with pytest.raises(StoppedError), stopping(lambda name, record: name == "stage_train_0" and record["finished"]):
        prepare(paths, tmp_path / "out", schema=SCHEMA, min_count=1)
    frame(400, 7).write_parquet(paths[1])
    data = prepare(paths, tmp_path / "out", schema=SCHEMA, min_count=1)
    assert content(data.folder) == content(prepare(paths, tmp_path / "fresh", schema=SCHEMA, min_count=1).folder)


def test_a_vocabulary_brings_its_statistics(prepared, tmp_path):
    _, _, data = prepared
    frame(50, 3).write_parquet(tmp_path / "new.parquet")
    more = prepare([], tmp_path / "more", test=[tmp_path / "new.parquet"], schema=SCHEMA, vocabulary=data.folder)
    RowEncoder.save(data, tmp_path / "encoder")
    [day] = more.days("test")
    encoded = RowEncoder.open(tmp_path / "encoder").encode(frame(50, 3))
    assert more.arrays(day).dense[:].tobytes() == encoded.dense.tobytes()
    other = replace(SCHEMA, columns=COLUMNS | {"buckets": Column(transform="bucketize", buckets=8)})
    with pytest.raises(UserError, match=r"numeric column 'buckets' was prepared with other buckets; choose the same"):
        prepare([], tmp_path / "no", test=[tmp_path / "new.parquet"], schema=other, vocabulary=data.folder)


@pytest.mark.parametrize("transform", numeric.LEARNED)
def test_columns_without_a_spread(tmp_path, transform):
    """A constant, and a column without training values, leave finite numbers for whatever comes."""
    columns = {name: Column(transform=transform) for name in ("constant", "nothing")}
    schema = Schema(label="y", numeric=tuple(columns), categorical=("c",), columns=columns, layout="table")
    rows = {
        "y": [0, 1] * 10,
        "c": [1] * 20,
        "constant": [0.1] * 20,
        "nothing": pl.Series([None] * 20, dtype=pl.Float64),
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    data = prepare([tmp_path / "a.parquet"], tmp_path / "out", schema=schema, split="none")
    RowEncoder.save(data, tmp_path / "encoder")
    new = [{"constant": value, "nothing": value, "c": 1} for value in (0.1, None, 3e38, -3e38)]
    dense = RowEncoder.open(tmp_path / "encoder").encode(new).dense
    assert np.isfinite(dense).all()
    assert dense[:2, 0].tolist() == ([0, 0.5] if transform == "quantile" else [0, 0])


def test_errors_of_the_schema(tmp_path):
    frame(20).write_parquet(tmp_path / "a.parquet")

    def failing(match, columns, **options):
        schema = Schema(label="y", numeric=("minmax", "ties"), categorical=("c",), columns=columns, layout="table")
        with pytest.raises(UserError, match=match):
            prepare([tmp_path / "a.parquet"], tmp_path / "out", schema=schema, **options)

    failing('buckets: the transform is none; set transform = "bucketize"', {"ties": Column(buckets=3)})
    indicator = Column(transform="bucketize", missing_indicator=True)
    failing("missing_indicator: not valid with the transform bucketize; remove it", {"ties": indicator})
    with pytest.raises(
        UserError, match=r"^schema: columns.ties.buckets: 1 is not a valid count; give a whole number from 2"
    ):
        Schema.from_json({"label": "y", "numeric": ["ties"], "categorical": ["c"], "columns": {"ties": {"buckets": 1}}})
    schema = Schema(
        label="y",
        numeric=("a", "a_missing"),
        categorical=("c",),
        columns={"a": Column(missing_indicator=True)},
        layout="table",
    )
    with pytest.raises(UserError, match="its column would be 'a_missing', which is a column already"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", schema=schema)
    with pytest.raises(UserError, match="column 'standard' has the transform standard, which is learned from training"):
        prepare([], tmp_path / "out", test=[tmp_path / "a.parquet"], schema=SCHEMA, hash=True)

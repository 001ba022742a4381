"""Every id, value and split of a prepared folder against plain Python over the raw text."""

import gzip
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.data.raw_oracle import SMALL, parse, random_text, splits_of, vocabularies
from torchrec_deepfm.data.dataset.prepared import SPLITS, PreparedData
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import CRITEO_KAGGLE

SAMPLE = Path("../shared/data/criteo/dac_sample_12000.tsv")


def expected(texts, schema, *, validation=None, test=None, seed=0, way="8:1:1"):
    """The rows of every stem, in order."""
    stems = {}
    for i, text in enumerate(texts):
        rows = parse(text, schema)
        splits = splits_of(seed, i, len(rows), way) if validation is None else ["train"] * len(rows)
        for split, content in zip(splits, rows, strict=True):
            stems.setdefault(f"day_{i}" if split == "train" else f"{split}_{i}", []).append(content)
    for split, held_out in (("validation", validation or []), ("test", test or [])):
        stems |= {f"{split}_{i}": parse(text, schema) for i, text in enumerate(held_out)}
    return stems


def check(data: PreparedData, stems, *, min_count=None, buckets=None):
    """Compare all arrays, counts and the vocabulary of a folder with the oracle's rows."""
    schema = data.schema
    train = [row for stem, rows in stems.items() if stem.startswith("day_") for row in rows]
    if buckets is None:
        tables = vocabularies(train, schema, min_count)
        sizes = [1 + len(table) for table in tables]

        def encoded(j, value):
            return tables[j].get(value, (0, 0))[0]

        for j, table in enumerate(tables):
            found = duckdb.execute("FROM read_parquet(?)", [str(data.folder / f"vocabulary_{j}.parquet")]).fetchall()
            assert found == [(value, number, count) for value, (number, count) in table.items()]
    else:
        sizes = [buckets] * len(schema.categorical)

        def encoded(j, value):
            return 0 if value is None else 1 + value % (buckets - 1)

        assert not list(data.folder.glob("vocabulary*"))

    assert dict(data.num_embeddings) == dict(zip(schema.categorical, sizes, strict=True))
    for split in SPLITS:
        named = [stem for stem in stems if stem.startswith("day_" if split == "train" else split)]
        assert [day.stem for day in data.splits[split]] == sorted(named, key=lambda stem: int(stem.split("_")[1]))
    for split in SPLITS:
        for day in data.days(split):
            rows = stems[day.stem]
            dense, sparse, labels = (getattr(data.arrays(day), name)[:] for name in ("dense", "sparse", "labels"))
            assert (dense.dtype, sparse.dtype, labels.dtype) == (np.float32, np.int32, np.int32)
            assert (day.rows, day.positives) == (len(rows), sum(label for label, _, _ in rows))
            assert labels.tolist() == [[label] for label, _, _ in rows]
            assert sparse.tolist() == [[encoded(j, value) for j, value in enumerate(row)] for _, _, row in rows]
            # The last bit of a logarithm may differ between two libraries.
            np.testing.assert_array_max_ulp(
                dense, np.array([row for _, row, _ in rows], np.float32).reshape(dense.shape)
            )


def small_pieces(monkeypatch, piece_bytes=2000, block_rows=50):
    monkeypatch.setattr(module, "PIECE_SHARE", piece_bytes / PrepareOptions().memory_bytes)
    monkeypatch.setattr(module, "_ROW_BYTES", 1)
    monkeypatch.setattr(module, "BLOCK_SHARE", 4 * 3 * block_rows / PrepareOptions().memory_bytes)


def write(folder: Path, **texts: bytes) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.tsv" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_bytes(text)
    return paths


def test_two_days_split_by_themselves(tmp_path):
    texts = {"a": random_text(700, 1), "b": random_text(300, 2)}
    data = prepare(write(tmp_path, **texts), tmp_path / "out", min_count=3, seed=5)
    check(data, expected(texts.values(), CRITEO_KAGGLE, seed=5), min_count=3)
    assert sum(data.rows(split) for split in SPLITS) == 1000
    assert 700 < data.rows("train") < 900
    assert data.made["split"] == "8:1:1"


def test_days_and_holdout_files_in_small_pieces(tmp_path, monkeypatch):
    small_pieces(monkeypatch)  # several pieces a file, the last one short
    texts = {name: random_text(150, seed, SMALL) for seed, name in enumerate("abvt")}
    a, b, v, t = write(tmp_path, **texts)
    data = prepare([a, b], tmp_path / "out", validation=[v], test=[t], schema=SMALL, min_count=2)
    stems = expected([texts["a"], texts["b"]], SMALL, validation=[texts["v"]], test=[texts["t"]])
    check(data, stems, min_count=2)
    [source] = data.made["sources"]["validation"]
    assert source == {
        "name": "v.tsv",
        "bytes": len(texts["v"]),
        "digest": xxhash.xxh3_128(texts["v"]).hexdigest(),
    }


def test_several_holdout_files_follow_one_another(tmp_path):
    texts = {name: random_text(20, seed, SMALL) for seed, name in enumerate("avwt")}
    a, v, w, t = write(tmp_path, **texts)
    data = prepare([a], tmp_path / "out", validation=[v, w], test=[t], schema=SMALL, min_count=1)
    check(data, expected([texts["a"]], SMALL, validation=[texts["v"], texts["w"]], test=[texts["t"]]), min_count=1)


def test_hashing(tmp_path):
    text = random_text(400, 3)
    data = prepare(write(tmp_path, a=text), tmp_path / "out", hash=True, num_embeddings=50)
    check(data, expected([text], CRITEO_KAGGLE), buckets=50)


def test_real_criteo_rows(tmp_path):
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not here (its licence forbids a copy in the repository)")
    data = prepare([SAMPLE], tmp_path / "out")
    check(data, expected([SAMPLE.read_bytes()], CRITEO_KAGGLE), min_count=10)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_text_gives_the_same_arrays_as_plain_text(tmp_path, monkeypatch, ending):
    small_pieces(monkeypatch, piece_bytes=10_000)
    text = random_text(300, 4)
    (plain,) = write(tmp_path, a=text)
    packed = tmp_path / f"a.tsv.{ending}"
    # Two members or frames one after the other, as parallel compressors write them.
    pack = gzip.compress if ending == "gz" else pa.Codec("zstd").compress
    packed.write_bytes(bytes(pack(text[:5000])) + bytes(pack(text[5000:])))
    one, two = prepare([plain], tmp_path / "one"), prepare([packed], tmp_path / "two")
    for path in one.folder.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (two.folder / path.name).read_bytes(), path.name


def test_same_command_same_bytes_other_seed_other_split(tmp_path):
    paths = write(tmp_path, a=random_text(300, 5))
    folders = [
        prepare(paths, tmp_path / name, seed=seed).folder for name, seed in (("one", 0), ("two", 0), ("three", 1))
    ]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert files[0]["test_0_sparse.npy"] != files[2]["test_0_sparse.npy"]


def test_ties_go_by_value_with_missing_first(tmp_path):
    # ff: 3 times; missing, 2 and 10 (hex 0a): twice each; 7: once.
    values = ["0A", "ff", "2", "", "ff", "7", "02", "0000000a", "", "FF"]
    text = "".join(f"1\t\t\t{value}\t1\t1\n" for value in values).encode()
    a, v, t = write(tmp_path, a=text, v=text[:-1], t=b"0\t\t\t99\t1\t1\n")
    data = prepare([a], tmp_path / "out", validation=[v], test=[t], schema=SMALL, min_count=2)
    assert data.num_embeddings["c1"] == 5
    ids = {"ff": 1, "": 2, "2": 3, "a": 4, "7": 0}
    wanted = [ids[value.lower().lstrip("0")] for value in values]
    assert data.arrays(data.days("train")[0]).sparse[:, 0].tolist() == wanted
    assert data.arrays(data.days("validation")[0]).sparse[:, 0].tolist() == wanted
    assert data.arrays(data.days("test")[0]).sparse[:, 0].tolist() == [0]  # unseen


def test_a_file_name_is_not_a_pattern(tmp_path):
    text = random_text(100, 6, SMALL)
    folder = tmp_path / "it's [a-z]* ?"
    (path,) = write(folder, **{"day[0]*": text})
    data = prepare([path], folder / "out", schema=SMALL, min_count=1)
    check(data, expected([text], SMALL), min_count=1)


def test_no_numeric_columns(tmp_path):
    schema = type(SMALL)(label="y", numeric=(), categorical=("c",))
    text = random_text(100, 7, schema)
    data = prepare(write(tmp_path, a=text), tmp_path / "out", schema=schema, min_count=1)
    check(data, expected([text], schema), min_count=1)


_number = st.one_of(st.just(""), st.integers(-5, 50).map(str), st.integers(-(10**30), 10**30).map(str))
_category = st.one_of(
    st.just(""),
    st.integers(0, 20).map("{:08x}".format),
    st.integers(0, 2**32 - 1).map("{:08X}".format),
    st.integers(0, 255).map("{:x}".format),
)
_row = st.tuples(st.sampled_from("01"), _number, _number, _category, _category, _category).map("\t".join)
_text = st.builds(
    lambda lines, end: "".join(row + ending for row, ending in lines).encode() + end,
    st.lists(st.tuples(_row, st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\r\n"])), max_size=30),
    _row.map(str.encode),  # no final newline
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(train=_text, validation=_text, test=_text, min_count=st.integers(1, 3), buckets=st.sampled_from([None, 2, 7]))
def test_any_rows(tmp_path_factory, train, validation, test, min_count, buckets):
    folder = tmp_path_factory.mktemp("any")
    a, v, t = write(folder, a=train, v=validation, t=test)
    options = {"min_count": min_count} if buckets is None else {"hash": True, "num_embeddings": buckets}
    data = prepare([a], folder / "out", validation=[v], test=[t], schema=SMALL, **options)
    check(data, expected([train], SMALL, validation=[validation], test=[test]), min_count=min_count, buckets=buckets)


def test_known_optimum_is_passed_on(tmp_path):
    a, v, t = write(tmp_path, **{name: random_text(20, seed, SMALL) for seed, name in enumerate("avt")})
    best = {"rows": 20, "positives": 5, "auc": 0.8, "logloss": 0.4}
    truth = {"format_version": 1, "seed": 0, "files": {"a.tsv": best, "v.tsv": {**best, "auc": 0.75}, "t.tsv": best}}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    data = prepare([a], tmp_path / "out", validation=[v], test=[t], schema=SMALL)
    assert data.optimum == {"validation": {"auc": 0.75, "logloss": 0.4}, "test": {"auc": 0.8, "logloss": 0.4}}
    # A split of one's own mixes rows: no entry is true of it.
    assert prepare([v], tmp_path / "own", schema=SMALL).optimum == {}
    (tmp_path / "more").mkdir()
    (extra,) = write(tmp_path / "more", x=random_text(20, 9, SMALL))
    both = prepare([a], tmp_path / "both", validation=[v, extra], test=[t], schema=SMALL)
    assert set(both.optimum) == {"test"}


def test_progress_lines(tmp_path):
    lines = []
    paths = write(tmp_path, a=random_text(100, 8, SMALL))
    prepare(paths, tmp_path / "out", schema=SMALL, report=lines.append)
    assert lines[0] == f"read {paths[0]}: 100 rows"
    assert all("\n" not in line for line in lines)

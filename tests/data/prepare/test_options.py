"""What the options of prepare do, each against plain Python, or against TorchRec's own scripts."""

import dataclasses
import json
import math
import re

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.datasets.criteo import BinaryCriteoUtils, InMemoryBinaryCriteoIterDataPipe

from tests.data.prepare.test_prepare import check, expected, small_pieces, write
from tests.support.data.raw_oracle import SMALL, float32, parse, random_text
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.data.criteo_defaults import MLPERF_NUM_EMBEDDINGS
from torchrec_deepfm.data.dataset.prepared import SPLITS, PreparedData
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import CRITEO_KAGGLE, CRITEO_X4, Schema
from torchrec_deepfm.errors import UserError


def raw_rows(text: bytes):
    """(label, integers or None, categories or None) of every line."""
    rows = []
    for line in text.decode().splitlines():
        label, *fields = line.split("\t")
        rows.append(
            (
                int(label),
                [int(field) if field else None for field in fields[:13]],
                [int(field, 16) if field else None for field in fields[13:]],
            )
        )
    return rows


def test_log_equals_torchrec_bit_for_bit(tmp_path, monkeypatch):
    small_pieces(monkeypatch, piece_bytes=20_000)
    texts = {"a": random_text(400, 1), "b": random_text(300, 2).replace(b"\t-2\t", b"\t-77\t")}
    paths = write(tmp_path, **texts)
    data = prepare(paths, tmp_path / "out", hash=True, num_embeddings=100, numeric_transform="log", split="none")
    for i, path in enumerate(paths):
        names = [str(tmp_path / f"{part}.npy") for part in ("dense", "sparse", "labels")]
        BinaryCriteoUtils.tsv_to_npys(str(path), *names)
        arrays = data.arrays(data.days("train")[i])
        dense, labels = np.load(names[0]), np.load(names[2])
        assert arrays.dense[:].tobytes() == dense.tobytes()
        assert arrays.labels[:].tobytes() == labels.tobytes()
        assert arrays.labels.shape == labels.shape


def test_log_takes_integers_of_32_bits(tmp_path):
    (path,) = write(tmp_path, a=b"1\t3000000000\t\tab\t\t\n" * 20)
    with pytest.raises(UserError, match=r"a.tsv: line 1, column n1: '3000000000' is not an integer of 32 bits"):
        prepare([path], tmp_path / "out", schema=SMALL, numeric_transform="log", split="none")
    assert list(tmp_path.iterdir()) == [path]


def bucket(number: int | None) -> int | None:
    """The winning rule of the Kaggle contest, as FuxiCTR's code has it too."""
    return number if number is None or number <= 2 else math.floor(math.log(number) ** 2)


@pytest.mark.parametrize("mode", ["vocabulary", "hash"])
def test_bucketize(tmp_path, mode):
    text = random_text(500, 3) + b"1" + b"\t3" * 13 + b"\tab" * 26 + b"\n0" + b"\t2" * 13 + b"\t1" * 26 + b"\n"
    options = {"min_count": 2} if mode == "vocabulary" else {"hash": True, "num_embeddings": 1000}
    data = prepare(write(tmp_path, a=text), tmp_path / "out", numeric_transform="bucketize", split="none", **options)
    assert data.schema.numeric == ()
    assert data.schema.categorical == CRITEO_KAGGLE.numeric + CRITEO_KAGGLE.categorical
    arrays = data.arrays(data.days("train")[0])
    assert arrays.dense.shape == (502, 0)
    for j in range(39):
        values = [[*map(bucket, integers), *categories][j] for _, integers, categories in raw_rows(text)]
        if mode == "hash":
            wanted = [0 if value is None else 1 + value % 999 for value in values]
        else:
            kept = sorted(
                {v for v in values if values.count(v) >= 2},
                key=lambda v: (-values.count(v), v is not None, 0 if v is None else v),
            )
            wanted = [kept.index(value) + 1 if value in kept else 0 for value in values]
            table = duckdb.execute("FROM read_parquet(?)", [str(data.folder / f"vocabulary_{j}.parquet")]).fetchall()
            assert table == [(value, i, values.count(value)) for i, value in enumerate(kept, 1)]
        assert arrays.sparse[:, j].tolist() == wanted


def fuxictr_word(cell: str) -> int | None:
    """What FuxiCTR's Criteo processor makes of a number with ``fill_na: 0``, where 0 is not in the vocabulary."""
    number = float(cell) if cell else 0.0
    word = math.floor(math.log(number) ** 2) if number > 2 else int(number)
    return word or None


@pytest.mark.parametrize("mode", ["vocabulary", "hash"])
def test_the_benchmark_layout_criteo_x4(tmp_path, mode):
    """Missing numbers, 0 and rare values share id 0, missing categories too; the label's name and the rest are x4's."""
    edges = ["", "0", "-1", "-3", "1", "2", "3", "4", "5", "2000000000", "0.0", "-0.9", "2.5", "1.9"]
    rows = [
        [
            str(i % 2),
            *(edges[(i * (j + 1)) % len(edges)] for j in range(13)),
            *("" if i % 3 else "0a" for _ in range(26)),
        ]
        for i in range(280)
    ]
    head = ["Label", *CRITEO_KAGGLE.numeric, *CRITEO_KAGGLE.categorical]
    path = tmp_path / "train.csv"
    path.write_text("".join(f"{','.join(row)}\n" for row in [head, *rows]))
    options = {"min_count": 21} if mode == "vocabulary" else {"hash": True, "num_embeddings": 1000}
    data = prepare([path], tmp_path / "out", schema=CRITEO_X4, split="none", **options)
    assert data.schema.missing == "rare"
    sparse = data.arrays(data.days("train")[0]).sparse
    for j in range(39):
        cells = [row[1 + j] for row in rows]
        words = [fuxictr_word(cell) if j < 13 else cell or None for cell in cells]
        if mode == "hash":
            if j < 13:
                assert sparse[:, j].tolist() == [0 if word is None else 1 + word % 999 for word in words]
            assert [i for i, word in zip(sparse[:, j].tolist(), words, strict=True) if word is None and i != 0] == []
            continue
        kept = sorted({w for w in words if w is not None and words.count(w) >= 21}, key=lambda w: (-words.count(w), w))
        assert sparse[:, j].tolist() == [kept.index(word) + 1 if word in kept else 0 for word in words]
        assert data.num_embeddings[data.schema.categorical[j]] == 1 + len(kept)


def test_a_vocabulary_knows_what_missing_was(tmp_path):
    path, *_ = write(tmp_path, a=random_text(60, 9, SMALL))
    rare = dataclasses.replace(SMALL, missing="rare")
    data = prepare([path], tmp_path / "out", schema=rare, min_count=1, split="none")
    assert Schema.from_json(data.schema.to_json()) == data.schema
    again = prepare([path], tmp_path / "again", schema=rare, vocabulary=data.folder, split="none")
    assert (again.arrays(again.days("train")[0]).sparse[:] == data.arrays(data.days("train")[0]).sparse[:]).all()
    with pytest.raises(UserError, match="was prepared with --missing rare, now it is value; choose the same --missing"):
        prepare([path], tmp_path / "other", schema=SMALL, vocabulary=data.folder, split="none")


def test_missing_by_the_command_line(tmp_path):
    """Over the schema's word, and over its default."""
    path, *_ = write(tmp_path, a=b"1\t\t\t\n0\t\t\t5\n" * 20)
    (tmp_path / "s.toml").write_text(
        'layout = "criteo"\nmissing = "rare"\nlabel = "y"\nnumeric = ["n"]\ncategorical = ["c1", "c2"]\n'
    )
    for said, ids in (([], [[0, 0], [0, 1]]), (["--missing", "value"], [[1, 1], [1, 2]])):
        out = tmp_path / f"out{len(said)}"
        words = ["--schema", str(tmp_path / "s.toml"), "--split", "none", *said]
        cli.main(["prepare", "--input", str(path), "--output", str(out), *words])
        data = PreparedData.open(out)
        assert data.arrays(data.days("train")[0]).sparse[:2].tolist() == ids


def test_what_does_not_go_with_hashing(tmp_path, capsys):
    [path] = write(tmp_path, a=b"1" + b"\t3" * 39 + b"\n")
    words = ["prepare", "--input", str(path), "--output", str(tmp_path / "out"), "--split", "none", "--hash"]
    for option, value, reason in (
        ("--missing", "value", "--missing value: hashing gives a missing category id 0; leave --hash or --missing out"),
        ("--min-count", "10", "--min-count: hashing counts nothing; leave --hash or --min-count out"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, option, value])
        assert capsys.readouterr().err == f"error: {reason}\n"
    cli.main([*words, "--schema", "criteo-kaggle", "--missing", "rare"])  # as hashing has it anyhow
    assert PreparedData.open(tmp_path / "out").rows("train") == 1


def test_numbers_as_they_are(tmp_path):
    text = random_text(100, 4)
    data = prepare(write(tmp_path, a=text), tmp_path / "out", numeric_transform="none", split="none")
    wanted = [[float32(number or 0) for number in integers] for _, integers, _ in raw_rows(text)]
    assert data.arrays(data.days("train")[0]).dense[:].tolist() == wanted


def test_nine_to_one(tmp_path):
    text = random_text(600, 5, SMALL)
    data = prepare(write(tmp_path, a=text), tmp_path / "out", schema=SMALL, min_count=2, split="9:1", seed=3)
    check(data, expected([text], SMALL, seed=3, way="9:1"), min_count=2)
    assert data.days("validation") == ()
    assert 500 < data.rows("train") < 600


def test_last_day_is_halved_as_torchrec_halves_it(tmp_path):
    texts = {f"day_{i}": random_text(rows, i) for i, rows in enumerate((60, 50, 41))}
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    data = prepare([folder], tmp_path / "out", split="last-day", min_count=1, numeric_transform="log1p")
    assert [day.stem for day in data.days("train")] == ["day_0", "day_1"]
    assert [(day.stem, day.start, day.rows) for split in SPLITS[1:] for day in data.days(split)] == [
        ("day_2", 0, 21),
        ("day_2", 21, 20),
    ]
    last = [label for label, _, _ in parse(texts["day_2"], CRITEO_KAGGLE)]
    assert [day.positives for split in SPLITS[1:] for day in data.days(split)] == [sum(last[:21]), sum(last[21:])]
    for stage, split in (("val", "validation"), ("test", "test")):
        paths = [[str(data.folder / f"day_2_{part}.npy")] for part in ("dense", "sparse", "labels")]
        pipe = InMemoryBinaryCriteoIterDataPipe(stage, *paths, batch_size=1000, rank=0, world_size=1)
        (batch,) = list(pipe)
        (day,) = data.days(split)
        rows = slice(day.start, day.start + day.rows)
        arrays = data.arrays(day)
        assert batch.labels.tolist() == arrays.labels[rows][:, 0].tolist()
        assert batch.dense_features.numpy().tobytes() == arrays.dense[rows].tobytes()
        assert batch.sparse_features.values().reshape(26, -1).T.tolist() == arrays.sparse[rows].tolist()
    # The vocabulary was counted on the days that train, and on no half of the last one.
    train = [row for name in ("day_0", "day_1") for row in parse(texts[name], CRITEO_KAGGLE)]
    assert data.num_embeddings["C1"] == 1 + len({row[2][0] for row in train})


def test_days_go_by_their_numbers(tmp_path):
    for number in (2, 10, 9, 11, 3, 4, 5, 6, 7, 8):
        (tmp_path / f"day_{number}").write_bytes(b"1\t%d\t\tab\t\t\n" % number)
    paths = sorted(tmp_path.iterdir())  # day_10 comes before day_2
    data = prepare(paths, tmp_path / "out", schema=SMALL, split="none", numeric_transform="none")
    assert [day.stem for day in data.days("train")] == [f"day_{i}" for i in range(2, 12)]
    assert [data.arrays(day).dense[0, 0] for day in data.days("train")] == list(range(2, 12))


def test_no_row_is_in_two_splits(tmp_path):
    # The number names the row.
    schema = Schema(label="y", numeric=("row",), categorical=("c",))
    text = b"".join(b"1\t%d\tab\n" % row for row in range(3000))
    for split in ("8:1:1", "9:1"):
        data = prepare(write(tmp_path, a=text), tmp_path / split, schema=schema, split=split, numeric_transform="none")
        seen = [
            row
            for part in SPLITS
            for day in data.days(part)
            for row in data.arrays(day).dense[:, 0].astype(int).tolist()
        ]
        assert sorted(seen) == list(range(3000))


def test_a_vocabulary_is_reapplied_to_new_days(tmp_path):
    old, new = random_text(300, 6, SMALL), random_text(200, 7, SMALL)
    a, b = write(tmp_path, a=old, b=new)
    first = prepare([a], tmp_path / "first", schema=SMALL, min_count=3, split="none")
    second = prepare([], tmp_path / "second", test=[b], schema=SMALL, vocabulary=first.folder)
    assert dict(second.num_embeddings) == dict(first.num_embeddings)
    assert (second.days("train"), second.days("validation")) == ((), ())
    tables = [
        dict(duckdb.execute("SELECT value, id FROM read_parquet(?)", [str(path)]).fetchall())
        for path in sorted(first.folder.glob("vocabulary_*"))
    ]
    wanted = [[tables[j].get(value, 0) for j, value in enumerate(row[2])] for row in parse(new, SMALL)]
    assert second.arrays(second.days("test")[0]).sparse[:].tolist() == wanted
    assert any(0 in row for row in wanted)

    other = Schema(label="y", numeric=("n1", "n2"), categorical=("c1", "x", "c3"))
    with pytest.raises(UserError, match="column 'x' is in one of them only"):
        prepare([], tmp_path / "third", test=[b], schema=other, vocabulary=first.folder)
    hashed = prepare([a], tmp_path / "hashed", schema=SMALL, hash=True, num_embeddings=10).folder
    with pytest.raises(UserError, match=re.escape("name a folder that was prepared without --hash")):
        prepare([], tmp_path / "third", test=[b], schema=SMALL, vocabulary=hashed)
    with pytest.raises(UserError, match=r"numeric column 'n1' was prepared with log1p, now it is none"):
        prepare([], tmp_path / "third", test=[b], schema=SMALL, vocabulary=first.folder, numeric_transform="none")
    damaged = first.folder / "vocabulary_1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"x" + damaged.read_bytes()[-8:])
    with pytest.raises(UserError, match=r"vocabulary_1.parquet: the file is damaged"):
        prepare([], tmp_path / "third", test=[b], schema=SMALL, vocabulary=first.folder)
    assert not (tmp_path / "third").exists()


def test_hash_sizes_of_each_column(tmp_path):
    text = random_text(100, 8, SMALL)
    data = prepare(
        write(tmp_path, a=text), tmp_path / "out", schema=SMALL, hash=True, num_embeddings=[10, 20, 30], split="none"
    )
    assert dict(data.num_embeddings) == {"c1": 10, "c2": 20, "c3": 30}
    wanted = [
        [0 if value is None else 1 + value % (size - 1) for value, size in zip(row[2], (10, 20, 30), strict=True)]
        for row in parse(text, SMALL)
    ]
    assert data.arrays(data.days("train")[0]).sparse[:].tolist() == wanted


def test_bucketized_columns_have_ids_of_their_own_number(tmp_path):
    path, *_ = write(tmp_path, a=random_text(50, 9))
    options = {"hash": True, "numeric_transform": "bucketize", "split": "none"}
    data = prepare([path], tmp_path / "out", num_embeddings=MLPERF_NUM_EMBEDDINGS, **options)
    assert list(data.num_embeddings.values()) == [1000] * 13 + list(MLPERF_NUM_EMBEDDINGS)
    assert list(prepare([path], tmp_path / "one", num_embeddings=77, **options).num_embeddings.values()) == [77] * 39
    found = prepare([path], tmp_path / "none", **options).num_embeddings.values()
    assert list(found) == [1000] * 13 + [40_000_000] * 26


def test_a_number_beyond_float32(tmp_path):
    paths = write(tmp_path, a=b"1\t5\t" + b"9" * 60 + b"\tab\t\t\n")
    with pytest.raises(UserError, match=r"a.tsv: line 1, column n2: '9+...' is beyond the range of float32"):
        prepare(paths, tmp_path / "out", schema=SMALL, numeric_transform="none", split="none")
    assert prepare(paths, tmp_path / "out", schema=SMALL, min_count=1, split="none").rows("train") == 1


@pytest.mark.parametrize("name", ["id=5", "value=7", "c0=3", "row=1", "count=2"])
def test_a_folder_that_looks_like_a_column(tmp_path, name):
    paths = write(tmp_path, a=random_text(200, 1, SMALL))
    plain = prepare(paths, tmp_path / "out", schema=SMALL, min_count=2).folder
    odd = prepare(paths, tmp_path / name / "out", schema=SMALL, min_count=2).folder
    assert {p.name: p.read_bytes() for p in plain.iterdir()} == {p.name: p.read_bytes() for p in odd.iterdir()}


def test_forty_million_ids_are_the_default_of_hashing(tmp_path):
    data = prepare(write(tmp_path, a=random_text(50, 9, SMALL)), tmp_path / "out", schema=SMALL, hash=True)
    assert set(data.num_embeddings.values()) == {40_000_000}


_GOOD = re.compile(rb"[01](\t(-?[0-9]+)?){2}(\t([0-9a-fA-F]{1,8})?){3}")


def good(line: bytes) -> bool:
    return bool(_GOOD.fullmatch(line)) and all(abs(float(field or 0)) != math.inf for field in line.split(b"\t")[1:3])


_field = st.sampled_from([b"", b"0", b"1", b"-3", b"ab", b"0000000F", b"7" * 40, b"9" * 320, b"0" * 500 + b"8"])
_odd = st.sampled_from(
    [
        b"+1",
        b" 5",
        b"1e3",
        b"1.5",
        b"0x1f",
        b"123456789",
        b"-",
        b"--1",
        b"\xff",
        "é".encode(),
        b'"',
        b"a\x00",
        b"01",
        b"2",
    ]
)
_line = st.one_of(
    st.tuples(st.sampled_from([b"0", b"1"]), _field, _field, _field, _field, _field).map(b"\t".join),
    st.lists(st.one_of(_field, _odd), min_size=1, max_size=8).map(b"\t".join),
    st.just(b""),
)
_endings = st.sampled_from([b"\n", b"\r\n"])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines=st.lists(st.tuples(_line, _endings), min_size=1, max_size=60), piece=st.sampled_from([3000, 100_000]))
def test_bad_rows_are_skipped_and_listed(tmp_path_factory, lines, piece):
    folder = tmp_path_factory.mktemp("skip")
    always = b"1\t5\t-2\tab\t\t0000000F\n"  # longer than what decides the kind of the file
    text = always + b"".join(line + ending for line, ending in lines)
    (path,) = write(folder, a=text)
    numbered = [(2 + i, line) for i, (line, _) in enumerate(lines) if line]
    bad = [number for number, line in numbered if not good(line)]
    rows = parse(always + b"\n".join(line for _, line in numbered if good(line)), SMALL)

    patch = pytest.MonkeyPatch()
    small_pieces(patch, piece_bytes=piece)
    try:
        data = prepare([path], folder / "out", schema=SMALL, min_count=1, split="none", on_bad_row="skip")
        if bad:
            with pytest.raises(UserError, match=rf"line {bad[0]}[ ,]"):
                prepare([path], folder / "strict", schema=SMALL, min_count=1, split="none")
    finally:
        patch.undo()
    check(data, {"day_0": rows}, min_count=1)
    skipped = json.loads((data.folder / "manifest.json").read_text())["skipped"]
    assert [(entry["name"], entry["rows"]) for entry in skipped] == ([("a.tsv", len(bad))] if bad else [])
    assert [entry["line"] for entry in (skipped[0]["first"] if skipped else [])] == bad


def test_many_bad_rows_are_counted_and_the_first_listed(tmp_path):
    (path,) = write(tmp_path, a=b"1\t5\t-2\tab\t\t0F\n" + b"x\n" * 1500)
    lines = []
    data = prepare([path], tmp_path / "out", schema=SMALL, split="none", on_bad_row="skip", report=lines.append)
    (skipped,) = json.loads((data.folder / "manifest.json").read_text())["skipped"]
    assert (skipped["rows"], len(skipped["first"])) == (1500, 1000)
    assert skipped["first"][0] == {
        "line": 2,
        "reason": "has 1 columns, expected 6 (label, 2 numbers, 3 categories, tab separated)",
    }
    assert lines[0] == f"read {path}: 1 rows, 1,500 bad ones skipped"


def test_a_line_longer_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_SHARE", 100 / PrepareOptions().memory_bytes)
    (path,) = write(tmp_path, a=b"1\t" + b"0" * 200 + b"\t\t\t\t\n")
    with pytest.raises(UserError, match="a line is longer than 100 bytes"):
        prepare([path], tmp_path / "out", schema=SMALL, split="none")

"""Tables of many small files: they share arrays, and hold what one file with the same rows would."""

import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest

from tests.data.prepare.test_prepare import small_pieces
from tests.support.data.folders import make
from tests.support.data.stopped_prepare import content, stop_at_each_record
from tests.support.data.tables import parquet, text_file
from torchrec_deepfm.data.dataset import npy_mmap
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.sources import inputs
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError

SCHEMA = Schema(
    label="y",
    numeric=("n",),
    categorical=("c", "b"),
    columns={"b": Column(list=True, separator="|")},
    layout="table",
)


def rows_of(file: int) -> list[dict]:
    draw = random.Random(file)
    return [
        {
            "y": draw.randrange(2),
            "n": draw.randrange(100),
            "c": f"v{draw.randrange(9)}",
            "b": "|".join(f"t{draw.randrange(5)}" for _ in range(draw.randrange(3))) or None,
        }
        for _ in range(draw.randrange(1, 12))
    ]


def write_files(folder: Path, count: int) -> list[Path]:
    """Small files; the numbers of every third one are floats, of every fifth one 32-bit integers."""
    folder.mkdir()
    paths = []
    for file in range(count):
        kind = pa.float64() if file % 3 == 0 else pa.int32() if file % 5 == 0 else pa.int64()
        fields = [("y", pa.int64()), ("n", kind), ("c", pa.string()), ("b", pa.string())]
        table = pa.Table.from_pylist(rows_of(file), pa.schema(fields))
        paths.append(parquet(folder / f"part-{file:03d}.parquet", table))
    return paths


def write_one(path: Path, count: int) -> Path:
    fields = [("y", pa.int64()), ("n", pa.float64()), ("c", pa.string()), ("b", pa.string())]
    rows = [row for file in range(count) for row in rows_of(file)]
    return parquet(path, pa.Table.from_pylist(rows, pa.schema(fields)))


@pytest.mark.parametrize("options", [{"min_count": 2}, {"hash": True, "num_embeddings": 50}])
@pytest.mark.parametrize("split", ["none", "8:1:1"])
def test_many_files_are_one(tmp_path, monkeypatch, options, split):
    small_pieces(monkeypatch, piece_bytes=256 * 40)  # pieces of 40 rows
    write_files(tmp_path / "many", 60)
    lines = []
    many = prepare([tmp_path / "many"], tmp_path / "a", schema=SCHEMA, split=split, report=lines.append, **options)
    one = prepare([write_one(tmp_path / "one.parquet", 60)], tmp_path / "b", schema=SCHEMA, split=split, **options)
    assert sum(line.startswith("read ") for line in lines) == 1
    assert f"read 60 files, {tmp_path / 'many'}/part-000.parquet to {tmp_path / 'many'}/part-059.parquet: " in lines[0]
    a, b = (content(data.folder) for data in (many, one))
    del a["manifest.json"], b["manifest.json"]
    assert a == b
    monkeypatch.setattr(inputs, "SHARED_BYTES", 1)
    monkeypatch.setattr(inputs, "SHARED_BY", 8)  # many groups of files, and still one line
    lines.clear()
    prepare([tmp_path / "many"], tmp_path / "c", schema=SCHEMA, split=split, report=lines.append, **options)
    assert len(list((tmp_path / "c").iterdir())) > len(a)
    assert lines[0].startswith(f"read 60 files, {tmp_path / 'many'}/part-000.parquet to ")
    assert sum(line.startswith("read ") for line in lines) == 1
    assert [source["name"] for source in many.made["sources"]["train"]] == [f"part-{i:03d}.parquet" for i in range(60)]


def test_few_files_have_arrays_of_their_own(tmp_path):
    paths = write_files(tmp_path / "few", inputs.SEPARATE)
    data = prepare(paths, tmp_path / "out", schema=SCHEMA, split="none")
    assert [day.rows for day in data.days("train")] == [len(rows_of(file)) for file in range(inputs.SEPARATE)]


def test_large_files_share_by_their_size(tmp_path, monkeypatch):
    paths = write_files(tmp_path / "many", 40)
    monkeypatch.setattr(inputs, "SHARED_BYTES", paths[0].stat().st_size * 10)
    data = prepare(paths, tmp_path / "out", schema=SCHEMA, split="none")
    assert 4 <= len(data.days("train")) <= 6
    assert data.rows("train") == sum(len(rows_of(file)) for file in range(40))


def test_a_kill_after_every_record(tmp_path, monkeypatch):
    """Up to the first checksum: those of the other arrays are test_resume's."""
    small_pieces(monkeypatch, piece_bytes=256 * 40)
    paths = write_files(tmp_path / "many", inputs.SEPARATE + 2)
    monkeypatch.setattr(inputs, "SHARED_BYTES", paths[0].stat().st_size * 12)  # two groups
    stops = stop_at_each_record(
        lambda folder: prepare(paths, folder, schema=SCHEMA, min_count=1), tmp_path / "out", checksums=slice(1)
    )
    assert stops > 20


def test_bad_rows_are_named_by_file_and_row(tmp_path):
    (tmp_path / "many").mkdir()
    for file in range(30):
        bad = {7: "3,2,a\n", 8: "1,2\n", 21: "1,x,a\n"}.get(file, "")
        text_file(tmp_path / "many" / f"part-{file}.csv", f"y,n,c\n0,1,a\n1,1,b\n{bad}0,5,a\n")
    schema = Schema(label="y", numeric=("n",), categorical=("c",), layout="table")
    with pytest.raises(UserError, match=r"part-7\.csv: row 4, column 'y': '3' is") as caught:
        prepare([tmp_path / "many"], tmp_path / "out", schema=schema, split="none")
    assert "\n" not in str(caught.value)
    data = prepare([tmp_path / "many"], tmp_path / "out", schema=schema, split="none", on_bad_row="skip")
    assert data.rows("train") == 90
    skipped = json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]
    assert [(each["name"], each["rows"], each["first"][0]["line"]) for each in skipped] == [
        ("part-7.csv", 1, 4),
        ("part-8.csv", 1, 4),
        ("part-21.csv", 1, 4),
    ]


def test_a_changed_file_among_many_is_named_and_read_anew(tmp_path, monkeypatch):
    paths = write_files(tmp_path / "many", 20)
    with monkeypatch.context() as patch:
        patch.setattr("torchrec_deepfm.data.prepare.pipeline.days_of_splits", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(paths, tmp_path / "out", schema=SCHEMA, min_count=1)
    shutil.copy(paths[3], paths[11])
    lines = []
    found = content(prepare(paths, tmp_path / "out", schema=SCHEMA, min_count=1, report=lines.append).folder)
    assert any(line.startswith(f"{paths[11]} has changed (") for line in lines)
    assert found == content(prepare(paths, tmp_path / "whole", schema=SCHEMA, min_count=1).folder)


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    """A folder of an earlier version, whose days have three files each."""
    data = make(tmp_path / "data", (3,) * 200)
    monkeypatch.setattr(npy_mmap, "_MOST_DESCRIPTORS", 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        batches = list(Loader(PreparedData.open(data.folder), "train", batch_size=100, shuffle=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(np.concatenate([batch.dense_features[:, 0] for batch in batches])) == [row / 4 for row in range(600)]


def test_too_many_open_files_are_called_so(tmp_path, monkeypatch):
    data = make(tmp_path / "data", (3, 3))

    def refused(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"day_0_dense.npy: the file can't be read \(Too many open files\); raise"):
        data.arrays(data.days("train")[0])

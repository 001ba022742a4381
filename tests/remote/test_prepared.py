"""Prepared folders on an S3 server: read row by row, and written so that a half is never seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torchrec.datasets.utils import Batch

from tests.support.s3_server import FaultProxy
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.stored_output import stored_output
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.schema.column import Column
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote import cache
from torchrec_deepfm.remote.objects import Objects
from torchrec_deepfm.remote.places import PreparedOutput

ROWS = 9_000  # several blocks to a split


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A number, a category and a list."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "label": rng.integers(0, 2, ROWS),
            "price": rng.normal(size=ROWS).astype(np.float32),
            "shop": rng.integers(0, 50, ROWS).astype(str),
            "tags": [[str(tag) for tag in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(ROWS)],
        }
    )
    schema = Schema(
        layout="table", label="label", numeric=("price",), categorical=("shop", "tags"),
        columns={"tags": Column(list=True)},
    )  # fmt: skip
    return prepare(frame, tmp_path_factory.mktemp("prepared") / "folder", schema=schema, min_count=1)


def store(data: PreparedData, address: str) -> None:
    Objects(address).store(data.folder, [path.name for path in data.folder.iterdir()])


def batches(data: PreparedData, split: str, *, shuffle: bool, epoch: int = 0) -> list[Batch]:
    loader = Loader(data, split, batch_size=700, rank=0, world_size=1, shuffle=shuffle)
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.dense_features, other.dense_features)
        assert torch.equal(one.sparse_features.values(), other.sparse_features.values())
        assert torch.equal(one.sparse_features.lengths(), other.sparse_features.lengths())
        assert torch.equal(one.labels, other.labels)


def test_rows_are_those_of_the_folder_and_fetched_once(s3: FaultProxy, local: PreparedData) -> None:
    store(local, "s3://bucket/rows")
    first = len(s3.seen)
    data = PreparedData.open("s3://bucket/rows")
    assert data.named == "s3://bucket/rows"
    read = sum("_dense" in path or "_ids" in path for _, path, _ in s3.seen[first:])
    assert read == 0, "opening reads no rows"
    assert_same(batches(data, "validation", shuffle=False), batches(local, "validation", shuffle=False))
    assert not any("day_0" in path for method, path, _ in s3.seen[first:] if method == "GET" and "_dense" in path)
    for epoch in (0, 1):
        assert_same(
            batches(data, "train", shuffle=True, epoch=epoch), batches(local, "train", shuffle=True, epoch=epoch)
        )
        if not epoch:
            between = len(s3.seen)
    assert len(s3.seen) == between, "the second epoch reads the cache"


def test_a_small_cache_gives_the_same_rows(
    s3: FaultProxy, local: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are removed again and again while others are read."""
    store(local, "s3://bucket/small")
    whole = sum(path.stat().st_size for path in local.folder.iterdir())
    monkeypatch.setenv(cache.LIMIT, f"{whole // 3}")
    data = PreparedData.open("s3://bucket/small")
    first = len(s3.seen)
    for epoch in (0, 1):
        for split in ("train", "validation", "test"):
            assert_same(
                batches(data, split, shuffle=False, epoch=epoch), batches(local, split, shuffle=False, epoch=epoch)
            )
    assert data.remote is not None
    marks = [np.asarray(file.marks) for file in data.remote._files.values()]
    assert any((mark == 0).any() for mark in marks), "nothing was removed"
    asked = [path for method, path, _ in s3.seen[first:] if method == "GET" and "day_0_dense" in path]
    assert len(asked) > 2


def test_damage_and_change_are_found(s3: FaultProxy, local: PreparedData, tmp_path: Path) -> None:
    store(local, "s3://bucket/damaged")
    content = bytearray((local.folder / "day_0_dense.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "day_0_dense.npy").write_bytes(content)
    Objects("s3://bucket/damaged").store(tmp_path, ["day_0_dense.npy"])
    with pytest.raises(UserError, match=r"^s3://bucket/damaged/day_0_dense\.npy: rows \d+ to \d+ are not what prepare"):
        batches(PreparedData.open("s3://bucket/damaged"), "train", shuffle=True)
    (tmp_path / "day_0_dense.npy").write_bytes(content[:-4])
    Objects("s3://bucket/damaged").store(tmp_path, ["day_0_dense.npy"])
    with pytest.raises(UserError, match=r"day_0_dense\.npy: the file has \d+ bytes, the manifest lists \d+"):
        PreparedData.open("s3://bucket/damaged")
    with pytest.raises(UserError, match=r"^s3://bucket/none: not a prepared folder, manifest\.json is missing"):
        PreparedData.open("s3://bucket/none")


def test_reading_that_fails_is_one_line(s3: FaultProxy, local: PreparedData) -> None:
    store(local, "s3://bucket/failing")
    data = PreparedData.open("s3://bucket/failing")
    expected = batches(local, "train", shuffle=True)
    with s3.fault("503", times=2, method="GET", path="_sparse") as met:
        assert_same(batches(data, "train", shuffle=True), expected)
    assert len(met) == 2
    with s3.fault("expired"), pytest.raises(UserError, match=r"^s3://bucket/failing: can't be reached \(The provided"):
        batches(data, "validation", shuffle=False)


RAW = "\t".join(["1", *["3"] * 13, *["0a"] * 26]) + "\n"


@pytest.fixture
def raw(s3: FaultProxy, tmp_path: Path) -> str:
    """Two days of Criteo's text at an address."""
    for day in (0, 1):
        lines = [RAW.replace("1", str(row % 2), 1).replace("3", str(row + day), 1) for row in range(60)]
        (tmp_path / f"day_{day}").write_text("".join(lines))
    address = f"s3://bucket/raw-{tmp_path.name}"
    Objects(address).store(tmp_path, ["day_0", "day_1"])
    return address


def test_prepare_from_address_to_address(raw: str, s3: FaultProxy, tmp_path: Path, local_cache: Path) -> None:
    words = ["--min-count", "1", "--split", "last-day"]
    target = f"{raw}-out"
    cli.main(["prepare", "--input", raw, "--output", target, *words])
    cli.main(["prepare", "--input", str(tmp_path), "--output", str(tmp_path / "out"), *words])
    stored, beside = Objects(target), tmp_path / "out"
    assert set(stored.entries()) == {path.name for path in beside.iterdir()}
    for name in stored.entries():
        if name != "manifest.json":  # which names the sources
            assert stored.read(name) == (beside / name).read_bytes(), name
    assert not list(local_cache.glob("work-*")), "the local copy is removed"
    puts = [path for method, path, _ in s3.seen if method == "PUT" and f"{target[5:]}/" in path]
    assert [path for path in puts if "manifest.json" in path] == puts[-1:]


def test_prepare_that_cannot_store_resumes(raw: str, s3: FaultProxy, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{raw}-half"
    words = ["prepare", "--input", f"{raw}/day_0", f"{raw}/day_1", "--output", target, "--min-count", "1"]
    with s3.fault("503", method="PUT", path="day_1_sparse"), pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {target}/day_1_sparse.npy: can't be reached (Please reduce your request rate")
    there = Objects(target).entries()
    assert "day_0_dense.npy" in there
    assert "manifest.json" not in there
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        PreparedData.open(target)
    first = len(s3.seen)
    cli.main(words)
    assert not [path for method, path, _ in s3.seen[first:] if method == "PUT" and "day_0_dense" in path]
    assert PreparedData.open(target).rows("train") > 0
    first = len(s3.seen)
    cli.main(words)
    assert "is finished already" in capsys.readouterr().out
    assert not [one for one in s3.seen[first:] if one[0] == "PUT"]


def test_what_is_there_is_not_touched(raw: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"^--output {raw}: it is not empty; name another one or remove what is there"),
        stored_output(PreparedOutput(Path(raw), "manifest.json"), Workers()),
    ):
        raise AssertionError("it was not refused")
    assert set(Objects(raw).entries()) == {"day_0", "day_1"}


def test_a_cache_entry_in_use_stays_and_the_oldest_goes(
    tmp_path: Path, local_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.LIMIT, "100 KiB")
    for name in ("copy-old", "copy-new", "work-mine"):
        folder = cache.hold(name, exclusive=True)
        assert folder is not None
        (folder / "content").write_bytes(bytes(40 << 10))
        cache.release(folder)
    held = cache.hold("copy-held", exclusive=True)
    assert held is not None
    (held / "content").write_bytes(bytes(20 << 10))
    cache.make_room(40 << 10, "s3://bucket/x")
    assert sorted(path.name for path in local_cache.iterdir()) == ["copy-held", "copy-new", "work-mine"]
    with pytest.raises(
        UserError, match=rf"needs 1.0 MiB of the cache, whose limit is 100.0 KiB; raise it with {cache.LIMIT}"
    ):
        cache.make_room(1 << 20, "s3://bucket/x")
    cache.release(held)

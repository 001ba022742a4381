"""No block of rows trains that is not what prepare wrote; each is compared once."""

import dataclasses
import itertools
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from tests.data.prepare.test_prepare import write
from tests.support.data.folders import make
from tests.support.data.raw_oracle import SMALL, random_text
from tests.support.data.tables import parquet
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError

TABLE = Schema(
    label="y",
    numeric=("n",),
    categorical=("c", "b"),
    columns={"b": Column(list=True, weights="w")},
    layout="table",
)
BLOCK = 4  # of small_blocks


def table(path, rows, seed):
    draw = random.Random(seed)
    bags = [[draw.randrange(9) for _ in range(draw.randrange(4))] for _ in range(rows)]
    columns = {
        "y": [draw.randrange(2) for _ in range(rows)],
        "n": [draw.random() for _ in range(rows)],
        "c": [f"v{draw.randrange(9)}" for _ in range(rows)],
        "b": bags,
        "w": pa.array([[draw.random() for _ in bag] for bag in bags], pa.list_(pa.float32())),
    }
    return parquet(path, columns)


@pytest.fixture
def folder(tmp_path, small_blocks):
    """Days whose borders are inside of blocks, and a last one that is halved inside of one."""
    paths = [table(tmp_path / f"{i}.parquet", rows, i) for i, rows in enumerate((30, 21, 27))]
    return prepare(paths, tmp_path / "data", schema=TABLE, min_count=1, split="last-day").folder


def read(folder, split="train", **options):
    for _ in Loader(PreparedData.open(folder), split, batch_size=5, **options):
        pass


def test_the_checksums_are_those_of_the_blocks_that_are_shuffled(folder):
    data, expected = PreparedData.open(folder), []
    for split in ("train", "validation", "test"):
        row = 0
        for day in data.days(split):
            arrays = {path.stem: np.load(path) for path in folder.glob(f"{day.stem}_*.npy")}
            cuts = [i for i in range(day.rows + 1) if (row + i) % BLOCK == 0 or i in (0, day.rows)]
            for first, last in itertools.pairwise(cuts):
                a, b = day.start + first, day.start + last
                c, d = arrays[f"{day.stem}_offsets_1"][[a, b]]
                parts = [arrays[f"{day.stem}_{name}"][a:b] for name in ("dense", "sparse", "labels")]
                parts.append(arrays[f"{day.stem}_offsets_1"][a : b + 1])
                parts += [arrays[f"{day.stem}_{name}_1"][c:d] for name in ("ids", "weights")]
                expected.append([xxhash.xxh3_64(part.tobytes()).intdigest() for part in parts])
            row += day.rows
    assert np.load(folder / "checksums.npy").tolist() == expected
    assert sum(len(data.checksums(split)) for split in data.splits) == len(expected)


def put(path, content):
    """Another file in its place: the thread of an earlier loader may still read the old one."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def rows_on_disk(data, split):
    """(label, number, id, ids of the bag, their weights) of each row, as numpy reads the files."""
    for day in data.days(split):
        arrays = {path.stem.removeprefix(f"{day.stem}_"): np.load(path) for path in data.folder.glob(f"{day.stem}_*")}
        for row in range(day.start, day.start + day.rows):
            a, b = arrays["offsets_1"][[row, row + 1]]
            bag = arrays["ids_1"][a:b].tolist(), arrays["weights_1"][a:b].tolist()
            yield (*(arrays[name][row].item() for name in ("labels", "dense", "sparse")), *bag)


def rows_read(loader):
    for step, batch in enumerate(loader):
        c, b = (batch.sparse_features[name] for name in "cb")
        for i in range(loader.valid_rows(step)):
            bag = slice(*b.offsets()[[i, i + 1]].tolist())
            yield (
                *(values[i].item() for values in (batch.labels, batch.dense_features, c.values())),
                *(values[bag].tolist() for values in (b.values(), b.weights())),
            )


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"prefetch": 0}, {"rank": 1, "world_size": 2}])
def test_an_undamaged_folder_is_read(folder, options):
    data = PreparedData.open(folder)
    for split in ("train", "validation", "test"):
        expected = list(rows_on_disk(data, split))
        if "rank" in options:
            expected = [row for i, row in enumerate(expected) if i // 5 % 2 == 1]
        found = list(rows_read(Loader(data, split, batch_size=5, **options)))
        if "shuffle" in options:
            assert found != expected
            found, expected = sorted(found), sorted(expected)
        assert found == expected
        assert len(found) > 4


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", ["dense", "sparse", "labels", "offsets_1", "ids_1", "weights_1"])
def test_a_flipped_bit_is_refused_with_file_and_rows(folder, name, shuffle):
    draw = random.Random(name)
    for stem, split in (("day_0", "train"), ("day_1", "train"), ("day_2", "test")):
        path = folder / f"{stem}_{name}.npy"
        content = path.read_bytes()
        damaged = bytearray(content)
        # Of the last quarter: the halved day tests there.
        place = draw.randrange(len(content) - (len(content) - 128) // 4, len(content) - 8)  # not the last offset
        damaged[place] ^= 1 << draw.randrange(8)
        put(path, damaged)
        with pytest.raises(UserError, match=rf"^{path}: rows \d+ to \d+ are not what prepare wrote") as caught:
            read(folder, split, shuffle=shuffle)
        first, last = map(int, str(caught.value).split("rows ")[1].split(" are")[0].split(" to "))
        assert 0 <= last - first < BLOCK
        if name in ("dense", "sparse", "labels"):
            array = np.load(path)
            assert first <= (place - 128) // array.strides[0] <= last
        put(path, content)
        read(folder, split, shuffle=shuffle)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", ["300 labels", "dense of zeros"])
def test_labels_and_numbers_that_would_train(tmp_path, rank, damage):
    """Values that are valid and wrong."""
    paths = write(tmp_path, a=random_text(6000, 0, SMALL))
    folder = prepare(paths, tmp_path / "data", schema=SMALL, min_count=1).folder
    array = np.load(
        folder / "day_0_labels.npy" if damage == "300 labels" else folder / "day_0_dense.npy", mmap_mode="r+"
    )
    if damage == "300 labels":
        array[np.random.default_rng(0).choice(len(array), 300, replace=False)] ^= 1
    else:
        array[:] = 0
    array.flush()
    loader = Loader(PreparedData.open(folder), "train", batch_size=64, shuffle=True, rank=rank, world_size=2)
    with pytest.raises(UserError, match=r"day_0_(labels|dense).npy: rows \d+ to \d+ are not what prepare wrote"):
        next(iter(loader))


def test_each_block_is_compared_once(folder, monkeypatch):
    digest, calls = xxhash.xxh3_64_intdigest, []
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data: calls.append(1) or digest(data))
    data = PreparedData.open(folder)
    loader = Loader(data, "train", batch_size=5, shuffle=True)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert sum(1 for _ in loader) == len(loader)
        assert len(calls) == data.checksums("train").size


def test_what_is_not_read_is_not_compared(folder):
    path = folder / "day_1_labels.npy"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    put(path, content)
    loader = Loader(PreparedData.open(folder), "train", batch_size=5, prefetch=0)
    loader.batch(0)
    with pytest.raises(UserError, match=r"rows 18 to 20 are not what prepare wrote"):
        loader.batch(10)


def test_the_checksums_themselves_are_checked(folder, tmp_path):
    path = folder / "checksums.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    put(path, content)
    with pytest.raises(UserError, match=r"checksums.npy: the content is not what was written \(SHA-256 differs\)"):
        read(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"checksums.npy: the file is missing"):
        read(folder)


def test_older_folders_and_those_of_other_tools_have_none(tmp_path):
    data = make(tmp_path / "data", (5, 4))
    assert data.blocks is None
    read(data.folder)
    shutil.copytree(data.folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    assert PreparedData.open(tmp_path / "foreign").blocks is None


def test_a_folder_without_checksums_is_the_same_data(folder):
    data = PreparedData.open(folder)
    older = dataclasses.replace(data, blocks=None)
    pairs = zip(*(Loader(each, "train", batch_size=5, shuffle=True) for each in (data, older)), strict=True)
    assert all(one.labels.tolist() == other.labels.tolist() for one, other in pairs)

"""Batches: which rows, on which rank, in which order, and what stands in them."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.data.batches import real_rows, rows_of
from tests.support.data.folders import SCHEMA, ids, label, make, number, write
from tests.support.data.raw_oracle import random_text
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader import epoch_order
from torchrec_deepfm.data.loader.epoch_order import EpochOrder
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_holds_its_rows(data, small_blocks, shuffle):
    for batch in Loader(data, "train", batch_size=10, shuffle=shuffle):
        rows = rows_of(batch)
        assert batch.dense_features.dtype == torch.float32
        assert batch.dense_features.tolist() == [number(row) for row in rows]
        assert batch.labels.dtype == torch.int32
        assert batch.labels.tolist() == [label(row) for row in rows]
        assert batch.sparse_features.keys() == ["c1", "c2", "c3"]
        for j, key in enumerate(SCHEMA.categorical):
            assert batch.sparse_features[key].values().tolist() == [ids(row)[j] for row in rows]
            assert batch.sparse_features[key].lengths().tolist() == [1] * 10
        assert batch.sparse_features.values().dtype == torch.int32


def test_the_parts_computed_once_are_what_torchrec_computes(data):
    loaded = next(iter(Loader(data, "train", batch_size=10))).sparse_features
    plain = KeyedJaggedTensor(keys=loaded.keys(), values=loaded.values(), lengths=torch.ones(30, dtype=torch.int32))
    assert loaded.stride() == plain.stride() == 10
    assert loaded.offsets().tolist() == plain.offsets().tolist()
    assert loaded.length_per_key() == plain.length_per_key()
    assert loaded.offset_per_key() == plain.offset_per_key()
    assert loaded._key_indices() == plain._key_indices()
    assert [part.values().tolist() for part in loaded.split([1, 2])] == [
        part.values().tolist() for part in plain.split([1, 2])
    ]


def test_without_shuffle_the_order_is_that_of_the_files(data):
    assert list(chain(*real_rows(Loader(data, "train", batch_size=10)))) == list(range(123))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 41, 200])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_row_is_real_exactly_once(data, small_blocks, world_size, batch_size, shuffle):
    options = {"batch_size": batch_size, "world_size": world_size, "shuffle": shuffle}
    loaders = [Loader(data, "train", rank=rank, **options) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    assert all(len(rows_of(batch)) == batch_size for loader in loaders for batch in loader)
    parts = [real_rows(loader) for loader in loaders]
    assert [len(part) for part in parts] == [len(loaders[0])] * world_size
    assert Counter(row for part in parts for step in part for row in step) == Counter(range(123))


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_ranks_see_the_global_batches_of_one(data, small_blocks, shuffle):
    one = Loader(data, "train", batch_size=20, shuffle=shuffle, seed=3)
    two = [Loader(data, "train", batch_size=10, rank=r, world_size=2, shuffle=shuffle, seed=3) for r in (0, 1)]
    joined = [rows_of(a) + rows_of(b) for a, b in zip(*two, strict=True)]
    assert [rows_of(batch) for batch in one][:-1] == joined[:-1]
    assert real_rows(one) == [a + b for a, b in zip(*map(real_rows, two), strict=True)]


def test_drop_last_leaves_out_the_incomplete_global_batch(data):
    loaders = [Loader(data, "train", batch_size=25, rank=r, world_size=2, drop_last=True) for r in (0, 1)]
    assert [rows_of(batch) for batch in loaders[0]] == [list(range(25)), list(range(50, 75))]
    assert [rows_of(batch) for batch in loaders[1]] == [list(range(25, 50)), list(range(75, 100))]
    assert [loaders[1].valid_rows(step) for step in range(2)] == [25, 25]


def test_filling_repeats_rows_from_the_head(data):
    loader = Loader(data, "train", batch_size=100, rank=0, world_size=2)
    assert [rows_of(b) for b in loader] == [list(range(100))]
    loader = Loader(data, "train", batch_size=100, rank=1, world_size=2)
    assert loader.valid_rows(0) == 23
    assert [rows_of(b) for b in loader] == [[*range(100, 123), *range(77)]]
    last = Loader(data, "train", batch_size=61, rank=1, world_size=2)
    assert (len(last), last.valid_rows(1)) == (2, 0)
    assert rows_of(last.batch(1)) == list(range(61))
    # More filling than there are rows: they come round again.
    assert rows_of(Loader(data, "train", batch_size=250).batch(0)) == [row % 123 for row in range(250)]


def test_epochs_and_seeds(data, small_blocks):
    def sequence(seed, epoch):
        loader = Loader(data, "train", batch_size=10, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return list(chain(*real_rows(loader)))

    runs = [sequence(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(run) for run in [*runs, list(range(123))]}) == 5
    assert [sequence(seed, epoch) for seed in (0, 1) for epoch in (0, 1)] == runs


def test_an_epoch_that_has_begun_ends_in_its_own_order(data, small_blocks):
    loader = Loader(data, "train", batch_size=10, shuffle=True)
    wanted = [rows_of(batch) for batch in loader]
    batches = iter(loader)
    first = rows_of(next(batches))
    loader.set_epoch(1)
    assert [first, *map(rows_of, batches)] == wanted


def test_starting_at_a_step_gives_the_rest_of_the_epoch(data, small_blocks):
    loader = Loader(data, "train", batch_size=10, shuffle=True)
    whole = [rows_of(batch) for batch in loader]
    assert [rows_of(batch) for batch in loader.batches(5)] == whole[5:]
    assert [rows_of(loader.batch(step)) for step in (12, 0)] == [whole[12], whole[0]]
    with pytest.raises(IndexError):
        loader.batch(13)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 12, 13, 100, 123])
def test_the_order_is_a_permutation_readable_in_any_stretches(small_blocks, rows):
    whole = EpochOrder(rows, shuffle=True, seed=1, epoch=2)[0:rows].tolist()
    assert sorted(whole) == list(range(rows))
    other = EpochOrder(rows, shuffle=True, seed=1, epoch=2)
    for start in reversed(range(rows)):
        for stop in (start, start + 1, start + 9, rows):
            assert other[start:stop].tolist() == whole[start:stop]


def test_the_shuffle_moves_blocks_over_days_and_rows_within_windows():
    rows = 3 * epoch_order.BLOCK_ROWS * epoch_order.WINDOW_BLOCKS
    shuffled = EpochOrder(rows, shuffle=True, seed=0, epoch=0)
    window = shuffled[0 : rows // 3]
    # A third of the blocks, drawn from the whole range, each of them whole.
    blocks, counts = np.unique(window // epoch_order.BLOCK_ROWS, return_counts=True)
    assert len(blocks) == epoch_order.WINDOW_BLOCKS
    assert set(counts.tolist()) == {epoch_order.BLOCK_ROWS}
    thirds = np.bincount(blocks // epoch_order.WINDOW_BLOCKS, minlength=3) / epoch_order.WINDOW_BLOCKS
    assert np.abs(thirds - 1 / 3).max() < 0.1
    # Neighbours of the file are not neighbours in the order: a batch holds rows of nearly all blocks of its window.
    assert len(np.unique(window[:4096] // epoch_order.BLOCK_ROWS)) > 0.99 * epoch_order.WINDOW_BLOCKS
    assert (np.diff(window[:4096]) == 1).sum() < 5


def test_no_numeric_columns(tmp_path):
    schema = Schema(label="y", numeric=(), categorical=("c1", "c2", "c3"))
    batch = Loader(make(tmp_path / "data", (5, 3), schema), "train", batch_size=8, shuffle=True).batch(0)
    assert batch.dense_features.shape == (8, 0)
    assert sorted(rows_of(batch)) == list(range(8))


@pytest.mark.parametrize(
    ("file", "place", "value", "fault"),
    [
        ("sparse", (3, 1), 7, "row 3, column c2: 7 is not an id from 0 to 6"),
        ("sparse", (3, 1), -1, "row 3, column c2: -1 is not an id from 0 to 6"),
        ("sparse", (39, 0), 2**31 - 1, "row 39, column c1: 2147483647 is not an id from 0 to 89"),
        ("sparse", (0, 2), -(2**31), "row 0, column c3: -2147483648 is not an id from 0 to 10"),
        ("dense", (5, 1), float("nan"), "row 5, column n2: nan is not a finite number"),
        ("dense", (5, 0), float("-inf"), "row 5, column n1: -inf is not a finite number"),
        ("labels", (2, 0), 2, "row 2, column y: 2 is not a valid label (expected 0 or 1)"),
        ("labels", (2, 0), -1, "row 2, column y: -1 is not a valid label (expected 0 or 1)"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_bad_values_are_named(tmp_path, file, place, value, fault, shuffle):
    data = make(tmp_path / "data", (50, 40))
    path = data.folder / f"day_1_{file}.npy"
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    with pytest.raises(UserError) as caught:
        list(Loader(data, "train", batch_size=16, shuffle=shuffle))
    assert (
        str(caught.value)
        == f"{path}: {fault}; the folder is damaged or was not written by prepare; prepare the data again"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size: 0 is less than 1; give 1 or more"),
        ({"batch_size": 1, "prefetch": -1}, "prefetch: -1 is negative; give 0 or more"),
        ({"batch_size": 1, "seed": -1}, "--seed: -1 is negative; give 0 or more"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank 2 of 2 ranks does not exist; give 0 to world_size - 1"),
        (
            {"batch_size": 1, "world_size": 124},
            "{folder}: split train has 123 rows for 124 ranks; use fewer ranks or more data",
        ),
        (
            {"batch_size": 62, "world_size": 2, "drop_last": True},
            (
                "{folder}: split train has 123 rows, less than one step of batch size 62 on 2 ranks; "
                "lower --batch-size or use fewer ranks"
            ),
        ),
    ],
)
def test_options(data, options, message):
    with pytest.raises(UserError) as caught:
        Loader(data, "train", **options)
    assert str(caught.value) == message.format(folder=data.folder)


def test_negative_epoch_and_unknown_split(data):
    with pytest.raises(UserError, match="unknown split 'dev'"):
        Loader(data, "dev", batch_size=1)
    with pytest.raises(UserError, match="epoch: -1 is negative"):
        Loader(data, "train", batch_size=1).set_epoch(-1)


def test_pinned_memory(data):
    if torch.cuda.is_available():
        batch = Loader(data, "train", batch_size=10, pin_memory=True).batch(0)
        assert batch.dense_features.is_pinned()
        assert batch.sparse_features.values().is_pinned()
        assert batch.labels.is_pinned()
    else:
        with pytest.raises(UserError, match=r"^pin_memory: no CUDA device found; leave the option off$"):
            Loader(data, "train", batch_size=10, pin_memory=True)


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 100, 123, 1000])
def test_a_window_has_a_block_from_each_stretch_of_the_split(small_blocks, rows):
    shuffled = EpochOrder(rows, shuffle=True, seed=1, epoch=0)
    whole = shuffled[0:rows].tolist()
    blocks = -(-rows // 4)
    windows = -(-blocks // 3)
    ends = [position for position in range(rows) if shuffled.window_at(position) != shuffled.window_at(position + 1)]
    assert shuffled.window_at(rows - 1) == windows - 1
    assert len(ends) == windows
    begin = 0
    for window, end in enumerate(ends):
        fetched = [row for first, stop in shuffled.stretches(window) for row in range(first, stop)]
        assert sorted(whole[begin : end + 1]) == fetched
        chosen = [first // 4 for first, _ in shuffled.stretches(window)]
        assert [block // windows for block in chosen] == list(range(len(chosen)))
        assert len(chosen) >= -(-blocks // windows) - 1
        begin = end + 1
    assert shuffled.stretches(windows) == []


CRITEO = Schema(
    label="label",
    numeric=tuple(f"int_{i}" for i in range(13)),
    categorical=tuple(f"cat_{j}" for j in range(26)),
)


@pytest.mark.parametrize("rows", [40, 41])
def test_torchrec_reads_a_folder_of_ours(tmp_path, rows):
    """Train is all days but the last, validation and test are its halves: stage by stage the same batches."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    counts = {"day_0": 30, "day_1": 25, "day_2": rows}
    for stem, count in counts.items():
        np.save(folder / f"{stem}_dense.npy", draw.standard_normal((count, 13), np.float32))
        np.save(folder / f"{stem}_sparse.npy", draw.integers(0, 50, (count, 26), np.int32))
        np.save(folder / f"{stem}_labels.npy", draw.integers(0, 2, (count, 1), np.int32))
    half = -(-rows // 2)
    splits = {
        "train": [{"stem": stem, "start": 0, "rows": counts[stem], "positives": 1} for stem in ("day_0", "day_1")],
        "validation": [{"stem": "day_2", "start": 0, "rows": half, "positives": 1}],
        "test": [{"stem": "day_2", "start": half, "rows": rows - half, "positives": 1}],
    }
    embeddings = dict.fromkeys(CRITEO.categorical, 50)
    write(folder, {"schema": CRITEO.to_json(), "num_embeddings": embeddings, "splits": splits})
    data = PreparedData.open(folder)
    for stage, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        stems = [day.stem for day in data.days(split)]
        paths = [[str(folder / f"{stem}_{part}.npy") for stem in stems] for part in ("dense", "sparse", "labels")]
        theirs = InMemoryBinaryCriteoIterDataPipe(stage, *paths, batch_size=7, rank=0, world_size=1, drop_last=True)
        loaded = Loader(data, split, batch_size=7, drop_last=True)
        for their, our in zip(theirs, loaded, strict=True):
            assert torch.equal(their.dense_features, our.dense_features)
            assert their.sparse_features.keys() == our.sparse_features.keys()
            assert torch.equal(their.sparse_features.values(), our.sparse_features.values())
            assert torch.equal(their.labels, our.labels)


def test_torchrec_reads_our_folder_and_yields_the_same_batches(tmp_path):
    raw = tmp_path / "a.tsv"
    raw.write_bytes(random_text(300, 0))
    data = prepare([raw], tmp_path / "out", min_count=2)
    (day,) = data.days("train")
    paths = [[str(data.folder / f"{day.stem}_{part}.npy")] for part in ("dense", "sparse", "labels")]
    theirs = InMemoryBinaryCriteoIterDataPipe("train", *paths, batch_size=32, rank=0, world_size=1, drop_last=True)
    loaded = Loader(data, "train", batch_size=32, drop_last=True)
    for their, our in zip(theirs, loaded, strict=True):
        assert torch.equal(their.dense_features, our.dense_features)
        assert torch.equal(their.sparse_features.values(), our.sparse_features.values())
        assert torch.equal(their.labels, our.labels)

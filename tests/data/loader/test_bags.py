"""Lists of ids, weights, days that are cut in two, empty splits and files that shrink."""

import json
import os
import re
from itertools import chain

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.data.batches import real_rows, rows_of
from tests.support.data.folders import LISTS, SCHEMA, bag, halved, ids, make, number, weights
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 10, 50])
def test_bags_and_weights(lists, small_blocks, batch_size, shuffle):
    """Batches within a day and across days, with and without filling; the other columns weigh 1."""
    for batch in Loader(lists, "train", batch_size=batch_size, shuffle=shuffle):
        rows = rows_of(batch)
        features = batch.sparse_features
        assert features.keys() == ["c1", "c2", "c3", "c4"]
        assert features.stride() == batch_size
        wanted = {
            "c1": [[ids(row)[0]] for row in rows],
            "c2": [bag("c2", row) for row in rows],
            "c3": [[ids(row)[2]] for row in rows],
            "c4": [bag("c4", row) for row in rows],
        }
        for name, bags in wanted.items():
            assert features[name].lengths().tolist() == [len(b) for b in bags]
            assert features[name].values().tolist() == list(chain(*bags))
            given_weights = [
                weights("c4", row) if name == "c4" else [1.0] * len(b) for row, b in zip(rows, bags, strict=True)
            ]
            assert features[name].weights().tolist() == list(chain(*given_weights))
        assert features.values().dtype == torch.int32
        assert features.weights().dtype == torch.float32
        plain = KeyedJaggedTensor(
            keys=features.keys(), values=features.values(), lengths=features.lengths(), weights=features.weights()
        )
        assert features.lengths().dtype == torch.int32
        assert torch.equal(features.offsets(), plain.offsets())
        assert features.length_per_key() == plain.length_per_key()
        assert features.offset_per_key() == plain.offset_per_key()
        assert batch.dense_features.tolist() == [number(row) for row in rows]


def test_lists_without_weights_give_none(tmp_path):
    schema = Schema(label="y", numeric=(), categorical=("c2", "c1"), columns={"c2": Column(list=True)}, layout="table")
    batch = Loader(make(tmp_path / "data", (9,), schema), "train", batch_size=9).batch(0)
    assert batch.sparse_features.weights_or_none() is None
    assert batch.sparse_features["c2"].values().tolist() == [i for row in range(9) for i in bag("c2", row)]
    assert rows_of(batch) == list(range(9))


def test_only_lists(tmp_path):
    schema = Schema(label="y", numeric=("n1",), categorical=("c2",), columns={"c2": Column(list=True)}, layout="table")
    for batch in Loader(make(tmp_path / "data", (9, 4), schema), "train", batch_size=5, shuffle=True):
        rows = [round(row * 4) for (row,) in batch.dense_features.tolist()]
        assert batch.sparse_features["c2"].values().tolist() == [i for row in rows for i in bag("c2", row)]


@pytest.mark.parametrize(
    ("file", "place", "value", "fault"),
    [
        ("ids_1", 3, 13, "row {}, column c2: 13 is not an id from 0 to 12"),
        ("ids_1", 3, -1, "row {}, column c2: -1 is not an id from 0 to 12"),
        ("weights_3", 3, float("nan"), "row {}, column c4: nan is not a finite weight"),
        ("weights_3", 3, float("inf"), "row {}, column c4: inf is not a finite weight"),
        ("sparse", (2, 1), 11, "row 2, column c3: 11 is not an id from 0 to 10"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_bad_values_in_bags_are_named(tmp_path, file, place, value, fault, shuffle):
    data = make(tmp_path / "data", (20, 20), LISTS)
    path = data.folder / f"day_1_{file}.npy"
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    name = "c2" if file.endswith("1") else "c4"
    lengths = np.cumsum([len(bag(name, row)) for row in range(20, 40)])
    row = int(np.searchsorted(lengths, 3, side="right"))  # of the day, the one that has the bag's place 3
    with pytest.raises(UserError) as caught:
        list(Loader(data, "train", batch_size=8, shuffle=shuffle))
    wanted = f"{path}: {fault.format(row)}; the folder is damaged or was not written by prepare; prepare the data again"
    assert str(caught.value) == wanted


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("change", [(5, 10**9), (5, -1), (5, 0)])
def test_bad_bag_borders_are_named(tmp_path, change, batch_size, shuffle):
    data = make(tmp_path / "data", (20, 20), LISTS)
    path = data.folder / "day_1_offsets_3.npy"
    array = np.load(path)
    array[change[0]] = change[1]
    np.save(path, array)
    # Both rows have the border; in the order of the files the first of them is met first.
    first = "[45]" if shuffle else "4"
    pattern = rf"^{re.escape(str(path))}: row {first}: its ids run from -?\d+ to -?\d+ of \d+; "
    with pytest.raises(UserError, match=pattern):
        list(Loader(data, "train", batch_size=batch_size, shuffle=shuffle))


@pytest.mark.parametrize("schema", [SCHEMA, LISTS], ids=["one-hot", "lists"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_day_that_is_cut_in_two(tmp_path, small_blocks, schema, shuffle):
    data = halved(tmp_path / "data", 15, schema)
    assert sorted(chain(*real_rows(Loader(data, "validation", batch_size=3, shuffle=shuffle)))) == list(range(8))
    loader = Loader(data, "test", batch_size=3, shuffle=shuffle)
    assert sorted(chain(*real_rows(loader))) == list(range(8, 15))
    for batch in loader:
        assert batch.dense_features.tolist() == [number(row) for row in rows_of(batch)]
        if schema is LISTS:
            assert batch.sparse_features["c4"].values().tolist() == [
                i for row in rows_of(batch) for i in bag("c4", row)
            ]


@pytest.mark.parametrize("schema", [SCHEMA, LISTS], ids=["one-hot", "lists"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [4, 30])
def test_several_days_that_start_inside_their_files(tmp_path, small_blocks, schema, shuffle, batch_size):
    path = make(tmp_path / "data", (10, 20, 15), schema).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    cut = {"day_0": (0, 10), "day_1": (6, 9), "day_2": (4, 11)}
    manifest["splits"]["train"] = [{"stem": stem, "start": a, "rows": n} for stem, (a, n) in cut.items()]
    # The arrays must end where a day ends: these rows belong to nobody else.
    manifest["splits"]["validation"] = [{"stem": "day_1", "start": 15, "rows": 5}]
    path.write_bytes(seal(manifest))
    loader = Loader(PreparedData.open(path.parent), "train", batch_size=batch_size, shuffle=shuffle, drop_last=True)
    seen = []
    for batch in loader:
        seen += rows_of(batch)
        assert batch.dense_features.tolist() == [number(row) for row in rows_of(batch)]
        if schema is LISTS:
            flat = [i for row in rows_of(batch) for i in bag("c4", row)]
            assert batch.sparse_features["c4"].values().tolist() == flat
    wanted = [*range(10), *range(16, 25), *range(34, 45)]
    assert len(seen) == len(set(seen)) == 30 // batch_size * batch_size
    assert set(seen) <= set(wanted)
    assert shuffle or seen == wanted[: len(seen)]


def test_a_bad_value_in_a_cut_day_is_named_by_its_row_in_the_file(tmp_path):
    data = halved(tmp_path / "data", 15)
    path = data.folder / "day_1_sparse.npy"
    array = np.load(path)
    array[9, 1] = 77
    np.save(path, array)
    with pytest.raises(UserError, match=r"day_1_sparse.npy: row 9, column c2: 77 is not an id from 0 to 12"):
        list(Loader(data, "test", batch_size=3))


def test_an_empty_split(tmp_path):
    path = make(tmp_path / "data", (5,)).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["test"] = []
    path.write_bytes(seal(manifest))
    data = PreparedData.open(path.parent)
    with pytest.raises(UserError) as caught:
        Loader(data, "test", batch_size=1)
    assert str(caught.value) == f"{data.folder}: split test is empty; prepare the data with rows for it"


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    """Reading behind its end would kill the process."""
    data = make(tmp_path / "data", (4000,))
    batches = iter(Loader(data, "train", batch_size=100, prefetch=0))
    next(batches)
    os.truncate(data.folder / "day_0_dense.npy", 4096)
    with pytest.raises(UserError, match=r"day_0_dense.npy: the file became shorter while it was read; "):
        next(batches)

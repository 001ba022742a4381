"""Folders that TorchRec's scripts wrote, and DLRMv2's multi-hot archives. TorchRec's own code writes and reads here."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.datasets.criteo import BinaryCriteoUtils, InMemoryBinaryCriteoIterDataPipe

from tests.support.data.raw_oracle import random_text
from torchrec_deepfm.data.dataset import external
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError

ROWS = (40, 33, 21)
HASHES = [3 + 7 * j for j in range(26)]
PARTS = ("dense", "sparse", "labels")
STAGES = {"train": "train", "val": "validation", "test": "test"}
HOTNESS = [1 + j % 4 for j in range(26)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """Scans are remembered below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """What ``tsv_to_npys`` makes of three days: ids are whatever the text holds, up to 32 bits."""
    folder = tmp_path_factory.mktemp("raw")
    for day, rows in enumerate(ROWS):
        text = folder / f"day_{day}"
        text.write_bytes(random_text(rows, day))
        BinaryCriteoUtils.tsv_to_npys(str(text), *(str(folder / f"day_{day}_{part}.npy") for part in PARTS))
    return folder


@pytest.fixture(scope="module")
def contiguous(raw, tmp_path_factory) -> Path:
    """What ``sparse_to_contiguous`` makes of that, under the names that the DLRM scripts give."""
    folder = tmp_path_factory.mktemp("contiguous")
    files = [str(raw / f"day_{day}_sparse.npy") for day in range(len(ROWS))]
    BinaryCriteoUtils.sparse_to_contiguous(files, str(folder), frequency_threshold=2, output_file_suffix=".npy")
    for day in range(len(ROWS)):
        for part in ("dense", "labels"):
            shutil.copy(raw / f"day_{day}_{part}.npy", folder)
    return folder


@pytest.fixture
def copy(contiguous, tmp_path) -> Path:
    return Path(shutil.copytree(contiguous, tmp_path / "copy"))


@pytest.fixture
def multi_hot(copy) -> Path:
    """Beside the one-hot ids, DLRMv2's archive: int32 [N, H] for each column."""
    draw = np.random.default_rng(0)
    for day, rows in enumerate(ROWS):
        arrays = {str(j): draw.integers(0, 5 + j, (rows, hot), np.int32) for j, hot in enumerate(HOTNESS)}
        np.savez(copy / f"day_{day}_sparse_multi_hot.npz", **arrays)
    return copy


def refusal(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def theirs(folder: Path, stage: str, **options) -> InMemoryBinaryCriteoIterDataPipe:
    days = [len(ROWS) - 1] if stage != "train" else range(len(ROWS) - 1)
    paths = [[str(folder / f"day_{day}_{part}.npy") for day in days] for part in PARTS]
    return InMemoryBinaryCriteoIterDataPipe(
        stage, *paths, batch_size=8, rank=0, world_size=1, drop_last=True, **options
    )


def assert_same_batches(folder: Path, data: PreparedData, stage: str, **options) -> None:
    loaded = Loader(data, STAGES[stage], batch_size=8, drop_last=True)
    for their, our in zip(theirs(folder, stage, **options), loaded, strict=True):
        assert torch.equal(their.dense_features, our.dense_features)
        assert torch.equal(their.sparse_features.values(), our.sparse_features.values())
        assert their.sparse_features.keys() == our.sparse_features.keys()
        assert torch.equal(their.sparse_features.lengths(), our.sparse_features.lengths())
        assert torch.equal(their.labels, our.labels)
        assert (our.sparse_features.values().dtype, our.labels.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("odd", [False, True])
def test_torchrecs_folder_gives_torchrecs_batches(copy, stage, odd):
    if odd:
        for part in PARTS:
            array = np.load(copy / f"day_2_{part}.npy")
            np.save(copy / f"day_2_{part}.npy", array[:20])
    data = PreparedData.open(copy)
    assert [data.rows(split) for split in STAGES.values()] == [73, *((10, 10) if odd else (11, 10))]
    assert_same_batches(copy, data, stage)


def test_the_ids_are_counted_over_all_days(contiguous):
    data = PreparedData.open(contiguous)
    whole = np.concatenate([np.load(contiguous / f"day_{day}_sparse.npy") for day in range(len(ROWS))])
    assert data.num_embeddings == {f"cat_{j}": int(whole[:, j].max()) + 1 for j in range(26)}
    assert data.schema.numeric == tuple(f"int_{i}" for i in range(13))
    assert sorted(path.name for path in contiguous.iterdir()) == sorted(
        f"day_{day}_{part}.npy" for day in range(len(ROWS)) for part in PARTS
    )  # nothing was written there


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_largest_ids_in_pieces_of_any_size(tmp_path, monkeypatch, rows, dtype):
    ids = np.random.default_rng(rows).integers(0, 1000, (rows, 5)).astype(dtype)
    for j, row in enumerate((0, rows // 3, rows // 2, rows - 2, rows - 1)):
        ids[row, j] = 2000 + j
    for day in range(2):
        np.save(tmp_path / f"day_{day}_sparse.npy", ids + day)
        np.save(tmp_path / f"day_{day}_dense.npy", np.zeros((rows, 2), np.float32))
        np.save(tmp_path / f"day_{day}_labels.npy", np.zeros((rows, 1), np.int32))
    monkeypatch.setattr(external, "SCAN_BYTES", 1500)
    data = PreparedData.open(tmp_path)
    assert list(data.num_embeddings.values()) == [max(column) + 2 for column in ids.T.tolist()]
    if rows == 1:
        assert (data.rows("validation"), data.rows("test"), data.days("test")) == (1, 0, ())


def test_a_scan_is_remembered_until_a_file_changes(copy, cache, monkeypatch):
    first = PreparedData.open(copy).num_embeddings
    [remembered] = cache.rglob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(external, "_highest", None)  # to scan again would fail
        assert PreparedData.open(copy).num_embeddings == first
    for nonsense in ("nonsense", "[]", "7", '["a"]', "[" + "0," * 25 + "0]"):
        remembered.write_text(nonsense)
        assert PreparedData.open(copy).num_embeddings == first
    ids = np.load(copy / "day_1_sparse.npy")
    ids[3, 7] = 12345
    np.save(copy / "day_1_sparse.npy", ids)
    assert PreparedData.open(copy).num_embeddings == {**first, "cat_7": 12346}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_raw_values_are_refused_with_the_remedy(raw, tmp_path, dtype):
    folder = Path(shutil.copytree(raw, tmp_path / "copy"))
    for day in range(len(ROWS)):
        path = folder / f"day_{day}_sparse.npy"
        np.save(path, np.load(path).astype(np.uint32).view(np.int32) if dtype is np.int32 else np.load(path))
    message = refusal(lambda: PreparedData.open(folder))
    assert message.startswith(f"{folder / 'day_0_sparse.npy'}: column cat_")
    assert message.endswith("give --num-embeddings, which takes ids modulo this number, as TorchRec's hashes do")
    assert ("holds -" in message) == (dtype is np.int32)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_modulo_num_embeddings_are_those_of_torchrecs_hashes(raw, tmp_path, stage, dtype):
    folder = Path(shutil.copytree(raw, tmp_path / "copy"))
    for day in range(len(ROWS)):
        path = folder / f"day_{day}_sparse.npy"
        np.save(path, np.load(path).astype(np.uint32).view(np.int32) if dtype is np.int32 else np.load(path))
    data = PreparedData.open(folder, num_embeddings=HASHES)
    assert list(data.num_embeddings.values()) == HASHES
    assert_same_batches(folder, data, stage, hashes=HASHES)
    for batch in Loader(data, STAGES[stage], batch_size=8, shuffle=True):
        assert int(batch.sparse_features.values().min()) >= 0


def test_one_number_for_all_columns(raw):
    data = PreparedData.open(raw, num_embeddings=50)
    assert set(data.num_embeddings.values()) == {50}
    assert_same_batches(raw, data, "train", hashes=[50] * 26)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("modulo", [False, True])
def test_multi_hot_archives(multi_hot, stage, modulo):
    """Members of an archive lie at odd places in the file; the archive counts more than the one-hot file beside it."""
    data = PreparedData.open(multi_hot, num_embeddings=[3] * 26 if modulo else None)
    days = [2] if stage != "train" else [0, 1]
    cut = {"train": slice(None), "val": slice(0, 11), "test": slice(11, None)}[stage]
    loaded = [np.load(multi_hot / f"day_{day}_sparse_multi_hot.npz") for day in days]
    wanted = [np.concatenate([arrays[str(j)] for arrays in loaded])[cut] for j in range(26)]
    dense = np.concatenate([np.load(multi_hot / f"day_{day}_dense.npy") for day in days])[cut]
    assert data.rows(STAGES[stage]) == len(dense)
    loader = Loader(data, STAGES[stage], batch_size=len(dense) // 2, drop_last=True)
    for step, batch in enumerate(loader):
        rows = slice(step * (len(dense) // 2), (step + 1) * (len(dense) // 2))
        assert np.array_equal(batch.dense_features.numpy(), dense[rows])
        for j in range(26):
            feature = batch.sparse_features[f"cat_{j}"]
            ids = wanted[j][rows] % 3 if modulo else wanted[j][rows]
            assert feature.values().tolist() == ids.reshape(-1).tolist()
            assert feature.lengths().tolist() == [HOTNESS[j]] * len(ids)
            assert feature.weights_or_none() is None
    if not modulo:
        assert data.num_embeddings == {
            f"cat_{j}": 1
            + max(int(np.load(multi_hot / f"day_{day}_sparse_multi_hot.npz")[str(j)].max()) for day in range(3))
            for j in range(26)
        }


def test_multi_hot_archives_shuffled(multi_hot):
    data = PreparedData.open(multi_hot)
    loaded = [np.load(multi_hot / f"day_{day}_sparse_multi_hot.npz") for day in (0, 1)]
    dense = np.concatenate([np.load(multi_hot / f"day_{day}_dense.npy") for day in (0, 1)])
    [batch] = Loader(data, "train", batch_size=73, shuffle=True)
    place = [int(np.flatnonzero((dense == row).all(axis=1))[0]) for row in batch.dense_features.numpy()]
    for j in (3, 25):
        ids = np.concatenate([arrays[str(j)] for arrays in loaded])[place]
        assert batch.sparse_features[f"cat_{j}"].values().tolist() == ids.reshape(-1).tolist()


@pytest.mark.parametrize("labels", ["flat", "int64", "float32", "float64 flat"])
def test_kinds_of_labels_and_numbers(copy, labels):
    before = list(Loader(PreparedData.open(copy), "train", batch_size=9))
    for day in range(len(ROWS)):
        path = copy / f"day_{day}_labels.npy"
        array = np.load(path)
        array = array.reshape(-1) if "flat" in labels else array
        np.save(path, array if labels == "flat" else array.astype(labels.split()[0]))
        np.save(copy / f"day_{day}_dense.npy", np.load(copy / f"day_{day}_dense.npy").astype(np.float64))
    for a, b in zip(before, Loader(PreparedData.open(copy), "train", batch_size=9), strict=True):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.dense_features, b.dense_features)
        assert (b.labels.dtype, b.dense_features.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize(
    ("file", "place", "value", "fault"),
    [
        ("labels", (5, 0), -1, "column label: -1 is not a valid label (expected 0 or 1)"),  # Kaggle's test set
        ("dense", (5, 3), np.nan, "column int_3: nan is not a finite number"),
    ],
)
def test_bad_values_are_named(copy, file, place, value, fault):
    path = copy / f"day_1_{file}.npy"
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    data = PreparedData.open(copy)
    wanted = f"{path}: row 5, {fault}; fix the file or remove the day's files"
    assert refusal(lambda: list(Loader(data, "train", batch_size=8))) == wanted


def change(path: Path, act) -> None:
    np.save(path, act(np.load(path)))


def test_what_can_be_wrong_with_the_days(copy):
    def at(name: str, act=None) -> str:
        folder = Path(shutil.copytree(copy, copy.parent / "broken", dirs_exist_ok=False))
        (folder / name).unlink() if act is None else change(folder / name, act)
        message = refusal(lambda: PreparedData.open(folder))
        shutil.rmtree(folder)
        assert message.startswith(f"{folder}")
        return message.removeprefix(f"{folder}").removeprefix("/")

    for part in PARTS:
        assert at(f"day_1_{part}.npy") == f": day_1_{part}.npy is missing; add it or a link to it"
        shorter = at(f"day_1_{part}.npy", lambda array: array[:-1])
        assert "rows" in shorter
        assert "; fix or replace it" in shorter
        assert "not a complete .npy array" in at(f"day_1_{part}.npy", lambda array: array.astype(str))
    assert at("day_0_dense.npy", lambda array: array.astype(np.int64)) == (
        "day_0_dense.npy: expected float numbers, found int64; fix or replace it"
    )
    assert at("day_0_sparse.npy", lambda array: array.astype(np.float32)) == (
        "day_0_sparse.npy: expected int32 or int64 ids, found float32; fix or replace it"
    )
    assert at("day_0_sparse.npy", lambda array: array[:, 0]) == (
        "day_0_sparse.npy: expected rows of columns, found shape (40,); fix or replace it"
    )
    assert at("day_0_labels.npy", lambda array: np.hstack([array, array])) == (
        "day_0_labels.npy: expected one label per row, found shape (40, 2); fix or replace it"
    )
    assert "day_1_sparse.npy: 25 columns, but " in at("day_1_sparse.npy", lambda array: array[:, 1:].copy())
    assert "it is in Fortran order" in at("day_1_sparse.npy", np.asfortranarray)


def test_a_gap_a_single_day_and_no_rows(copy):
    for part in PARTS:
        (copy / f"day_1_{part}.npy").unlink()
    wanted = f"{copy}: day_1 is missing between day_0 and day_2; add its files"
    assert refusal(lambda: PreparedData.open(copy)) == wanted
    for part in PARTS:
        (copy / f"day_2_{part}.npy").unlink()
    assert refusal(lambda: PreparedData.open(copy)) == (
        f"{copy}: only day_0 exists, and the last day is for validation and test; add a day to train on"
    )
    for part in PARTS:
        change(copy / f"day_0_{part}.npy", lambda array: array[:0])
        shutil.copy(copy / f"day_0_{part}.npy", copy / f"day_1_{part}.npy")
    wanted = f"{copy / 'day_0_labels.npy'}: the day has no rows; remove its files"
    assert refusal(lambda: PreparedData.open(copy)) == wanted


def test_what_can_be_wrong_with_archives(multi_hot):
    path = multi_hot / "day_1_sparse_multi_hot.npz"
    arrays = dict(np.load(path))
    del arrays["3"]
    np.savez(path, **arrays)
    assert "the arrays are named 0, 1, 2, 4, " in refusal(lambda: PreparedData.open(multi_hot))
    del arrays["25"]
    np.savez(path, **{str(j): array for j, array in enumerate(arrays.values())})
    assert refusal(lambda: PreparedData.open(multi_hot)).startswith(f"{path}: 24 columns, but ")
    np.savez_compressed(path, **arrays)
    assert "the array is compressed and can't be read row by row" in refusal(lambda: PreparedData.open(multi_hot))
    path.unlink()
    assert refusal(lambda: PreparedData.open(multi_hot)) == (
        f"{multi_hot}: day_1_sparse_multi_hot.npz is missing; add it or a link to it beside the others "
        "(the multi-hot script leaves it in its input folder)"
    )


@pytest.mark.parametrize(
    ("num_embeddings", "message"),
    [
        (
            [1, 2],
            (
                "--num-embeddings: 2 numbers for the 26 categorical columns of {}; "
                "give one number per column, or one for all"
            ),
        ),
        (0, "--num-embeddings: 0 is out of range; give 1 to 2147483647"),
        ([5] * 25 + [2**31], "--num-embeddings: 2147483648 is out of range; give 1 to 2147483647"),
    ],
)
def test_bad_num_embeddings(contiguous, num_embeddings, message):
    found = refusal(lambda: PreparedData.open(contiguous, num_embeddings=num_embeddings))
    assert found == message.format(contiguous)

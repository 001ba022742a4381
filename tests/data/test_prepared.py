import hashlib
import json

import numpy as np
import pytest

from tests.data.folders import make
from tests.data.raw_oracle import SMALL, random_text
from torchrec_deepfm.data.prepare import prepare
from torchrec_deepfm.data.prepared import Day, PreparedData
from torchrec_deepfm.errors import UserError

AGAIN = "; prepare the data again"


def refusal(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checksums_and_sizes_cover_every_file(tmp_path):
    raw = tmp_path / "a.tsv"
    raw.write_bytes(random_text(100, 0, SMALL))
    folder = prepare([raw], tmp_path / "out", schema=SMALL).folder
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files == {
        path.name: {"bytes": len(path.read_bytes()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    assert str(tmp_path) not in (folder / "manifest.json").read_text()  # a folder tells nothing of its machine


def test_open_reads_the_manifest(tmp_path):
    data = make(tmp_path / "data", (5, 4))
    assert data.days("train") == (Day(stem="day_0", rows=5, positives=2), Day(stem="day_1", rows=4, positives=1))
    assert (data.rows("train"), data.rows("test")) == (9, 1)
    dense, sparse, labels = data.arrays(data.days("train")[1])
    assert dense[0].tolist() == [1.25, -0.625]
    assert sparse[0].tolist() == [5, 5, 3]
    assert labels[1].tolist() == [1]
    assert not any(array.flags.writeable for array in (dense, sparse, labels))


def test_unknown_split(tmp_path):
    data = make(tmp_path / "data", (5,))
    wanted = f"{data.folder}: there is no split 'val'; choose one of train, validation, test"
    assert refusal(lambda: data.rows("val")) == wanted


def test_no_folder_and_no_manifest(tmp_path):
    missing = tmp_path / "missing"
    assert refusal(lambda: PreparedData.open(missing)) == f"{missing}: no such folder; make it with prepare"
    assert refusal(lambda: PreparedData.open(tmp_path)) == (
        f"{tmp_path}: no prepared folder, there is no manifest.json; make one with prepare"
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udce9"])
def test_broken_json(tmp_path, text):
    make(tmp_path / "data", (5,))
    path = tmp_path / "data" / "manifest.json"
    path.write_text(text, errors="surrogateescape")
    message = refusal(lambda: PreparedData.open(tmp_path / "data"))
    assert message.startswith(f"{path}: the manifest is no ")
    assert message.endswith(AGAIN)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": None},
        {"schema": {"label": "y", "numeric": [], "categorical": []}},
        {"splits": {}},
        {"splits": {"train": [{"stem": "day_0"}], "validation": [], "test": []}},
        {"splits": {"train": [{"stem": "day_0", "rows": "5", "positives": 1}], "validation": [], "test": []}},
        {"splits": {"train": [{"stem": "../day_0", "rows": 5, "positives": 1}], "validation": [], "test": []}},
        {"num_embeddings": {"c1": 3}},
        {"num_embeddings": {"c1": 0, "c2": 7, "c3": 11}},
        {"num_embeddings": {"c1": "many", "c2": 7, "c3": 11}},
        {"files": []},
        {"format_version": 2},
    ],
    ids=str,
)
def test_damaged_manifest(tmp_path, change):
    make(tmp_path / "data", (5,))
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert refusal(lambda: PreparedData.open(tmp_path / "data")).startswith(f"{path}: ")


def test_missing_and_short_files(tmp_path):
    make(tmp_path / "data", (5,))
    path = tmp_path / "data" / "day_0_sparse.npy"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal(lambda: PreparedData.open(path.parent)) == (
        f"{path}: the file has {size - 4} bytes, the manifest says {size}" + AGAIN
    )
    path.unlink()
    assert refusal(lambda: PreparedData.open(path.parent)) == f"{path}: the file is missing" + AGAIN


def test_arrays_that_do_not_fit(tmp_path):
    data = make(tmp_path / "data", (5,))
    (day,) = data.days("train")
    path = data.folder / "day_0_labels.npy"
    for array, found in (
        (np.zeros((5, 1), np.int64), "int64 of shape (5, 1)"),
        (np.zeros((5,), np.int32), "int32 of shape (5,)"),
        (np.zeros((4, 1), np.int32), "int32 of shape (4, 1)"),
    ):
        np.save(path, array)
        assert refusal(lambda: data.arrays(day)) == f"{path}: expected int32 of shape (5, 1), found {found}" + AGAIN
    for content in (b"", b"no array", b"\x80\x04K\x01."):
        path.write_bytes(content)
        assert refusal(lambda: data.arrays(day)).startswith(f"{path}: this is no whole .npy array (")
    np.save(path, np.array([{"pickled": 1}] * 5), allow_pickle=True)
    assert refusal(lambda: data.arrays(day)).startswith(f"{path}: this is no whole .npy array (")
    np.save(path, np.zeros((5, 1), np.int32))
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(lambda: data.arrays(day)).startswith(f"{path}: this is no whole .npy array (")
    path.unlink()
    assert refusal(lambda: data.arrays(day)) == f"{path}: the file is missing" + AGAIN

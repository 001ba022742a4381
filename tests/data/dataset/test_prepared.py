import hashlib
import itertools
import json
import random

import numpy as np
import pytest

from tests.support.data.folders import LISTS, bag, halved, ids, make, weights
from tests.support.data.raw_oracle import SMALL, random_text
from torchrec_deepfm.data.dataset import prepared
from torchrec_deepfm.data.dataset.prepared import Day, PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_seal, seal

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
    assert str(tmp_path) not in (folder / "manifest.json").read_text()  # a folder names nothing of its machine


def test_open_reads_the_manifest(tmp_path):
    data = make(tmp_path / "data", (5, 4))
    assert data.days("train") == (Day(stem="day_0", rows=5, positives=2), Day(stem="day_1", rows=4, positives=1))
    assert (data.rows("train"), data.rows("test")) == (9, 1)
    arrays = data.arrays(data.days("train")[1])
    assert arrays.dense[0].tolist() == [1.25, -0.625]
    assert arrays.sparse[0].tolist() == [5, 5, 3]
    assert arrays.labels[1].tolist() == [1]
    assert not any(part.array.flags.writeable for part in arrays.files())


def test_lists_and_weights(tmp_path):
    data = make(tmp_path / "data", (5, 4), LISTS)
    arrays = data.arrays(data.days("train")[1])
    assert np.asarray(arrays.sparse).tolist() == [[ids(row)[0], ids(row)[2]] for row in range(5, 9)]
    assert list(arrays.bags) == ["c2", "c4"]
    for name, bags in arrays.bags.items():
        borders = bags.offsets[:].tolist()
        cut = [bags.ids[a:b].tolist() for a, b in itertools.pairwise(borders)]
        assert cut == [bag(name, row) for row in range(5, 9)]
    assert arrays.bags["c2"].weights is None
    assert arrays.bags["c4"].weights[:].tolist() == [w for row in range(5, 9) for w in weights("c4", row)]


def test_a_day_that_starts_inside_its_files(tmp_path):
    data = halved(tmp_path / "data", 7)
    assert data.days("test") == (Day(stem="day_1", start=4, rows=3, positives=1),)
    assert data.arrays(data.days("test")[0]).dense.shape == (7, 2)


def test_a_folder_of_version_1_still_opens(tmp_path):
    data = make(tmp_path / "data", (5, 4), version=1)
    assert "sha256" not in json.loads((data.folder / "manifest.json").read_text())
    assert data.days("train") == (Day(stem="day_0", rows=5, positives=2), Day(stem="day_1", rows=4, positives=1))
    assert data.arrays(data.days("train")[0]).sparse[4].tolist() == ids(4)


def test_a_split_may_be_empty(tmp_path):
    path = make(tmp_path / "data", (5,)).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["test"] = []
    path.write_bytes(seal(manifest))
    data = PreparedData.open(path.parent)
    assert (data.days("test"), data.rows("test")) == ((), 0)


def test_the_seal_is_the_checksum_of_the_rest(tmp_path):
    make(tmp_path / "data", (5,))
    content = (tmp_path / "data" / "manifest.json").read_bytes()
    manifest = json.loads(content)
    assert list(manifest)[-1] == "sha256"
    zeros = content.replace(manifest["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeros).hexdigest() == manifest["sha256"]
    assert zeros == (json.dumps({**manifest, "sha256": "0" * 64}, indent=2) + "\n").encode()
    assert seal(manifest) == content


def test_every_changed_byte_of_the_manifest_is_noticed(tmp_path):
    path = make(tmp_path / "data", (5,)).folder / "manifest.json"
    content = path.read_bytes()
    draw = random.Random(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        assert not check_seal(bytes(changed)), place
    for changed in (content[:-1], content + b"\n", content[1:], b"", content.replace(b'"sha256": "', b'"sha256":  "')):
        assert not check_seal(changed)
    path.write_bytes(content.replace(b'"rows": 5', b'"rows": 4'))
    wanted = f"{path}: the manifest is damaged (its checksum does not fit)" + AGAIN
    assert refusal(lambda: PreparedData.open(path.parent)) == wanted


def test_a_huge_manifest_is_not_read(tmp_path, monkeypatch):
    path = make(tmp_path / "data", (5,)).folder / "manifest.json"
    monkeypatch.setattr(prepared, "MAX_MANIFEST_BYTES", 1 << 20)
    path.write_bytes(b" " * (1 << 20) + path.read_bytes())
    assert (
        refusal(lambda: PreparedData.open(path.parent))
        == f"{path}: the manifest can't be read (larger than 1 MiB)" + AGAIN
    )


def test_bag_borders_that_do_not_fit(tmp_path):
    data = make(tmp_path / "data", (5, 4), LISTS)
    (day, _) = data.days("train")
    path = data.folder / "day_0_offsets_1.npy"
    whole = np.load(path)
    for change, message in (
        (np.array([1, *whole[1:]]), f"{path}: the borders run from 1 to {whole[-1]} and must begin at 0"),
        (np.array([*whole[:-1], -3]), f"{path}: the borders run from 0 to -3 and must begin at 0"),
        (whole[:-1], f"{path}: expected int64 of shape (6,), found int64 of shape (5,)"),
        (whole.astype(np.int32), f"{path}: expected int64 of shape (6,), found int32 of shape (6,)"),
    ):
        np.save(path, change)
        assert refusal(lambda: data.arrays(day)) == message + AGAIN
    np.save(path, np.array([*whole[:-1], whole[-1] + 1]))
    wanted = f"{data.folder / 'day_0_ids_1.npy'}: expected int32 of shape ({whole[-1] + 1},), found int32 of shape "
    assert refusal(lambda: data.arrays(day)).startswith(wanted)


def test_unknown_split(tmp_path):
    data = make(tmp_path / "data", (5,))
    wanted = f"{data.folder}: unknown split 'val'; choose one of train, validation, test"
    assert refusal(lambda: data.rows("val")) == wanted


def test_no_folder_and_no_manifest(tmp_path):
    missing = tmp_path / "missing"
    assert refusal(lambda: PreparedData.open(missing)) == f"{missing}: no such folder; make it with prepare"
    assert refusal(lambda: PreparedData.open(tmp_path)) == (
        f"{tmp_path}: not a prepared folder, manifest.json is missing; make one with prepare"
    )
    assert refusal(lambda: prepared.read_manifest(tmp_path)) == refusal(lambda: PreparedData.open(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udce9"])
def test_broken_json(tmp_path, text):
    make(tmp_path / "data", (5,))
    path = tmp_path / "data" / "manifest.json"
    path.write_text(text, errors="surrogateescape")
    message = refusal(lambda: PreparedData.open(tmp_path / "data"))
    assert message.startswith(f"{path}: the manifest is not ")
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
        {
            "splits": {
                "train": [{"stem": "day_0", "rows": 5, "start": -1}],
                "validation": [],
                "test": [],
            }
        },
        {"splits": {"train": [{"stem": "..", "rows": 5, "positives": 1}], "validation": [], "test": []}},
        {"splits": {"train": [{"stem": "day_7", "rows": 5, "positives": 1}], "validation": [], "test": []}},
        {
            "splits": {
                "train": [{"stem": "day_0", "rows": 3, "positives": 1}],
                "validation": [{"stem": "day_0", "rows": 3, "start": 2, "positives": 1}],
                "test": [],
            }
        },
        {"num_embeddings": {"c1": 3}},
        {"num_embeddings": {"c1": 0, "c2": 7, "c3": 11}},
        {"num_embeddings": {"c1": "many", "c2": 7, "c3": 11}},
        {"files": []},
        {"files": {"../../elsewhere": {"bytes": 1, "sha256": ""}}},
        {"files": {"/elsewhere": {"bytes": 1, "sha256": ""}}},
        {"format_version": 3},
    ],
    ids=str,
)
def test_damaged_manifest(tmp_path, change):
    make(tmp_path / "data", (5,))
    path = tmp_path / "data" / "manifest.json"
    path.write_bytes(seal({**json.loads(path.read_text()), **change}))
    message = refusal(lambda: PreparedData.open(tmp_path / "data"))
    assert message.startswith(f"{path}: ")
    assert "checksum" not in message


@pytest.mark.parametrize("name", ["../outside.npy", "/outside.npy", "..", ".", "", "a/b.npy", "a\\b.npy", "a\0"])
def test_no_file_outside_the_folder_is_looked_at(tmp_path, name):
    path = make(tmp_path / "data", (5,)).folder / "manifest.json"
    (tmp_path / "outside.npy").write_bytes(b"1234567")
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 7, "sha256": ""}
    path.write_bytes(seal(manifest))
    message = refusal(lambda: PreparedData.open(path.parent))
    assert message == f"{path}: the manifest is damaged (ValueError: {name!r} is not a file name)" + AGAIN


def test_missing_and_short_files(tmp_path):
    make(tmp_path / "data", (5,))
    path = tmp_path / "data" / "day_0_sparse.npy"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal(lambda: PreparedData.open(path.parent)) == (
        f"{path}: the file has {size - 4} bytes, the manifest lists {size}" + AGAIN
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
        assert refusal(lambda: data.arrays(day)).startswith(f"{path}: not a complete .npy array (")
    np.save(path, np.array([{"pickled": 1}] * 5), allow_pickle=True)
    assert refusal(lambda: data.arrays(day)).startswith(f"{path}: not a complete .npy array (")
    np.save(path, np.zeros((5, 1), np.int32))
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(lambda: data.arrays(day)).startswith(f"{path}: not a complete .npy array (")
    path.unlink()
    assert refusal(lambda: data.arrays(day)) == f"{path}: the file is missing" + AGAIN

"""Mapped arrays against numpy's own reader, and files that are none or that want to be unpickled."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from torchrec_deepfm.data.dataset.npy_mmap import map_npy, map_npz
from torchrec_deepfm.errors import UserError

ARRAYS = {
    "float32": np.arange(60, dtype=np.float32).reshape(20, 3),
    "int64": np.arange(40).reshape(20, 2) - 7,
    "float64, one axis": np.arange(20) / 3,
    "int8": np.arange(20, dtype=np.int8).reshape(20, 1),
    "no columns": np.zeros((20, 0), np.int32),
    "no rows": np.zeros((0, 5), np.int32),
}
ROWS = np.array([3, 0, 19, 3, 7])


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def refusal(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(rows, array):
    assert rows.shape == array.shape
    assert rows.dtype == array.dtype
    assert np.array_equal(np.asarray(rows), array)
    assert len(rows) == len(array)
    assert np.array_equal(rows.stretch(0, len(array)), array)
    if len(array):
        assert np.array_equal(rows.stretch(4, 9), array[4:9])
        taken = rows.take(ROWS)
        assert np.array_equal(taken, array[ROWS])
        assert taken.flags.aligned
        rows.will_need(2, 20)
        rows.release()
        assert np.array_equal(rows.take(ROWS), array[ROWS])
        assert not rows.array.flags.writeable or array.size == 0


@pytest.mark.parametrize("name", ARRAYS)
def test_npy(tmp_path, name):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    check(map_npy(tmp_path / "a.npy", "fix it"), ARRAYS[name])


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_versions_of_the_format(tmp_path, version):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, ARRAYS["int64"], version=version)
    check(map_npy(tmp_path / "a.npy", "fix it"), ARRAYS["int64"])


def test_npz(tmp_path):
    """Members of an archive lie at any byte: some of these are not aligned."""
    np.savez(tmp_path / "a.npz", **ARRAYS)
    mapped = map_npz(tmp_path / "a.npz", "fix it")
    assert set(mapped) == set(ARRAYS)
    assert not all(rows.array.flags.aligned for rows in mapped.values())
    for name, rows in mapped.items():
        check(rows, ARRAYS[name])


def test_rows_are_taken_without_a_copy_of_the_whole(tmp_path):
    """numpy's own take() would copy an array that is not aligned."""
    array = np.arange(1 << 20, dtype=np.int32).reshape(-1, 4)
    names = ["a", "bb", "ccc", "dddd"]
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, array))
    mapped = map_npz(tmp_path / "a.npz", "fix it")
    assert not all(rows.array.flags.aligned for rows in mapped.values())
    for rows in mapped.values():
        tracemalloc.start()
        assert np.array_equal(rows.take(ROWS), array[ROWS])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000


def test_a_compressed_archive_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **{"0": ARRAYS["int64"]})
    assert refusal(lambda: map_npz(tmp_path / "a.npz", "fix it")) == (
        f"{tmp_path / 'a.npz'}[0]: the array is compressed and can't be read row by row; "
        "write the archive with numpy.savez instead of savez_compressed"
    )


def test_nothing_is_unpickled(tmp_path):
    target = tmp_path / "ran"
    bomb = np.array([Bomb(target)] * 5)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "a.npz", **{"0": bomb})
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb(target)))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("0.npy", pickle.dumps(Bomb(target)))
    for name in ("a", "b"):
        assert "not a complete .npy array" in refusal(lambda name=name: map_npy(tmp_path / f"{name}.npy", "fix it"))
        assert "not a complete .npy array" in refusal(lambda name=name: map_npz(tmp_path / f"{name}.npz", "fix it"))
    wanted = "it holds pickled objects, which are never read"
    assert wanted in refusal(lambda: map_npy(tmp_path / "a.npy", "fix it"))
    assert wanted in refusal(lambda: map_npz(tmp_path / "a.npz", "fix it"))
    assert not target.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)  # the bomb is a real one
    assert target.exists()


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (np.asfortranarray(ARRAYS["int64"]), "it is in Fortran order, store numpy.ascontiguousarray of it"),
        (np.zeros((2, 2), ">i4"), "its type is >i4"),
        (np.zeros(3, "U4"), "its type is <U4"),
        (np.zeros((2, 2, 2)), "its shape is (2, 2, 2)"),
        (np.float32(1), "its shape is ()"),
    ],
)
def test_other_arrays(tmp_path, array, fault):
    path = tmp_path / "a.npy"
    np.save(path, array)
    assert refusal(lambda: map_npy(path, "fix it")) == f"{path}: not a complete .npy array ({fault}); fix it"


def header(text: str) -> bytes:
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + b"\0" * 100,
        header("__import__('os')"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 9)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 9)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': 'all'}"),
        header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}"),
        header("(" * 5000),
    ],
)
def test_broken_files(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    assert refusal(lambda: map_npy(path, "fix it")).startswith(f"{path}: not a complete .npy array (")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("0.npy", content)
    wanted = f"{tmp_path / 'a.npz'}[0]: not a complete .npy array ("
    assert refusal(lambda: map_npz(tmp_path / "a.npz", "fix it")).startswith(wanted)


def test_every_truncation_is_noticed(tmp_path):
    for name, mapping in (("a.npy", map_npy), ("a.npz", map_npz)):
        content = io.BytesIO()
        (np.save if name == "a.npy" else lambda file, array: np.savez(file, **{"0": array}))(content, ARRAYS["int64"])
        path = tmp_path / name
        for length in range(len(content.getvalue())):
            path.write_bytes(content.getvalue()[:length])
            assert str(path) in refusal(lambda mapping=mapping, path=path: mapping(path, "fix it"))


def test_missing_files(tmp_path):
    path = tmp_path / "a.npy"
    assert refusal(lambda: map_npy(path, "fix it")) == f"{path}: the file is missing; fix it"
    assert refusal(lambda: map_npz(path, "fix it")) == f"{path}: the file is missing; fix it"
    path.mkdir()
    assert refusal(lambda: map_npy(path, "fix it")).startswith(f"{path}: the file can't be read (")


def test_a_file_that_shrinks(tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS["int64"])
    rows = map_npy(tmp_path / "a.npy", "fix it")
    rows.check_whole()
    os.truncate(tmp_path / "a.npy", 200)
    assert refusal(rows.check_whole).startswith(f"{tmp_path / 'a.npy'}: the file became shorter while it was read")

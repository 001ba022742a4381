"""A byte that flips anywhere in a folder is found; so is a file too many or too few."""

import random
import shutil

import pytest

from tests.data.prepare.test_prepare import write
from tests.support.data.raw_oracle import SMALL, random_text
from torchrec_deepfm.data.dataset.verify import verify
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return prepare(write(tmp_path, a=random_text(60, 0, SMALL)), tmp_path / "out", schema=SMALL, min_count=2).folder


def test_a_good_folder(folder):
    assert verify(folder) == len(list(folder.iterdir())) - 1


def test_every_flipped_byte_of_small_files_and_many_of_the_others(folder):
    draw = random.Random(0)
    flips = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in draw.sample(range(len(content)), min(len(content), 40)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                verify(folder)
            assert path.name in str(caught.value)
            assert "\n" not in str(caught.value)
            flips += 1
        path.write_bytes(content)
    assert flips > 500
    verify(folder)


def test_every_byte_of_the_manifest(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            verify(folder)


def test_missing_short_and_strange_files(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt: the manifest does not list this file; remove it"):
        verify(folder)
    (folder / "notes.txt").unlink()
    (folder / "day_0_dense.npy").unlink()
    with pytest.raises(UserError, match=r"day_0_dense.npy: the file is missing"):
        verify(folder)
    short = tmp_path / "copy" / "day_0_labels.npy"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"day_0_labels.npy: the file has "):
        verify(tmp_path / "copy")
    with pytest.raises(UserError, match=r"no such folder"):
        verify(tmp_path / "nowhere")


def test_several_faults_are_counted(folder):
    for name in ("day_0_dense.npy", "day_0_sparse.npy", "day_0_labels.npy"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"\(SHA-256 differs\); prepare the data again \(2 more such files\)"):
        verify(folder)

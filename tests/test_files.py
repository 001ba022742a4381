"""The one writer of small files: complete or absent, and never through a symbolic link."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_deepfm.data.prepare.passes.npy_appender import GrowingArray
from torchrec_deepfm.distributed.run_lock import RunLock
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import is_partial, read_bytes, regular_file, write_bytes
from torchrec_deepfm.training.run.tracking.progress import Progress

# Writes and is killed before the rename.
KILLED = """
import os, signal, sys
from pathlib import Path
from torchrec_deepfm import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes(Path(sys.argv[1]), b"new")
"""


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert read_bytes(path, most=3) == b"new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="larger than"):
        read_bytes(path, most=2)


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_bytes(path, b"old")
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert path.read_bytes() == b"old"
    [left] = [each.name for each in tmp_path.iterdir() if each != path]
    assert is_partial(left)
    assert not is_partial("summary.json.partial")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "config.json").symlink_to(tmp_path / "mine")
    write_bytes(tmp_path / "config.json", b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "config.json").is_symlink()


@pytest.mark.parametrize("target", ["mine", "absent"])
@pytest.mark.parametrize("mode", ["a", "w", "x", "r+", "a+"])
def test_no_mode_writes_through_a_link(tmp_path: Path, mode: str, target: str) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(OSError, match=r"symbolic link|File exists"), open(tmp_path / "link", mode, opener=regular_file):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("mode", ["r", "a", "r+"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, mode: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="fifo is not a regular file"), open(tmp_path / "fifo", mode, opener=regular_file):
        pass
    with pytest.raises(OSError, match="full is not a regular file"), open("/dev/full", mode, opener=regular_file):
        pass
    with pytest.raises(IsADirectoryError), open(tmp_path, mode, opener=regular_file):
        pass


def test_files_that_stay_open_are_not_links(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in (".lock", "metrics.jsonl", "day_dense.npy"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"\(\.lock is a symbolic link\)"):
        RunLock(tmp_path)
    with pytest.raises(UserError, match=r"\(metrics\.jsonl is a symbolic link\); remove the link"):
        Progress(tmp_path, 1)
    with pytest.raises(OSError, match=r"symbolic link"):
        GrowingArray(tmp_path / "day_dense.npy", (1,), "float32")
    assert (tmp_path / "mine").read_text() == "mine"

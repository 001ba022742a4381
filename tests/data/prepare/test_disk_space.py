"""Disks that are full, can't be written or are too small: one line, and the same command resumes."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.data.prepare.test_prepare import small_pieces, write
from tests.data.prepare.test_resume import interrupted
from tests.support.data.raw_oracle import SMALL, random_text
from tests.support.data.stopped_prepare import content
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.data.dataset.publish import disk_errors
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.errors import UserError


def test_what_was_there_before_outlives_any_refusal(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(300, 0, SMALL))
    interrupted(tmp_path, monkeypatch, paths, schema=SMALL)
    before = content(tmp_path / ".out.partial" / "out")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        with pytest.raises(UserError, match=r"of disk"):
            prepare(paths, tmp_path / "out", schema=SMALL)
    assert content(tmp_path / ".out.partial" / "out") == before
    prepare(paths, tmp_path / "out", schema=SMALL)


def test_an_output_that_is_a_mount_point(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(UserError, match=r"out: a mount point can't be created by a rename"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert sorted(tmp_path.iterdir()) == paths


def test_what_does_not_fit_in_memory_is_spilled(tmp_path, monkeypatch):
    values = random.Random(0).sample(range(2**32), 500_000)
    text = "".join(f"{i % 2}\t\t\t{value:x}\t{value:x}\t1\n" for i, value in enumerate(values)).encode()
    paths = write(tmp_path, a=text)
    options = {"schema": SMALL, "min_count": 1, "split": "none", "threads": 1}
    whole = content(prepare(paths, tmp_path / "whole", **options).folder)
    monkeypatch.setattr(module, "DUCKDB_SHARE", (20 << 20) / PrepareOptions().memory_bytes)
    assert content(prepare(paths, tmp_path / "spilled", **options).folder) == whole
    # That it had to: without a place to spill to, it stops, and keeps what is done.
    monkeypatch.setattr(WorkFolder, "share", lambda _: None)
    with pytest.raises(UserError, match=r"DuckDB stopped .*; finished work is kept in"):
        prepare(paths, tmp_path / "not", **options)
    monkeypatch.undo()
    assert content(prepare(paths, tmp_path / "not", **options).folder) == whole


# Files of at most so many bytes stand for a full disk where no file system can be mounted. Every write beyond fails, in
# whatever library; the signal that goes with it is ignored by Python.
LIMITED = """
import resource, sys
from pathlib import Path
from torchrec_deepfm.cli import main as cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("mode", [[], ["--hash", "--num-embeddings", "1000"], ["--numeric", "log"]], ids=" ".join)
def test_no_room_for_a_file(tmp_path, mode):
    paths = write(tmp_path, **{f"day_{i}": random_text(400 * (1 + 4 * i), i) for i in range(2)})
    paths = [path.rename(path.with_suffix("")) for path in paths]
    command = ["prepare", "--input", *map(str, paths), "--split", "none", *mode, "--output"]
    limit = str(400 * 26 * 4 + 10_000)  # enough for the arrays of the first day

    limited = [sys.executable, "-c", LIMITED, limit, *command, str(tmp_path / "out")]
    failed = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert failed.returncode == 2, failed.stderr
    (line,) = failed.stderr.splitlines()
    assert "no space left on the device; free some or name another output" in line
    assert line.endswith(f"finished work is kept in {tmp_path / '.out.partial'}, run the same command to resume")
    assert not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        cli.main([*command, str(tmp_path / name)])
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_file_system(tmp_path):
    """The same on a file system of 3 MB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here; test_no_room_for_a_file stands in")
    try:
        paths = write(tmp_path, a=random_text(40_000, 0, SMALL))
        filler = disk / "filler"
        filler.write_bytes(bytes(2_500_000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "check_room", lambda *_: None)  # or it would not even start
            small_pieces(patch, piece_bytes=20_000)
            with pytest.raises(UserError, match=r"no space left on the device"):
                prepare(paths, disk / "out", schema=SMALL, min_count=1)
            assert not (disk / "out").exists()
            assert WorkFolder(disk / "out").begun()
            filler.unlink()
            found = content(prepare(paths, disk / "out", schema=SMALL, min_count=1).folder)
        assert found == content(prepare(paths, tmp_path / "whole", schema=SMALL, min_count=1).folder)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_polars_says_of_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        text = pl.DataFrame({"c0": [f"{i * 7919 % 1_000_003:x}" for i in range(400_000)]})
        with pytest.raises(UserError, match=r"no space left on the device; free some"), disk_errors(disk / "out"):
            text.write_parquet(disk / "000000.parquet", compression="lz4", statistics=False)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_room_is_checked_before_the_start(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(20_000, 0, SMALL))
    usage = shutil.disk_usage(tmp_path)
    needed = 20_000 * 4 * (1 + 2 + 2 * 3)  # label, numbers, ids, and the staged values
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match=r"out: needs about .* KiB of disk, 703.1 KiB are free; free some"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert sorted(tmp_path.iterdir()) == paths
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed * 2))
    prepare(paths, tmp_path / "out", schema=SMALL)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    for number, text in (
        (errno.ENOSPC, "no space left on the device"),
        (errno.EROFS, "the folder can't be written (Read-only file system)"),
    ):

        def refused(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, "encode_stem", lambda *_, refused=refused, **__: refused())
        with pytest.raises(UserError) as caught:
            prepare(paths, tmp_path / "out", schema=SMALL)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

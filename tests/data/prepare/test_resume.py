"""Killed anywhere, refused by a full disk, begun by one process and ended by another: the folder ends up the same."""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import polars as pl
import pytest

from tests.data.prepare.test_prepare import small_pieces, write
from tests.support.raw_oracle import SMALL, random_text
from tests.support.stopped_prepare import content, stop_at_each_record
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.data.dataset.publish import disk_errors
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.options import PrepareOptions
from torchrec_deepfm.data.prepare.passes import stage
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.sources.provenance import difference
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal

KILLS = 20


def run(paths, output, options) -> None:
    """prepare with many small pieces; what the processes that are killed run."""
    small_pieces(pytest.MonkeyPatch(), piece_bytes=20_000, block_rows=100)
    prepare(paths, output, **options)


MODES = {
    "vocabulary": {"min_count": 2},
    "hash": {"hash": True, "num_embeddings": 1000, "numeric_transform": "quantile"},
    "log": {"min_count": 1, "numeric_transform": "log", "split": "last-day"},
}


@pytest.mark.campaign
def test_twenty_kills_twenty_identical_folders(tmp_path):
    """SIGKILL at random moments, up to three in a row, then a run to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrec_deepfm.data.prepare.prepare", "tests.data.prepare.test_resume"])
    paths = write(tmp_path, **{f"day_{i}": random_text(700, i) for i in range(2)})
    paths = [path.rename(path.with_suffix("")) for path in paths]
    draw = random.Random(0)
    whole, seconds = {}, {}
    for name, options in MODES.items():
        for _ in range(2):  # the first one warms up
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            started = time.monotonic()
            process = context.Process(target=run, args=(paths, tmp_path / name, options))
            process.start()
            process.join()
            assert process.exitcode == 0
            seconds[name] = time.monotonic() - started
        whole[name] = content(tmp_path / name)
    killed = resumed = 0
    while killed < KILLS:
        name = draw.choice(list(MODES))
        output = tmp_path / "killed"
        for _ in range(draw.randint(1, 3)):
            process = context.Process(target=run, args=(paths, output, MODES[name]))
            process.start()
            process.join(draw.uniform(0, seconds[name]))
            if process.is_alive():
                process.kill()
                killed += 1
                resumed += WorkFolder(output).begun() is not None
            process.join()
            assert not output.exists() or content(output) == whole[name]  # whole, or not there
        process = context.Process(target=run, args=(paths, output, MODES[name]))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert content(output) == whole[name], name
        assert not WorkFolder(output).path.exists()
        shutil.rmtree(output)
    assert resumed >= KILLS // 4, "the kills came too early to prove anything"


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.campaign] * (mode != "vocabulary")) for mode in MODES]
)
def test_a_kill_after_every_record(tmp_path, monkeypatch, mode):
    """Stopped right after each record is written, and right before."""
    small_pieces(monkeypatch, piece_bytes=3000, block_rows=100)
    options = {**MODES[mode], "schema": SMALL}
    paths = write(tmp_path, **{f"day_{i}": random_text(150, i, SMALL) for i in range(2)})
    paths = [path.rename(path.with_suffix("")) for path in paths]
    stops = sum(
        stop_at_each_record(lambda folder: prepare(paths, folder, **options), tmp_path / "out", before=before)
        for before in (True, False)
    )
    assert stops > 20


def test_it_goes_on_from_the_last_piece(tmp_path, monkeypatch):
    small_pieces(monkeypatch, piece_bytes=2000)
    (path,) = write(tmp_path, a=random_text(1000, 0, SMALL))
    options = {"schema": SMALL, "hash": True, "num_embeddings": 10, "split": "none"}
    whole = content(prepare([path], tmp_path / "whole", **options).folder)
    add, starts = stage.Stager._add, []

    def adding(self, unit, piece, files, record):
        starts.append(record.start[1])
        if len(starts) == 8:
            raise KeyboardInterrupt
        add(self, unit, piece, files, record)

    monkeypatch.setattr(stage.Stager, "_add", adding)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], tmp_path / "out", **options)
    lines = []
    assert content(prepare([path], tmp_path / "out", report=lines.append, **options).folder) == whole
    assert starts[8] == starts[7] > 0  # the eighth piece is the first one that is read again
    assert len(set(starts)) == len(starts) - 1
    assert lines[0] == f"resuming in {tmp_path / '.out.partial'}"


def test_a_finished_folder_is_left_alone(tmp_path):
    paths = write(tmp_path, a=random_text(200, 0, SMALL))
    first = prepare(paths, tmp_path / "out", schema=SMALL)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    lines = []
    assert prepare(paths, tmp_path / "out", schema=SMALL, report=lines.append).rows("train") == first.rows("train")
    assert lines == [f"{tmp_path / 'out'} is finished already"]
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    for options in ({"schema": SMALL, "min_count": 3}, {"schema": SMALL, "numeric_transform": "none"}, {}):
        with pytest.raises(UserError, match=r"the output folder is not empty"):
            prepare(paths, tmp_path / "out", **options)
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_a_source_that_changed_since_the_folder_was_finished(tmp_path):
    paths = write(tmp_path, **{name: random_text(200, seed, SMALL) for seed, name in enumerate("ab")})
    prepare(paths, tmp_path / "out", schema=SMALL)
    text, before = paths[1].read_bytes(), content(tmp_path / "out")
    paths[1].write_bytes(text.replace(b"1", b"0", 1) if text.startswith(b"1") else b"1" + text[1:])
    with pytest.raises(UserError) as caught:
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: it was made from other content of {paths[1]} (other content); "
        "name another output, or remove this one to prepare again"
    )
    paths[1].write_bytes(text + b"\n")
    with pytest.raises(UserError, match=rf"{paths[1]} \([\d,]+ bytes then, [\d,]+ now\)"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert content(tmp_path / "out") == before


def test_a_copy_of_a_source_is_the_same_where_its_digest_says_so(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(200, 0, SMALL))
    prepare(paths, tmp_path / "out", schema=SMALL)
    os.utime(paths[0], (1, 1))
    lines = []
    prepare(paths, tmp_path / "out", schema=SMALL, report=lines.append)
    assert lines == [f"{tmp_path / 'out'} is finished already"]
    # Where head and tail are not all of it, the middle could be other bytes.
    monkeypatch.setattr("torchrec_deepfm.data.prepare.sources.provenance.EDGE_BYTES", 100)
    paths[0].write_bytes(random_text(200, 0, SMALL))
    prepare(paths, tmp_path / "large", schema=SMALL)
    os.utime(paths[0], (1, 1))
    with pytest.raises(UserError, match=r"a.tsv \(another time of modification\); name another output"):
        prepare(paths, tmp_path / "large", schema=SMALL)


def test_folders_of_earlier_versions_know_names_and_sizes(tmp_path):
    paths = write(tmp_path, a=random_text(200, 0, SMALL))
    prepare(paths, tmp_path / "out", schema=SMALL)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["made"]["sources"]["train"] = [{"name": "a.tsv", "bytes": paths[0].stat().st_size}]
    (tmp_path / "out" / "manifest.json").write_bytes(seal(manifest))
    lines = []
    prepare(paths, tmp_path / "out", schema=SMALL, report=lines.append)
    assert lines == [f"{tmp_path / 'out'} is finished already"]


def test_a_source_at_an_address(tmp_path):
    schema = Schema(label="y", numeric=("n",), categorical=("c",), layout="table")
    files = fsspec.filesystem("memory")
    files.pipe("/a.csv", b"y,n,c\n" + b"1,2,a\n0,1,b\n" * 50)
    prepare(["memory://a.csv"], tmp_path / "out", schema=schema, min_count=1)
    prepare(["memory://a.csv"], tmp_path / "out", schema=schema, min_count=1)
    files.pipe("/a.csv", b"y,n,c\n" + b"1,2,a\n0,9,b\n" * 50)
    with pytest.raises(UserError, match=r"other content of memory://a.csv \(other content\)"):
        prepare(["memory://a.csv"], tmp_path / "out", schema=schema, min_count=1)
    assert difference({"bytes": 3, "etag": "a"}, {"bytes": 3, "etag": "b"}) == "another ETag"
    assert not difference({"bytes": 3, "etag": "a"}, {"bytes": 3, "etag": "a"})


@pytest.mark.parametrize("change", ["grows", "changes"])
def test_a_source_that_is_written_while_it_is_read(tmp_path, monkeypatch, change):
    text = random_text(400, 0, SMALL)
    (path,) = write(tmp_path, a=text)
    small_pieces(monkeypatch, piece_bytes=2000)
    add = stage.Stager._add

    def adding(self, unit, piece, files, record):
        path.write_bytes(text + text[:1000] if change == "grows" else text[:-9] + text[-9:][::-1])
        add(self, unit, piece, files, record)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Stager, "_add", adding)
        with pytest.raises(UserError, match=r"a.tsv has changed \(.*\) while it was read; run the same command again"):
            prepare([path], tmp_path / "out", schema=SMALL)
    assert not (tmp_path / "out").exists()
    path.write_bytes(random_text(300, 1, SMALL))
    found = content(prepare([path], tmp_path / "out", schema=SMALL).folder)
    assert found == content(prepare([path], tmp_path / "whole", schema=SMALL).folder)


def interrupted(tmp_path, monkeypatch, paths, **options):
    """Stop a prepare when it has staged everything."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "days_of_splits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(paths, tmp_path / "out", **options)


def test_other_options_over_unfinished_work(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(200, 0, SMALL))
    interrupted(tmp_path, monkeypatch, paths, schema=SMALL)
    work = tmp_path / ".out.partial"
    before = content(work)
    with pytest.raises(UserError) as caught:
        prepare(paths, tmp_path / "out", schema=SMALL, min_count=3, seed=1)
    assert str(caught.value) == (
        f"{work}: an unfinished prepare of out differs in min_count, seed; "
        "run it with its own options, or remove this folder to start again"
    )
    assert content(work) == before
    # Leaving out bad rows is no other work: that is what the message over a bad row proposes.
    prepare(paths, tmp_path / "out", schema=SMALL, on_bad_row="skip")


def test_a_source_that_changed_is_read_anew(tmp_path, monkeypatch):
    texts = {name: random_text(200, seed, SMALL) for seed, name in enumerate("ab")}
    paths = write(tmp_path, **texts)
    interrupted(tmp_path, monkeypatch, paths, schema=SMALL)
    paths[1].write_bytes(random_text(150, 9, SMALL))
    lines = []
    found = content(prepare(paths, tmp_path / "out", schema=SMALL, report=lines.append).folder)
    assert re.fullmatch(rf"{paths[1]} has changed \([\d,]+ bytes then, [\d,]+ now\): reading it anew", lines[1])
    assert not any(line.startswith(f"read {paths[0]}") for line in lines)
    assert found == content(prepare(paths, tmp_path / "whole", schema=SMALL).folder)


def test_a_repaired_line_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrec_deepfm.data.prepare.work_folder.WORTH_KEEPING", 1)
    good, bad = write(tmp_path, a=random_text(200, 0, SMALL), b=random_text(100, 1, SMALL) + b"x\n")
    with pytest.raises(UserError, match=r"b.tsv: line 101 has 1 columns"):
        prepare([good, bad], tmp_path / "out", schema=SMALL)
    bad.write_bytes(random_text(100, 1, SMALL))
    lines = []
    found = content(prepare([good, bad], tmp_path / "out", schema=SMALL, report=lines.append).folder)
    assert not any(line.startswith(f"read {good}") for line in lines)
    assert found == content(prepare([good, bad], tmp_path / "whole", schema=SMALL).folder)


def test_a_kill_while_changed_sources_are_forgotten(tmp_path, monkeypatch):
    """Whatever of the forgetting is done, the next call finds the change again."""
    texts = {name: random_text(200, seed, SMALL) for seed, name in enumerate("ab")}
    paths = write(tmp_path, **texts)
    new = random_text(150, 9, SMALL)
    whole = None
    for stop in range(1, 12):
        paths[1].write_bytes(texts["b"])
        with monkeypatch.context() as patch:  # everything is encoded and summed
            patch.setattr(module.Job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(paths, tmp_path / "out", schema=SMALL)
        paths[1].write_bytes(new)
        count = 0
        with monkeypatch.context() as patch:
            for owner, name in ((WorkFolder, "forget"), (WorkFolder, "write_record"), (Path, "unlink")):
                do = getattr(owner, name)

                def counted(*arguments, do=do, stop=stop, **options):
                    nonlocal count
                    count += 1
                    if count == stop:
                        raise KeyboardInterrupt
                    return do(*arguments, **options)

                patch.setattr(owner, name, counted)
            with pytest.raises(KeyboardInterrupt):
                prepare(paths, tmp_path / "out", schema=SMALL)
        found = content(prepare(paths, tmp_path / "out", schema=SMALL).folder)
        whole = whole or content(prepare(paths, tmp_path / "whole", schema=SMALL).folder)
        assert found == whole, stop
        shutil.rmtree(tmp_path / "out")


def test_a_work_folder_whose_output_was_taken_away(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(200, 0, SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(paths, tmp_path / "out", schema=SMALL)  # killed between the rename and the cleaning
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert content(prepare(paths, tmp_path / "out", schema=SMALL).folder) == content(tmp_path / "elsewhere")


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


def test_rows_that_were_skipped_are_told_without_skipping(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(300, 0, SMALL) + b"x\n")
    interrupted(tmp_path, monkeypatch, paths, schema=SMALL, on_bad_row="skip")
    with pytest.raises(UserError, match=r"line 301 has 1 columns"):
        prepare(paths, tmp_path / "out", schema=SMALL)


def test_an_output_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "data").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    prepare(paths, tmp_path / "out", schema=SMALL, min_count=1)
    assert (tmp_path / "disk" / "data" / "manifest.json").exists()
    assert (tmp_path / "out").is_symlink()


def test_an_output_that_is_a_mount_point(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(UserError, match=r"out: a mount point can't be created by a rename"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("name", ["lock", "worker"])  # rank 0 holds both, the others the second
def test_two_processes_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr("torchrec_deepfm.data.prepare.work_folder.LOCK_SECONDS", 0.2)
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    work = WorkFolder(tmp_path / "out")
    work.enter({})
    work.share()
    for file in list(work._locks):
        if Path(file.name).name != name:
            file.close()
    with pytest.raises(UserError, match=r"another process is preparing it"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    work.leave()


def test_what_does_not_fit_in_memory_is_spilled(tmp_path, monkeypatch):
    values = random.Random(0).sample(range(2**32), 500_000)
    text = "".join(f"{i % 2}\t\t\t{value:x}\t{value:x}\t1\n" for i, value in enumerate(values)).encode()
    paths = write(tmp_path, a=text)
    options = {"schema": SMALL, "min_count": 1, "split": "none", "threads": 1}
    whole = content(prepare(paths, tmp_path / "whole", **options).folder)
    monkeypatch.setattr(module, "DUCKDB_SHARE", (20 << 20) / PrepareOptions().memory_bytes)
    assert content(prepare(paths, tmp_path / "spilled", **options).folder) == whole
    # That it had to: without a place to spill to, it can't go on, and keeps what is done.
    monkeypatch.setattr(WorkFolder, "share", lambda _: None)
    with pytest.raises(UserError, match=r"DuckDB stopped .*; finished work is kept in"):
        prepare(paths, tmp_path / "not", **options)
    monkeypatch.undo()
    assert content(prepare(paths, tmp_path / "not", **options).folder) == whole


def test_two_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrec_deepfm.data.prepare.work_folder.LOCK_SECONDS", 0.2)
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    work = WorkFolder(tmp_path / "out")
    work.enter({})
    with pytest.raises(UserError, match=r"another process is preparing it"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert work.path.exists()
    work.leave()


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


def test_records_are_json_that_can_be_read(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    interrupted(tmp_path, monkeypatch, paths, schema=SMALL)
    record = tmp_path / ".out.partial" / "records" / "stage_train_0.json"
    assert json.loads(record.read_text())["rows"] == 100
    record.write_text("{")
    with pytest.raises(UserError, match=r"the file is damaged"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY

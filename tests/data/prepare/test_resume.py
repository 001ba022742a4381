"""Killed anywhere, refused by a full disk, begun by one process and ended by another: the folder ends up the same."""

import json
import multiprocessing
import random
import resource
import shutil
import time
from pathlib import Path

import pytest

from tests.data.prepare.test_prepare import small_pieces, write
from tests.support.data.raw_oracle import SMALL, random_text
from tests.support.data.stopped_prepare import content, stop_at_each_record
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.passes import stage
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.errors import UserError

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
    ("mode", "checksums"),
    [
        ("vocabulary", slice(None, None, 10)),
        *(pytest.param(mode, slice(None), marks=pytest.mark.campaign) for mode in MODES),
    ],
    ids=["some checksums", *MODES],
)
def test_a_kill_after_every_record(tmp_path, monkeypatch, mode, checksums):
    """Stopped right after each record is written, and right before."""
    small_pieces(monkeypatch, piece_bytes=3000, block_rows=100)
    options = {**MODES[mode], "schema": SMALL}
    paths = write(tmp_path, **{f"day_{i}": random_text(150, i, SMALL) for i in range(2)})
    paths = [path.rename(path.with_suffix("")) for path in paths]
    stops = sum(
        stop_at_each_record(
            lambda folder: prepare(paths, folder, **options), tmp_path / "out", before=before, checksums=checksums
        )
        for before in (True, False)
    )
    assert stops > 20


def test_it_resumes_from_the_last_piece(tmp_path, monkeypatch):
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
    # Leaving out bad rows is not other work: that is what the message over a bad row proposes.
    prepare(paths, tmp_path / "out", schema=SMALL, on_bad_row="skip")


def test_it_resumes_after_a_repaired_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrec_deepfm.data.prepare.work_folder.WORTH_KEEPING", 1)
    good, bad = write(tmp_path, a=random_text(200, 0, SMALL), b=random_text(100, 1, SMALL) + b"x\n")
    with pytest.raises(UserError, match=r"b.tsv: line 101 has 1 columns"):
        prepare([good, bad], tmp_path / "out", schema=SMALL)
    bad.write_bytes(random_text(100, 1, SMALL))
    lines = []
    found = content(prepare([good, bad], tmp_path / "out", schema=SMALL, report=lines.append).folder)
    assert not any(line.startswith(f"read {good}") for line in lines)
    assert found == content(prepare([good, bad], tmp_path / "whole", schema=SMALL).folder)


def test_a_work_folder_whose_output_was_taken_away(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(200, 0, SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(paths, tmp_path / "out", schema=SMALL)  # killed between the rename and the cleaning
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert content(prepare(paths, tmp_path / "out", schema=SMALL).folder) == content(tmp_path / "elsewhere")


def test_rows_that_were_skipped_are_reported_without_skipping(tmp_path, monkeypatch):
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


def test_two_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrec_deepfm.data.prepare.work_folder.LOCK_SECONDS", 0.2)
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    work = WorkFolder(tmp_path / "out")
    work.enter({})
    with pytest.raises(UserError, match=r"another process is preparing it"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert work.path.exists()
    work.leave()


def test_records_are_json_that_can_be_read(tmp_path, monkeypatch):
    paths = write(tmp_path, a=random_text(100, 0, SMALL))
    interrupted(tmp_path, monkeypatch, paths, schema=SMALL)
    record = tmp_path / ".out.partial" / "records" / "stage_train_0.json"
    assert json.loads(record.read_text())["rows"] == 100
    record.write_text("{")
    with pytest.raises(UserError, match=r"the file is damaged"):
        prepare(paths, tmp_path / "out", schema=SMALL)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY

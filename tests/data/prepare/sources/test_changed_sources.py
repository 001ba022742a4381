"""Sources that change while or after they are prepared: named, and read anew or refused."""

import json
import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest

from tests.data.prepare.test_prepare import small_pieces, write
from tests.data.prepare.test_resume import interrupted
from tests.support.data.raw_oracle import SMALL, random_text
from tests.support.data.stopped_prepare import content
from torchrec_deepfm.data.prepare import pipeline as module
from torchrec_deepfm.data.prepare.passes import stage
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.sources.provenance import difference
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal


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

"""A run on an S3 server: killed, resumed on another host, and used by every command that reads a run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import torch

from tests.faults.runs import make_data, read_tensors, records
from tests.support.fork import Fork
from tests.support.s3_server import FaultProxy
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.remote import cache
from torchrec_deepfm.remote.objects import Objects

RUN = "s3://bucket/runs/one"
OPTIONS = [
    "--recipe", "paper",
    "--factor-dim", "3", "--over-arch-layer-sizes", "4", "--batch-size", "50", "--epochs", "3", "--checkpoint-every",
    "20", "--max-ne", "100",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(s3: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of raw files, and the prepared data beside it and at an address."""
    folder = tmp_path_factory.mktemp("data") / "data"
    prepared = make_data(folder).folder
    Objects("s3://bucket/data").store(prepared, [path.name for path in prepared.iterdir()])
    Objects("s3://bucket/raw").store(folder, ["test.tsv"])
    return folder


@pytest.fixture(scope="module")
def run(s3: FaultProxy, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run: killed after its first checkpoint, and resumed with another cache."""
    words = ["train", "--data", "s3://bucket/data", "--output", RUN, *OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.FOLDER, str(tmp_path_factory.mktemp("host_1")))
        log = tmp_path_factory.mktemp("log") / "log"
        job = Fork(["torchrec_deepfm", *words], env=os.environ, stdout=log, stderr=log)
        until = time.monotonic() + 120
        while not any(method == "PUT" and "/checkpoint.json" in path for method, path, _ in s3.seen):
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
        job.wait(30)
        assert "summary.json" not in Objects(RUN).entries()
        patch.setenv(cache.FOLDER, str(tmp_path_factory.mktemp("host_2")))
        cli.main(words)
    return RUN


def test_a_killed_run_resumes_to_the_same_bits(
    run: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside, there = tmp_path / "run", tmp_path / "there"
    cli.main(["train", "--data", str(data / "prepared"), "--output", str(beside), *OPTIONS])
    capsys.readouterr()
    objects = Objects(run)
    names = [name for name in objects.entries() if not name.startswith("checkpoints/")]
    objects.fetch(names, there)
    expected = {path.relative_to(beside).as_posix() for path in beside.rglob("*") if path.is_file()}
    assert {name for name in names if "tfevents" not in name} == {
        name for name in expected if not name.startswith("checkpoints/") and "tfevents" not in name
    }
    assert any("tfevents" in name for name in names)
    found, wanted = (read_tensors(one / "checkpoint") for one in (there, beside))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert records(there) == records(beside)
    config = json.loads((there / "config.json").read_bytes())
    assert config["data"] == "s3://bucket/data"
    steps = {name.split("/")[1] for name in objects.entries() if name.startswith("checkpoints/")}
    assert steps == {path.name for path in (beside / "checkpoints").iterdir()}


def test_a_finished_run_is_not_trained_again(
    run: str, s3: FaultProxy, capsys: pytest.CaptureFixture[str], local_cache: Path
) -> None:
    first = len(s3.seen)
    cli.main(["train", "--data", "s3://bucket/data", "--output", run, *OPTIONS])
    assert f"{run}: this training is finished" in capsys.readouterr().out
    # Only the report, which tests leave without pictures, is drawn again.
    assert {path for method, path, _ in s3.seen[first:] if method == "PUT"} <= {"/bucket/runs/one/report.html"}
    assert not list(local_cache.glob("work-*"))


def test_predictions_are_stored_as_a_whole(
    run: str, s3: FaultProxy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--run", run, "--input", "s3://bucket/raw/test.tsv", "--output", "s3://bucket/out/p.parquet"]
    with s3.fault("expired", method="PUT"), pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: s3://bucket/out/p.parquet: can't be reached (The provided token has expired")
    assert Objects("s3://bucket/out").entries() == {}
    cli.main(words)  # the finished file is stored, nothing is predicted again
    assert "is finished already: 300 rows" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache")
    Objects(run).fetch([name for name in Objects(run).entries() if "/step_" not in name], tmp_path / "run")
    local = ["predict", "--run", str(tmp_path / "run"), "--input", str(data / "test.tsv")]
    cli.main([*local, "--output", str(tmp_path / "p.parquet")])
    Objects("s3://bucket/out").fetch(["p.parquet"], tmp_path / "stored")
    assert pl.read_parquet(tmp_path / "stored" / "p.parquet").equals(pl.read_parquet(tmp_path / "p.parquet"))


def test_commands_that_read_a_run(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["evaluate", "--run", run, "--data", "s3://bucket/data"])
    written = capsys.readouterr().out.splitlines()[-1]
    assert written.startswith(f"wrote {run}/evaluate")
    assert written.removeprefix(f"wrote {run}/") in Objects(run).entries()
    cli.main(["runs", "s3://bucket/runs"])
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == [run, "finished"]
    before = Objects(run).entries()["report.html"].version
    cli.main(["report", run])
    assert f"wrote {run}/report.html" in capsys.readouterr().out
    assert Objects(run).entries()["report.html"].version != before


@pytest.mark.usefixtures("tried_twice")
def test_a_checkpoint_that_cannot_be_stored_is_one_line(
    s3: FaultProxy, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(data / "prepared"), "--output", "s3://bucket/runs/failing", *OPTIONS]
    with s3.fault("503", method="PUT", path="distcp"), pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error")]
    assert line.startswith("error: s3://bucket/runs/failing/checkpoints/step_00000020: can't be written (Please reduce")
    assert "check address, network and credentials, then run the same command again" in line
    cli.main(words)
    assert "summary.json" in Objects("s3://bucket/runs/failing").entries()


def test_a_run_at_an_address_explains_exports_and_serves(
    run: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the commands give is what they give for a local copy of the run."""
    beside = tmp_path / "copy"
    Objects(run).fetch([name for name in Objects(run).entries() if "/step_" not in name], beside)
    raw = str(data / "test.tsv")
    printed = []
    for one in (run, str(beside)):
        cli.main(["explain", "--run", one, "--input", raw, "--rows", "2"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "bias" in printed[0]
    package = tmp_path / "package"
    cli.main(["export", "--run", run, "--output", str(package), "--to", "torch-export"])
    scores = []
    for word, one in (("--package", package), ("--run", beside)):
        output = tmp_path / f"{word.strip('-')}.parquet"
        cli.main(["predict", word, str(one), "--input", raw, "--output", str(output)])
        scores.append(pl.read_parquet(output)["probability"].to_numpy())
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)

    pytest.importorskip("fastapi", reason="pip install 'torchrec_deepfm[serve]'")
    from torchrec_deepfm.inference.serve import server
    from torchrec_deepfm.inference.serve.model import ServedModel, Work

    served: list[ServedModel] = []
    monkeypatch.setattr(server, "serve", lambda read, **_: served.append(read()))
    for one in (run, str(beside)):
        cli.main(["serve", "--run", one])
    there, here = served
    row = pa.table({column.name: column.array(["1"]) for column in here.columns})
    assert there.sha256 == here.sha256
    assert there.answer([Work(rows=row)])[0].tolist() == here.answer([Work(rows=row)])[0].tolist()

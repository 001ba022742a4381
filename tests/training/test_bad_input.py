"""Bad input at the command line: exit code 2, one line that says where and what to do, no traceback and no hang."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import run_module
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.epoch_order import EpochOrder
from torchrec_deepfm.files import seal

BATCH = 256  # of the smoke recipe, per rank
REPAIR = "the folder is damaged or was not written by prepare; prepare the data again"


def train(data: Path, output: Path, *options: str) -> list[str]:
    return ["train", "--data", str(data), "--output", str(output), "--recipe", "smoke", *options]


def on_two_ranks(command: list[str]) -> tuple[int, list[str]]:
    """Exit code, and the lines on standard error."""
    launcher = ["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", "2", "-m", "torchrec_deepfm"]
    done = run_module([*launcher, *command], timeout=120, OMP_NUM_THREADS="1")
    return done.returncode, done.stderr.splitlines()


def in_this_process(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The same, of one process as it stands."""
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err.splitlines()


@dataclass(frozen=True, kw_only=True)
class Patch:
    stem: str
    ending: str
    column: int
    value: Any


def patched(data: PreparedData, copy: Path, patch: Patch, row: int) -> Path:
    """A copy of the folder with one bad value; its files keep their sizes, and its blocks have no checksums."""
    shutil.copytree(data.folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["blocks"]  # as in a folder of before, whose values nothing but the loader has checked
    (copy / "manifest.json").write_bytes(seal(manifest))
    path = copy / f"{patch.stem}_{patch.ending}.npy"
    array = np.load(path)
    array[row, patch.column] = patch.value
    np.save(path, array)
    return path


def row_seen_by(data: PreparedData, rank: int, step: int) -> int:
    """A training row that the given rank of two reads in the given step of the first epoch."""
    order = EpochOrder(data.rows("train"), shuffle=True, seed=0, epoch=0)
    return int(order[0 : data.rows("train")][(2 * step + rank) * BATCH + 17])


def line(data: PreparedData, path: Path, row: int, patch: Patch, fault: str) -> str:
    """What is to be said of a bad value."""
    names = {"dense": data.schema.numeric, "sparse": data.schema.categorical, "labels": (data.schema.label,)}
    column = names[patch.ending][patch.column]
    if patch.ending == "sparse":
        fault = f"is not an id from 0 to {data.num_embeddings[column] - 1}"
    return f"error: {path}: row {row}, column {column}: {patch.value} {fault}; {REPAIR}"


NO_LABEL = "is not a valid label (expected 0 or 1)"
BAD_ID = Patch(stem="day_0", ending="sparse", column=2, value=2**30)
NEGATIVE_ID = Patch(stem="day_0", ending="sparse", column=25, value=-1)
NAN = Patch(stem="day_0", ending="dense", column=4, value=np.nan)
LABEL = Patch(stem="day_0", ending="labels", column=0, value=2)
LATE_LABEL = Patch(stem="validation_0", ending="labels", column=0, value=-1)


@pytest.mark.parametrize(
    ("patch", "rank", "step", "fault"),
    [(BAD_ID, 1, 3, ""), (NAN, 0, 0, "is not a finite number"), (LATE_LABEL, None, None, NO_LABEL)],
    ids=["id on rank 1", "NaN on rank 0", "label, in the evaluation at the end"],
)
def test_a_bad_value_that_one_of_two_ranks_meets(
    data: PreparedData, tmp_path: Path, patch: Patch, rank: int | None, step: int | None, fault: str
) -> None:
    row = 700 if rank is None or step is None else row_seen_by(data, rank, step)
    path = patched(data, tmp_path / "data", patch, row)
    done = on_two_ranks(train(tmp_path / "data", tmp_path / "run"))
    assert done == (2, [line(data, path, row, patch, fault)])
    # No half of a run is in the way of the next one; one that has trained to its end has something to lose.
    assert (tmp_path / "run").exists() == (patch is LATE_LABEL)
    assert (tmp_path / "run" / "checkpoints").exists() == (patch is LATE_LABEL)


@pytest.mark.parametrize(("patch", "fault"), [(NEGATIVE_ID, ""), (LABEL, NO_LABEL)], ids=["negative id", "label"])
def test_a_bad_value_in_one_process(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str], patch: Patch, fault: str
) -> None:
    path = patched(data, tmp_path / "data", patch, 3210)
    done = in_this_process(train(tmp_path / "data", tmp_path / "run"), capsys)
    assert done == (2, [line(data, path, 3210, patch, fault)])
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_rows(data: PreparedData, tmp_path: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(data.folder, few)
    manifest = json.loads((few / "manifest.json").read_text())
    for name in ("dense", "sparse", "labels"):
        path = few / f"test_0_{name}.npy"
        np.save(path, np.load(path)[:1])
        manifest["files"][path.name]["bytes"] = path.stat().st_size
    manifest["splits"]["test"][0]["rows"] = 1
    (few / "manifest.json").write_bytes(seal(manifest))
    expected = f"error: {few}: split test has 1 rows for 2 ranks; use fewer ranks or more data"
    assert on_two_ranks(train(few, tmp_path / "run")) == (2, [expected])
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data(data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = (
        f"error: {data.folder}: split train has 10000 rows, less than one step of batch size 10001 on 1 ranks; "
        "lower --batch-size or use fewer ranks"
    )
    assert in_this_process(train(data.folder, tmp_path / "run", "--batch-size", "10001"), capsys) == (2, [expected])
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_a_run(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    expected = f"error: --output {run}: the folder already holds a run; name another one, or remove it first"
    assert in_this_process(train(data.folder, run, "--resume", "never"), capsys) == (2, [expected])
    expected = (
        f"error: {run / 'config.json'}: the file is damaged (object missing required field `format_version`); name "
        "another --output, or remove "
    )
    assert in_this_process(train(data.folder, run), capsys) == (2, [f"{expected}the folder"])
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_an_output_folder_that_holds_something_else(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    expected = f"error: --output {run}: the folder is not empty; name another one, or remove it first"
    assert in_this_process(train(data.folder, run), capsys) == (2, [expected])
    assert (run / "thesis.tex").read_text() == "mine"


def test_an_output_that_is_a_file(data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    expected = f"error: --output {file}: a file has this name; name a folder"
    assert in_this_process(train(data.folder, file), capsys) == (2, [expected])
    assert file.read_text() == "mine"

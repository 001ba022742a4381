"""Bad input at the command line: exit code 2, one line that says where and what to do, no traceback and no hang."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import run_module
from torchrec_deepfm.data.order import EpochOrder
from torchrec_deepfm.data.prepared import PreparedData

BATCH = 256  # of the smoke recipe, per rank
REPAIR = "the folder is damaged or foreign; prepare the data again"


def train(data: Path, output: Path, *options: str, ranks: int = 1) -> tuple[int, list[str]]:
    """Exit code, and the lines on standard error."""
    launcher = ["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    command = ["torchrec_deepfm", "train", "--data", str(data), "--output", str(output), "--recipe", "smoke"]
    done = run_module([*launcher, *command, *options], timeout=120, OMP_NUM_THREADS="1")
    return done.returncode, done.stderr.splitlines()


@dataclass(frozen=True, kw_only=True)
class Patch:
    stem: str
    ending: str
    column: int
    value: Any


def patched(data: PreparedData, copy: Path, patch: Patch, row: int) -> Path:
    """A copy of the folder with one bad value; its files keep their sizes."""
    shutil.copytree(data.folder, copy)
    path = copy / f"{patch.stem}_{patch.ending}.npy"
    array = np.load(path)
    array[row, patch.column] = patch.value
    np.save(path, array)
    return path


def row_seen_by(data: PreparedData, rank: int, step: int) -> int:
    """A training row that the given rank of two reads in the given step of the first epoch."""
    order = EpochOrder(data.rows("train"), shuffle=True, seed=0, epoch=0)
    return int(order[0 : data.rows("train")][(2 * step + rank) * BATCH + 17])


@pytest.mark.parametrize(
    ("patch", "rank", "step", "fault"),
    [
        (Patch(stem="day_0", ending="sparse", column=2, value=2**30), 1, 3, "column C3: 1073741824 is no id below {}"),
        (Patch(stem="day_0", ending="sparse", column=25, value=-1), 0, 0, "column C26: -1 is no id below {}"),
        (Patch(stem="day_0", ending="dense", column=4, value=np.nan), 0, 5, "column I5: nan is no finite number"),
        (
            Patch(stem="day_0", ending="labels", column=0, value=2),
            1,
            0,
            "column label: 2 is no label, it must be 0 or 1",
        ),
    ],
    ids=["id on rank 1", "negative id on rank 0", "NaN on rank 0", "label on rank 1"],
)
def test_a_bad_value_in_the_data(
    data: PreparedData, tmp_path: Path, patch: Patch, rank: int, step: int, fault: str
) -> None:
    row = row_seen_by(data, rank, step)
    path = patched(data, tmp_path / "data", patch, row)
    if patch.ending == "sparse":
        fault = fault.format(data.num_embeddings[data.schema.categorical[patch.column]]) + " and not negative"
    code, lines = train(tmp_path / "data", tmp_path / "run", ranks=2)
    print(code, "\n".join(lines), sorted(p.name for p in tmp_path.glob("run/*")))
    assert (code, lines) == (2, [f"error: {path}: row {row}, {fault}; {REPAIR}"])
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_bad_value_in_the_validation_split(data: PreparedData, tmp_path: Path) -> None:
    path = patched(data, tmp_path / "data", Patch(stem="validation", ending="labels", column=0, value=-1), 700)
    code, lines = train(tmp_path / "data", tmp_path / "run", ranks=2)
    print(code, "\n".join(lines), sorted(p.name for p in tmp_path.glob("run/*")))
    expected = f"error: {path}: row 700, column label: -1 is no label, it must be 0 or 1; {REPAIR}"
    assert (code, lines) == (2, [expected])


def test_more_ranks_than_rows(data: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(data.folder, tmp_path / "data")
    from tests.distributed.test_training import changed

    def one_row(manifest: dict[str, Any]) -> None:
        for name in ("dense", "sparse", "labels"):
            path = tmp_path / "few" / f"test_{name}.npy"
            np.save(path, np.load(path)[:1])
            manifest["files"][path.name]["bytes"] = path.stat().st_size
        manifest["splits"]["test"][0]["rows"] = 1

    few = changed(data, tmp_path / "few", one_row)
    code, lines = train(few.folder, tmp_path / "run", ranks=2)
    expected = f"error: {few.folder}: split test has 1 rows for 2 ranks; use fewer ranks or more data"
    assert (code, lines) == (2, [expected])
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data(data: PreparedData, tmp_path: Path) -> None:
    code, lines = train(data.folder, tmp_path / "run", "--batch-size", "10001")
    assert (code, lines) == (
        2,
        [
            f"error: {data.folder}: split train has 10000 rows, less than one step of batch size 10001 on 1 ranks; "
            "lower --batch-size or use fewer ranks"
        ],
    )
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_a_run(data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    code, lines = train(data.folder, tmp_path / "run")
    expected = (
        f"error: --output {tmp_path / 'run'}: the folder already holds a run; name another one, or remove it first"
    )
    assert (code, lines) == (2, [expected])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_an_output_that_is_a_file_or_holds_something_else(data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, lines = train(data.folder, tmp_path / "file")
    expected = f"error: --output {tmp_path / 'file'}: there is a file of that name; name a folder"
    assert (code, lines, (tmp_path / "file").read_text()) == (2, [expected], "mine")

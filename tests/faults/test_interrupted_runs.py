"""Runs that are killed, stopped or damaged: the fault campaign, short, every kind of fault at least once.

`make test` runs one kill, one SIGTERM and one damaged checkpoint of it, `make faults` the rest and the long one
(campaign.py).
"""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.jobs import GLOBAL_BATCH, ROOT, Job, command, environment, run, start
from tests.faults.runs import assert_each_row_once, assert_same_run, make_data, read_tensors, records, seen_rows

CAMPAIGN = pytest.mark.campaign
PHASES = ["before the save", "between ranks", "before the manifest", "before the rename", "after the rename"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def data(folder: Path) -> Path:
    return make_data(folder / "data").folder


@pytest.fixture(scope="session")
def undisturbed(folder: Path, data: Path) -> dict[int, Path]:
    """The run that nothing happens to, on one and on two ranks."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = folder / f"undisturbed_{ranks}"
        code, _, err = run(command(data, runs[ranks], ranks=ranks), environment(folder / f"log_{ranks}"))
        assert (code, err) == (0, ""), err
        assert_each_row_once(folder / f"log_{ranks}", epochs=2, global_batch=GLOBAL_BATCH)
    return runs


def assert_as_undisturbed(run: Path, logs: Path, undisturbed: Path) -> None:
    assert_same_run(run, undisturbed)
    assert_each_row_once(logs, epochs=2, global_batch=GLOBAL_BATCH)
    assert not [path.name for path in (run / "checkpoints").iterdir() if not re.fullmatch(r"step_\d{8}", path.name)]


@CAMPAIGN
def test_ranks_are_killed_and_torchelastic_starts_them_again(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path]
) -> None:
    """In one job without a hand: between steps and in each phase of a save, rank 0 and rank 1."""
    faults = [
        {"at": "step", "rank": 1, "step": 3, "do": "kill"},  # nothing is saved yet
        {"at": "step", "rank": 0, "step": 11, "do": "kill"},
        {"at": "between ranks", "rank": 1, "step": 20, "do": "kill"},
        {"at": "before the rename", "rank": 0, "step": 28, "do": "kill"},
    ]
    env = environment(tmp_path / "log", faults, FAULTS_SLEEP="0.05")
    code, out, err = run(command(data, tmp_path / "run", ranks=2, restarts=4), env)
    assert code == 0, err
    assert all((tmp_path / "log" / f"fault_{number}").exists() for number in range(len(faults)))
    resumed_at = [int(step) for step in re.findall(r"Resuming from step (\d+)", out)]
    assert len(resumed_at) == 3
    assert resumed_at[0] <= 8 < resumed_at[1] <= 16 < resumed_at[2] <= 24  # the newest may not have been on disk yet
    assert_as_undisturbed(tmp_path / "run", tmp_path / "log", undisturbed[2])


@pytest.mark.parametrize(
    "phase", [phase if phase == "before the rename" else pytest.param(phase, marks=CAMPAIGN) for phase in PHASES]
)
def test_a_kill_in_each_phase_of_a_save(data: Path, tmp_path: Path, undisturbed: dict[int, Path], phase: str) -> None:
    env = environment(tmp_path / "log", [{"at": phase, "rank": 0, "step": 12, "do": "kill"}], FAULTS_SLEEP="0.05")
    code, _, _ = run(command(data, tmp_path / "run"), env)
    assert code == -signal.SIGKILL
    complete = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_????????"))
    newest = 12 if phase == "after the rename" else 8
    assert complete[-1] == f"step_{newest:08d}"
    code, out, err = run(command(data, tmp_path / "run"), env)
    assert (code, err) == (0, "")
    assert f"Resuming from step {newest} of" in out
    assert "not used" not in out
    assert_as_undisturbed(tmp_path / "run", tmp_path / "log", undisturbed[1])


@pytest.mark.parametrize(("ranks", "do"), [(2, "term parent"), (2, "term"), pytest.param(1, "term", marks=CAMPAIGN)])
def test_sigterm(data: Path, tmp_path: Path, undisturbed: dict[int, Path], ranks: int, do: str) -> None:
    """On all ranks through torchrun, on one of two ranks, and in one process; each resumes where it stopped."""
    fault = {"at": "step", "rank": ranks - 1, "step": 13, "do": do}
    words = command(data, tmp_path / "run", ranks=ranks, restarts=3 if ranks > 1 else 0)
    code, _, err = run(words, environment(tmp_path / "log", [fault], FAULTS_SLEEP="0.05"))
    assert code == 143
    assert len(list((tmp_path / "log").glob("rank_*"))) == ranks  # no process was started again
    stopped = re.search(r"stopped by SIGTERM after step (\d+), saved in (.*/step_(\d+));", err)
    assert stopped is not None, err
    assert Path(stopped[2]).is_dir()
    assert 13 <= int(stopped[1]) == int(stopped[3]) <= 17
    assert "Traceback" not in err
    code, out, err = run(command(data, tmp_path / "run", ranks=ranks), environment(tmp_path / "log", [fault]))
    assert (code, err) == (0, "")
    assert f"Resuming from step {stopped[1]} of" in out
    assert_as_undisturbed(tmp_path / "run", tmp_path / "log", undisturbed[ranks])


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=CAMPAIGN)])
def test_a_copy_that_fails_on_one_rank_ends_the_job(data: Path, tmp_path: Path, rank: int) -> None:
    """The others wait for its part of the save: in seconds, not until a timeout of minutes."""
    env = environment(tmp_path / "log", [{"at": "the copy", "rank": rank, "step": 8, "do": "memory"}])
    code, _, err = run(command(data, tmp_path / "run", ranks=2), env, timeout=100)
    assert code == 2
    assert re.fullmatch(rf"error: rank {rank} is out of memory at step 8 \(\w+\); lower --batch-size, .*\n", err), err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_????????")] == ["step_00000004"]


@CAMPAIGN
@pytest.mark.parametrize("step", [15, 40])
def test_sigterm_during_an_evaluation(data: Path, tmp_path: Path, undisturbed: dict[int, Path], step: int) -> None:
    """Between two epochs' worth of steps, and after the last step; the evaluation is done again."""
    small = ("--batch-size", "100")  # three steps of evaluation: asked at the first, all ranks know at the second
    env = environment(tmp_path / "log", [{"at": "evaluation", "rank": 0, "step": step, "do": "term"}])
    code, _, err = run(command(data, tmp_path / "run", options=small), env)
    assert code == 143
    assert f"stopped by SIGTERM after step {step}, saved in" in err
    code, out, err = run(command(data, tmp_path / "run", options=small), env)
    assert (code, err) == (0, "")
    assert f"Resuming from step {step} of" in out
    assert_as_undisturbed(tmp_path / "run", tmp_path / "log", undisturbed[1])


def step_reached(logs: Path, step: int, process: Job) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [json.loads(line) for path in logs.glob("rank_*") for line in path.read_text().splitlines()]
        if any(line["step"] >= step for line in lines):
            return
        assert process.poll() is None
        time.sleep(0.02)
    raise AssertionError("it does not get there")


@CAMPAIGN
def test_ctrl_c_once_and_twice(data: Path, tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    env = environment(tmp_path / "log", FAULTS_SLEEP="0.1")
    process = start(command(data, tmp_path / "run"), env)
    step_reached(tmp_path / "log", 5, process)
    process.send_signal(signal.SIGINT)
    code, _, err = process.finish()
    assert code == 130
    assert "stopped by SIGINT after step" in err
    assert "Traceback" not in err
    # Twice: at once, here in the middle of a step that would never end.
    busy = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 25, "do": "busy"}])
    process = start(command(data, tmp_path / "run"), busy)
    step_reached(tmp_path / "log", 24, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.finish(timeout=10)[0] == 130
    code, _, err = run(command(data, tmp_path / "run"), environment(tmp_path / "log"))
    assert (code, err) == (0, "")
    assert_as_undisturbed(tmp_path / "run", tmp_path / "log", undisturbed[1])


def without_assertions(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of tests.faults as Python has it under PYTHONOPTIMIZE."""
    module = ModuleType(f"tests.faults.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = ROOT / "tests" / "faults" / f"{name}.py"
    exec(compile(path.read_text(), str(path), "exec", optimize=1), module.__dict__)
    return module


def test_the_campaign_counts_only_what_it_has_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, undisturbed: dict[int, Path]
) -> None:
    """Without assertions too: a run that is equal, one with another loss, one that lost a row, and one that is gone."""
    for name in ("equal", "loss", "row", "gone"):
        if name != "gone":
            shutil.copytree(undisturbed[1], tmp_path / name / "run")
        shutil.copytree(undisturbed[1].parent / "log_1", tmp_path / name / "log")
    metrics = tmp_path / "loss" / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 0.', '"loss": 1.', 1))
    [log] = (tmp_path / "row" / "log").glob("rank_*")
    [first, *others] = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first.replace('"rows": [', '"rows": [1, ', 1), *others]))
    without_assertions("runs", monkeypatch)
    tally = without_assertions("attempts", monkeypatch).Tally()
    for name in ("equal", "loss", "row", "gone"):
        with tally.a_run():
            tally.compare(tmp_path / name, undisturbed[1])
    assert (tally.attempted, tally.equal) == (4, 1)
    failures = tally.failures
    assert [failure.partition(": ")[0] for failure in failures] == ["run 2", "run 3", "run 4"]
    assert failures[0].endswith("metrics.jsonl differs")
    assert failures[1].endswith("epoch 0: 2001 rows, 2000 of them different")
    assert "FileNotFoundError" in failures[2]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])


FILES = [".metadata", "__0_0.distcp", "checkpoint.json"]
DAMAGES = [(name, how) for name in FILES for how in ("cut", "flipped", "removed")]


@pytest.fixture(scope="module")
def killed(data: Path, folder: Path) -> Path:
    """A folder with a run that was killed at step 18, and its log."""
    # Not in the middle of its last save, which continues beside the steps.
    env = environment(folder / "killed" / "log", [{"at": "step", "rank": 0, "step": 18, "do": "kill once saved"}])
    code, _, _ = run(command(data, folder / "killed" / "run"), env)
    assert code == -signal.SIGKILL
    checkpoints = sorted((folder / "killed" / "run" / "checkpoints").iterdir())
    assert [path.name[-2:] for path in checkpoints] == ["15", "16"]
    assert sorted(path.name for path in checkpoints[1].iterdir()) == FILES
    return folder / "killed"


@pytest.mark.parametrize(("name", "how"), [DAMAGES[0], *(pytest.param(*each, marks=CAMPAIGN) for each in DAMAGES[1:])])
def test_damaged_checkpoints_are_refused_by_name(
    data: Path, tmp_path: Path, killed: Path, undisturbed: dict[int, Path], name: str, how: str
) -> None:
    """Each file of the newest checkpoint, each way: the one before is used, and the end is the same."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "run" / "checkpoints" / "step_00000016" / name, how)
    code, out, err = run(command(data, tmp_path / "run"), environment(tmp_path / "log"))
    reported = [line for line in out.splitlines() if line.startswith("not used: ")]
    assert len(reported) == 1
    assert f"step_00000016: {name}" in reported[0], reported
    assert "Resuming from step 15 of" in out
    assert (code, err) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed[1])
    assert_each_row_once(tmp_path / "log", epochs=2, global_batch=GLOBAL_BATCH)


@CAMPAIGN
def test_two_trainings_in_one_folder(data: Path, tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    env = environment(tmp_path / "log", FAULTS_SLEEP="0.3")
    first = start(command(data, tmp_path / "run"), env)
    step_reached(tmp_path / "log", 2, first)
    code, out, err = run(command(data, tmp_path / "run", ranks=2), environment(tmp_path / "other"))
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: --output {tmp_path / 'run'}: another training is writing there (process {first.pid} on"
    )
    assert err.count("\n") == 1
    code, _, err = first.finish()
    assert (code, err) == (0, "")
    assert_as_undisturbed(tmp_path / "run", tmp_path / "log", undisturbed[1])


def test_other_options_over_a_run(data: Path, tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed[1].rglob("*")}
    env = environment(tmp_path / "log")
    code, out, err = run(command(data, undisturbed[1], options=("--dropout", "0.5")), env)
    assert (code, out) == (2, "")
    assert err == (
        f"error: --output {undisturbed[1]}: holds a run with --dropout 0.2, not 0.5; give the same options to "
        "resume it, or name another folder\n"
    )
    code, out, err = run(command(data, undisturbed[1], options=("--resume", "never")), env)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --output {undisturbed[1]}: the folder already holds a run; name another one")
    code, out, err = run(command(data, undisturbed[1]), env)
    assert (code, err) == (0, "")
    assert "this training is finished, there is nothing left to do" in out
    assert {path: path.stat().st_mtime_ns for path in undisturbed[1].rglob("*")} == before


@CAMPAIGN
@pytest.mark.parametrize(("ranks", "then"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(
    data: Path, tmp_path: Path, undisturbed: dict[int, Path], ranks: int, then: int
) -> None:
    """In the middle of an epoch, the global batch kept: every row once, and nearly the same numbers.

    Without dropout they would be the same except for the order of sums; the random numbers of another number of ranks
    are others.
    """
    without = ("--dropout", "0", "--no-batch-norm")
    fault = {"at": "step", "rank": ranks - 1, "step": 27, "do": "kill"}
    env = environment(tmp_path / "log", [fault], FAULTS_SLEEP="0.05")
    code, _, _ = run(command(data, tmp_path / "run", ranks=ranks, options=without), env)
    assert code != 0
    code, out, err = run(command(data, tmp_path / "run", ranks=then, options=without), env)
    assert (code, err) == (0, "")
    assert re.search(r"Resuming from step 2[04] of", out)
    assert_each_row_once(tmp_path / "log", epochs=2, global_batch=GLOBAL_BATCH)
    other = tmp_path / "other"
    code, _, _ = run(command(data, other, ranks=ranks, options=without), environment(tmp_path / "log_other"))
    assert code == 0
    for mine, theirs in zip(records(tmp_path / "run"), records(other), strict=True):
        for name in {"loss", "auc"} & theirs.keys():
            assert mine.get(name) == pytest.approx(theirs.get(name), rel=1e-4), (mine, theirs)
    mine, theirs = read_tensors(tmp_path / "run" / "checkpoint"), read_tensors(other / "checkpoint")
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 1e-3, name


@CAMPAIGN
def test_a_batch_of_another_size_sees_every_row_once(data: Path, tmp_path: Path) -> None:
    """From 2 x 50 to 1 x 70 rows a step, in the middle of the first epoch: what is left is 1200 = 17 x 70 + 10 rows."""
    fault = {"at": "step", "rank": 0, "step": 11, "do": "kill"}
    env = environment(tmp_path / "log", [fault], FAULTS_SLEEP="0.1")
    assert run(command(data, tmp_path / "run", ranks=2), env)[0] != 0
    code, out, err = run(command(data, tmp_path / "run", options=("--batch-size", "70", "--epochs", "2")), env)
    assert (code, err) == (0, "")
    assert "Resuming from step 8 of" in out
    steps = seen_rows(tmp_path / "log")
    first = [row for step in range(1, 9) for row in steps[step]]
    assert len(first) == 800
    rest = [row for step in range(9, 9 + 17) for row in steps[step]]
    assert len(set(first + rest)) == len(first + rest) == 800 + 17 * 70
    second = [row for step in range(9 + 17, max(steps) + 1) for row in steps[step]]
    assert len(set(second)) == len(second) == 2000 // 70 * 70

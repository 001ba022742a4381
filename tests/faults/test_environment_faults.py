"""Faults of the environment: disks, data, memory, stalled ranks, losses that are not finite. Each ends in one line that
says where and what to do, and the training resumes from what was saved."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.jobs import GLOBAL_BATCH, command, environment, run, start
from tests.faults.runs import assert_each_row_once, assert_same_run, make_data, read_tensors, records
from torchrec_deepfm.files import seal

CAMPAIGN = pytest.mark.campaign
GO_ON = "then run the same command again; it resumes from the newest checkpoint, if one was saved"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "data").folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, err = run(command(data, folder / "run"), environment(folder / "log"))
    assert (code, err) == (0, "")
    return folder / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system takes more rights than these tests have")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def saved_steps(checkpoints: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.iterdir() if "." not in path.name)


@CAMPAIGN
@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("fill", "no space is left on the device; free some"),
        ("read-only", "writing is not allowed (Read-only file system); make it writable"),
    ],
)
def test_a_disk_for_checkpoints_that_refuses(
    data: Path, tmp_path: Path, undisturbed: Path, small_disk: Path, do: str, reason: str
) -> None:
    place = small_disk / "checkpoints"
    options = ("--checkpoints", str(place))
    fault = {"at": "step", "rank": 0, "step": 10, "do": do, "path": str(small_disk)}
    env = environment(tmp_path / "log", [fault], FAULTS_SLEEP="0.03")
    code, _, err = run(command(data, tmp_path / "run", options=options), env)
    again = "then run the same command again to resume from the checkpoint of step 8"
    assert (code, err) == (2, f"error: {place}/step_00000012: {reason}, {again}\n")
    assert saved_steps(place) == [4, 8]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    (small_disk / "filling").unlink(missing_ok=True)
    code, out, err = run(command(data, tmp_path / "run", options=options), env)
    assert (code, err) == (0, "")
    assert "Resuming from step 8" in out
    assert_same_run(tmp_path / "run", undisturbed)
    assert_each_row_once(tmp_path / "log", epochs=2, global_batch=GLOBAL_BATCH)


@CAMPAIGN
def test_a_file_that_may_grow_no_further(data: Path, tmp_path: Path) -> None:
    """The same without the right to mount anything."""
    env = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 10, "do": "limit"}], FAULTS_SLEEP="0.03")
    code, _, err = run(command(data, tmp_path / "run"), env)
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'run'}")
    assert "no space is left on the device; free some" in err
    assert err.count("\n") == 1
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 8]


@CAMPAIGN
def test_metrics_that_cannot_be_written(data: Path, tmp_path: Path, small_disk: Path) -> None:
    often = ("--eval-every", "1", "--ema-every", "1")  # more than fits into a page
    options = ("--checkpoints", str(tmp_path / "checkpoints"), *often)
    fault = {"at": "step", "rank": 0, "step": 19, "do": "fill", "path": str(small_disk)}
    env = environment(tmp_path / "log", [fault], FAULTS_SLEEP="0.03")
    code, _, err = run(command(data, small_disk / "run", options=options), env)
    assert code == 2
    reported = r"error: {}(/saved\.json)?: no space is left on the device; free some, then run the same command again\n"
    assert re.fullmatch(reported.format(re.escape(str(small_disk / "run"))), err)
    assert saved_steps(tmp_path / "checkpoints")[-1] >= 16
    (small_disk / "filling").unlink()
    code, out, err = run(command(data, small_disk / "run", options=options), env)
    assert (code, err) == (0, "")
    assert "Resuming from step " in out
    assert [line["step"] for line in records(small_disk / "run") if line["split"] == "validation"] == list(range(1, 41))


@CAMPAIGN
@pytest.mark.parametrize(
    ("do", "reported"), [("shrink", "has changed while it was read"), ("vanish", "has vanished while it was")]
)
def test_data_that_shrink_or_vanish(data: Path, tmp_path: Path, undisturbed: Path, do: str, reported: str) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    fault = {"at": "step", "rank": 0, "step": 10, "do": do, "path": str(copy)}
    env = environment(tmp_path / "log", [fault], FAULTS_SLEEP="0.03")
    code, _, err = run(command(copy, tmp_path / "run"), env)
    assert code == 2
    assert err.startswith(f"error: {copy}/")
    assert reported in err
    assert err.endswith(f"{GO_ON}\n")
    assert err.count("\n") == 1
    shutil.rmtree(copy)
    shutil.copytree(data, copy)
    code, _, err = run(command(copy, tmp_path / "run"), env)
    assert (code, err) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed)


@CAMPAIGN
def test_other_data_are_refused(data: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 10, "do": "kill"}], FAULTS_SLEEP="0.03")
    run(command(data, tmp_path / "run"), env)
    other = make_data(tmp_path / "other", rows=1900).folder
    code, _, err = run(command(other, tmp_path / "run"), env)
    assert code == 2
    message = (
        f"error: --data {other}: --output {tmp_path / 'run'} holds a run on other data; name the data that it was "
        "trained on, or another folder\n"
    )
    assert err == message


@CAMPAIGN
def test_memory_runs_out(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    env = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 10, "do": "memory"}], FAULTS_SLEEP="0.03")
    code, _, err = run(command(data, tmp_path / "run"), env)
    assert code == 2
    assert err == (
        f"error: rank 0 is out of memory at step 9 (training); lower --batch-size, use more ranks, {GO_ON}\n"
    )
    code, _, err = run(command(data, tmp_path / "run"), env)
    assert (code, err) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_loss_that_is_not_a_number(data: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 10, "do": "nan"}], FAULTS_SLEEP="0.03")
    code, _, err = run(command(data, tmp_path / "run"), env)
    assert code == 2
    batch_folder, checkpoint = (
        tmp_path / "run" / "nonfinite_step_00000010",
        tmp_path / "run" / "checkpoints" / "step_00000008",
    )
    # The schedule is in its plateau at step 10: 4 steps of warm-up, decay from step 21.
    assert err == (
        f"error: step 10: the loss is not finite (learning rates: sparse 0.02 dense 0.001); its batch is saved in "
        f"{batch_folder}; run the same command with a lower --sparse-lr or --dense-lr to resume from the checkpoint of "
        "step 8\n"
    )
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 8]
    assert all(torch.isfinite(value.float()).all() for value in read_tensors(checkpoint).values())
    saved = torch.load(batch_folder / "rank_0.pt", weights_only=True)
    lines = [json.loads(line) for path in (tmp_path / "log").glob("rank_*") for line in path.read_text().splitlines()]
    [rows] = [line["rows"] for line in lines if line["step"] == 10]
    assert [round(math.expm1(value)) for value in saved["dense_features"][:, 0].double().tolist()] == rows
    assert saved["keys"] == ["user", "item", "shop"]
    assert len(saved["values"]) == len(saved["lengths"]) == 3 * GLOBAL_BATCH
    about = json.loads((batch_folder / "about.json").read_text())
    assert (about["step"], about["checkpoint"]) == (10, 8)


@CAMPAIGN
@pytest.mark.parametrize(
    ("do", "how"),
    [
        # A stopped rank last showed where it was up to a second ago: the checkpoint of step 8 is that near.
        ("stop", "(?:training|checkpoint), no heartbeat"),
        ("busy", "training"),
    ],
)
def test_a_rank_that_stalls_is_named_and_started_again(data: Path, tmp_path: Path, do: str, how: str) -> None:
    env = environment(tmp_path / "log", [{"at": "step", "rank": 1, "step": 10, "do": do}], FAULTS_SLEEP="0.3")
    words = command(data, tmp_path / "run", ranks=2, restarts=1, options=("--timeout", "5"))
    code, out, err = run(words, env)
    assert code == 0, err
    reported = [line for line in err.splitlines() if "stalled" in line]
    assert len(reported) == 1
    line = rf"rank 1 \(process \d+ on {os.uname().nodename}, step (\d+), {how}\) stalled, and rank 0 waited \d+ s; "
    found = re.match(line + "the ranks start again if --max_restarts allows it", reported[0])
    assert found is not None, reported[0]
    assert 5 <= int(found[1]) <= 10  # a rank shows each second where it is
    assert "Resuming from step 8" in out
    assert_each_row_once(tmp_path / "log", epochs=2, global_batch=GLOBAL_BATCH)


@CAMPAIGN
def test_a_job_that_is_suspended_as_a_whole_has_not_stalled(data: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "log", FAULTS_SLEEP="0.3")
    job = start(command(data, tmp_path / "run", ranks=2, options=("--timeout", "4")), env)
    while not list((tmp_path / "run").glob("checkpoints/step_????????")):
        assert job.poll() is None, job.err
        time.sleep(0.05)
    ranks = [pid for pid in job.processes() if pid != job.pid]
    assert len(ranks) == 2
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks:
            os.kill(pid, signum)
        time.sleep(20 if signum == signal.SIGSTOP else 0)
    code, out, err = job.finish()
    assert (code, err) == (0, "")
    assert "Resuming" not in out


# Evaluations that get worse before they get better again: small batches, high rates.
WILD = (
    "--epochs",
    "8",
    "--sparse-lr",
    "0.5",
    "--dense-lr",
    "0.02",
    "--eval-every",
    "7",
    "--warmup",
    "0",
    "--decay",
    "0",
)


def test_early_stopping_restores_the_best(data: Path, tmp_path: Path) -> None:
    options = (*WILD, "--patience", "3", "--metric", "logloss")
    code, out, err = run(command(data, tmp_path / "run", options=options), environment(tmp_path / "log"))
    assert (code, err) == (0, "")
    evaluations = [line for line in records(tmp_path / "run") if line["split"] == "validation"][:-1]
    losses = [line["logloss"] for line in evaluations]
    best = min(range(len(losses)), key=lambda i: losses[i])
    assert len(losses) == best + 1 + 3, "it stops three evaluations after the best, and not before"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == evaluations[-1]["step"] < 160
    assert summary["restored_step"] == summary["best"]["step"] == evaluations[best]["step"]
    assert summary["best"]["value"] == losses[best]
    assert summary["validation"]["logloss"] == losses[best]
    assert f"no better logloss since step {evaluations[best]['step']}" in out
    # A kill on the way changes nothing.
    kills = [{"at": "step", "rank": 0, "step": step, "do": "kill"} for step in (9, evaluations[-1]["step"])]
    env = environment(tmp_path / "log_killed", kills)
    codes = [run(command(data, tmp_path / "killed", options=options), env)[0] for _ in range(3)]
    assert codes == [-9, -9, 0]
    assert_same_run(tmp_path / "killed", tmp_path / "run")


def test_rates_drop_on_a_plateau(data: Path, tmp_path: Path) -> None:
    options = (*WILD, "--lr-patience", "2", "--lr-factor", "0.5", "--metric", "logloss")
    env = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 90, "do": "kill"}])
    code, _, _ = run(command(data, tmp_path / "run", options=options), env)
    assert code == -9
    code, _, err = run(command(data, tmp_path / "run", options=options), env)
    assert (code, err) == (0, "")
    lines = records(tmp_path / "run")
    losses = {line["step"]: line["logloss"] for line in lines if line["split"] == "validation"}
    best, bad, drops = math.inf, 0, []
    for step, loss in losses.items():
        bad = 0 if loss < best else bad + 1
        best = min(best, loss)
        if bad == 2:
            drops.append(step)
            bad = 0
    assert drops, "the loss never stays bad, so nothing is tested"
    for line in lines:
        if line["split"] == "train":
            expected = 0.5 ** sum(step < line["step"] for step in drops)
            assert line["lr"]["sparse"] == pytest.approx(0.5 * expected, rel=1e-6)
            assert line["lr"]["dense"] == pytest.approx(0.02 * expected, rel=1e-6)


def without_validation(data: Path, copy: Path) -> Path:
    shutil.copytree(data, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["validation"] = []
    del manifest["blocks"]  # the checksums of rows are those of all three splits
    (copy / "manifest.json").write_bytes(seal(manifest))
    return copy


def test_data_without_a_validation_split(data: Path, tmp_path: Path) -> None:
    copy = without_validation(data, tmp_path / "data")
    code, _, err = run(command(copy, tmp_path / "run"), environment(tmp_path / "log"))
    assert (code, err) == (0, "")
    assert "validation" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {line["split"] for line in records(tmp_path / "run")} == {"train", "test"}
    code, _, err = run(command(copy, tmp_path / "other", options=("--patience", "2")), environment(tmp_path / "log"))
    assert code == 2
    assert err == (
        f"error: --patience: {copy} has no validation split; leave the option out, or prepare the data "
        "with --validation\n"
    )
    assert not (tmp_path / "other").exists()


@CAMPAIGN
def test_checkpoints_at_a_url(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """On fsspec's local files, under its own protocol: DCP then goes through fsspec."""
    options = ("--checkpoints", f"file://{tmp_path}/elsewhere")
    env = environment(tmp_path / "log", [{"at": "step", "rank": 0, "step": 14, "do": "kill"}], FAULTS_SLEEP="0.03")
    assert run(command(data, tmp_path / "run", options=options), env)[0] == -9
    shutil.rmtree(tmp_path / "run")  # as on a machine whose own disk is new after each start
    code, out, err = run(command(data, tmp_path / "run", options=options), env)
    assert (code, err) == (0, "")
    assert re.search(r"Resuming from step (8|12) of", out)
    assert not (tmp_path / "run" / "checkpoints").exists()
    mine, theirs = read_tensors(tmp_path / "run" / "checkpoint"), read_tensors(undisturbed / "checkpoint")
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    other = command(data, tmp_path / "another", options=(*options, "--seed", "3"))
    code, _, err = run(other, env)
    assert code == 2
    assert err.startswith(
        f"error: --checkpoints file://{tmp_path}/elsewhere: holds a run with --seed 0, not 3; give the"
    )

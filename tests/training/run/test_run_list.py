"""``runs``: what it lists is what the files say, by hand-made folders and a real lock."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.distributed.run_lock import RunLock
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.run.run_list import RunLine, list_runs

FIGURES = {"rows": 9, "logloss": 0.4, "ne": 0.7, "calibration": 1.0}


def make(folder: Path, *records: dict[str, Any], started: str = "2026-11-01 10:00:00 UTC", **summary: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"format_version": 1, "config": {}, "num_embeddings": {"user": 5}, "numeric": []}
    (folder / "config.json").write_text(json.dumps(config | {"machine": {"started": started}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    if summary:
        fixed = {"samples_per_second": 1234.5, "train_seconds": 2.0, "epochs": 1, "batch_size": 8, "world_size": 1}
        (folder / "summary.json").write_text(json.dumps(fixed | summary))
    return folder


def test_every_kind_of_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"split": "train", "loss": 0.5}
    done = make(
        tmp_path / "done", steps=30, validation={**FIGURES, "auc": 0.75}, test={**FIGURES, "auc": None},
    )  # fmt: skip
    evaluation = {"step": 20, "split": "validation", "auc": 0.625}
    begun = make(tmp_path / "begun", {**step, "step": 20, "samples_per_second": 10.0}, evaluation, {**step, "step": 25})
    seed = make(tmp_path / "frappe" / "seed_10", steps=5)
    make(tmp_path / "frappe" / "seed_2", started="", steps=4)
    broken = make(tmp_path / "broken")
    (broken / "summary.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").touch()

    problem = f"{broken / 'summary.json'}: the file is damaged (object missing required field "
    stopped, bad, finished, second, tenth = list_runs(tmp_path)
    assert (bad.run, bad.status) == (broken, "damaged")
    assert bad.problem.startswith(problem)
    assert stopped == RunLine(
        run=begun, status="stopped", step=25, validation_auc=0.625, started="2026-11-01 10:00:00 UTC"
    )
    assert finished == RunLine(
        run=done, status="finished", step=30, validation_auc=0.75, samples_per_second=1234.5,
        started="2026-11-01 10:00:00 UTC",
    )  # fmt: skip
    assert [one.run.name for one in (second, tenth)] == ["seed_2", "seed_10"]
    assert list_runs(seed) == [tenth]

    cli.main(["runs", str(tmp_path)])
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0].strip() == "run"
    assert rows[2].split() == [str(done), "finished", "30", "0.75000", "-", "1,234", "2026-11-01", "10:00:00", "UTC"]
    assert rows[3].split() == [str(second.run), "finished", "4", "-", "-", "1,234", "-"]
    assert last.startswith(problem)
    cli.main(["runs", str(tmp_path), "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in listed] == [str(one.run) for one in (stopped, bad, finished, second, tenth)]
    assert listed[2]["test_auc"] is None


def _hold(folder: Path, held: Any, end: Any) -> None:
    lock = RunLock(folder)
    held.set()
    end.wait(60)
    lock.release()


def test_a_run_that_is_training_now(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    trainer = context.Process(target=_hold, args=(run, held, end))
    trainer.start()
    assert held.wait(60)
    assert [one.status for one in list_runs(tmp_path)] == ["running"]
    trainer.kill()  # its .lock stays
    trainer.join()
    assert (run / ".lock").exists()
    assert [one.status for one in list_runs(tmp_path)] == ["stopped"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder; name the folder that holds the runs"):
        list_runs(tmp_path / "absent")
    with pytest.raises(UserError, match="the folder holds no run; name the parent folder of a train --output"):
        list_runs(tmp_path)
    with pytest.raises(UserError, match="runs compare: name at least two run folders"):
        cli.parse(["runs", "compare", str(tmp_path)]).run()

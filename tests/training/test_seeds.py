"""Several seeds: each trained once, and their mean and standard deviation as the statistics module has them."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import make_data, result
from tests.support.evaluations import evaluated
from torchrec_deepfm.console import seeds_summary
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.seeds import summarise, train_seeds
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(factor_dim=3, over_arch_layer_sizes=(4,), batch_size=500, seed=4)


def test_seeds_are_added_to_those_that_are_there(tmp_path: Path, device: torch.device) -> None:
    data = make_data(tmp_path / "data")
    output = tmp_path / "runs"
    first = train_seeds(CONFIG, data, output, device, count=2)
    assert not first.before
    times = {path: path.stat().st_mtime_ns for path in output.glob("seed_*/*") if path.is_file()}
    reported: list[str] = []
    found = train_seeds(CONFIG, data, output, device, count=3, say=reported.append)
    assert not found.before
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a finished run was trained again"
    assert reported[0] == f"seed 4, 1 of 3: {output / 'seed_4'}"
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary == found.summary
    assert (summary["seeds"], summary["validation"]["rows"]) == ([4, 5, 6], 300)
    runs = [json.loads((output / f"seed_{seed}" / "summary.json").read_text()) for seed in (4, 5, 6)]
    for split in ("validation", "test"):
        for metric in ("auc", "logloss", "ne", "calibration"):
            values = [run[split][metric] for run in runs]
            assert len(set(values)) == 3
            assert summary[split][metric] == pytest.approx(sum(values) / 3)
            assert summary["std"][split][metric] == pytest.approx(statistics.stdev(values))
            assert [summary["runs"][f"seed_{seed}"][split][metric] for seed in (4, 5, 6)] == values
    assert f"{summary['test']['auc']:.5f}" in seeds_summary(summary, output)
    assert f"{summary['std']['test']['auc']:.5f}" in seeds_summary(summary, output)
    assert train_seeds(CONFIG, data, output, device, count=3).before
    # A smaller count, or another first seed, keeps what is there in the summary.
    (output / "summary.json.partial").touch()
    smaller = train_seeds(CONFIG, data, output, device, count=2)
    assert smaller.before
    assert smaller.summary == summary == json.loads((output / "summary.json").read_text(encoding="utf-8"))
    later = train_seeds(replace(CONFIG, seed=10), data, output, device, count=2).summary
    assert later["seeds"] == [4, 5, 6, 10, 11]
    assert list(later["runs"]) == [f"seed_{seed}" for seed in (4, 5, 6, 10, 11)]
    with pytest.raises(UserError) as others:
        train_seeds(replace(CONFIG, seed=20, dropout=0.25), data, output, device, count=2)
    assert str(others.value).startswith(f"--output {output / 'seed_4'}: holds a run with --dropout 0.5, not 0.25; ")
    # Such a folder is not a run.
    with pytest.raises(UserError) as no_run:
        evaluated(output, data, "test", device)
    assert str(no_run.value) == (
        f"--run {output}: the folder holds runs of several seeds; name one of them, such as {output / 'seed_4'}"
    )
    with pytest.raises(UserError) as taken:
        train(CONFIG, data, output, device)
    assert str(taken.value) == (
        f"--output {output}: the folder holds runs of several seeds; resume them with --seeds, or name another one"
    )
    # Each run is the run of its seed alone.
    train(TrainConfig(factor_dim=3, over_arch_layer_sizes=(4,), batch_size=500, seed=5), data, tmp_path / "one", device)
    assert result(tmp_path / "one") == result(output / "seed_5")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.write_text(""), "a file has this name; name a folder"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").touch()),
            "the folder holds a single run; name another one for --seeds",
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "mine.txt").touch()),
            "the folder is not empty (mine.txt); name another one",
        ),
        (
            lambda folder: (folder / "seed_best").mkdir(parents=True),
            "the folder is not empty (seed_best); name another one",
        ),
        (
            lambda folder: (folder.mkdir(), (folder / "seed_4").touch()),
            "the folder is not empty (seed_4); name another one",
        ),
    ],
)
def test_a_folder_with_something_else(tmp_path: Path, device: torch.device, make: Any, message: str) -> None:
    data = make_data(tmp_path / "data")
    make(tmp_path / "runs")
    with pytest.raises(UserError) as raised:
        train_seeds(CONFIG, data, tmp_path / "runs", device, count=2)
    assert str(raised.value) == f"--output {tmp_path / 'runs'}: {message}"


def test_resume_never_wants_an_empty_folder(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "runs" / "seed_4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the folder is not empty \(seed_4\); name another one$"):
        train_seeds(
            CONFIG, make_data(tmp_path / "data"), tmp_path / "runs", device, RunOptions(resume="never"), count=2
        )


def test_a_metric_that_a_run_lacks() -> None:
    runs = {0: {"test": {"auc": None, "logloss": 0.5, "rows": 3}}, 1: {"test": {"auc": 0.5, "logloss": 0.7, "rows": 3}}}
    found = summarise(runs)
    assert found["test"] == {"auc": None, "logloss": pytest.approx(0.6), "rows": 3}
    assert found["std"]["test"] == {"auc": None, "logloss": pytest.approx(statistics.stdev([0.5, 0.7]))}
    assert "validation" not in found
    assert "-" in seeds_summary({**found, "test": {**found["test"], "ne": None, "calibration": None}}, Path("x"))

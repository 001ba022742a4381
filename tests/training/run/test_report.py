"""The run's own report: what it shows is what the run's files say, and no run is too odd for it."""

import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import make_data
from tests.support.pages import Cells, embedded_data
from tests.support.pictures import undrawn
from tests.training.run.written_run import (
    BINS,
    CONFIG,
    CURVES,
    DATA,
    IMPORTANCE,
    PLAN,
    RECORDS,
    SUMMARY,
    WEIGHTS,
    evaluation,
    make_run,
    train,
)
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.report.page import NOTHING
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run.report import write_run_report
from torchrec_deepfm.training.trainer import train as train_run

pytestmark = pytest.mark.pictures


@pytest.fixture
def no_pictures() -> Iterator[None]:
    """Pictures cost seconds: for tests in which they are those of any run."""
    with undrawn():
        yield


def read(folder: Path) -> tuple[Cells, dict[str, Any]]:
    html = write_run_report(folder).read_text(encoding="utf-8")
    return Cells(html), embedded_data(html)


def test_it_shows_what_the_files_say(tmp_path: Path) -> None:
    shown, data = read(make_run(tmp_path / "run"))
    assert ["validation", "0.81250", "0.40000", "0.70000", "1.01000", "0.03000", "50"] in shown.rows
    assert ["test", NOTHING, "0.41000", NOTHING, NOTHING, "0.03000", "40"] in shown.rows
    assert ["validation", "0.2500", "0.5000", "25", "0.4000", "0.3600"] in shown.rows
    # 1000 rows of 8 numbers (4 + 1, padded) of 4 bytes
    assert ["t_user", "1,000", "0.03", "row_wise", "fused", "0 1"] in shown.rows
    assert ["t_<b>item", "10", "0.00", "data_parallel", "dense", "0 1"] in shown.rows
    assert ["--over-arch-layer-sizes", "32 16", "400 400 400"] in shown.rows
    assert data["summary"] == SUMMARY
    assert data["calibration"] == {"validation": BINS, "test": BINS}
    assert data["curves"]["train_loss"] == [[20, 0.7], [40, 0.5], [60, 0.45]]
    assert data["curves"]["evaluations"] == [record for record in RECORDS if record["split"] != "train"]
    error = "expected calibration error 0.0300"
    assert [image["alt"] for image in shown.images] == [
        "The training loss goes from 0.7000 to 0.4500.",
        "The validation AUC ends at 0.8000.",
        "The learning rates by step.",
        f"Share of clicks against prediction. validation: {error}.",
        f"Share of clicks against prediction. test: {error}.",
        "samples per second by step.",
        "step time, ms by step.",
    ]
    # 0.5 of the log loss over 0.9 of the NE
    assert "A constant prediction of the click rate has the loss 0.5556" in shown.text


def test_it_shows_what_newer_files_say(tmp_path: Path) -> None:
    options = {**CONFIG["config"], "dense_lr": 0.001}
    config = {
        **CONFIG,
        "config": options,
        "machine": {"cpu": "A CPU", "load": "0.50 of 2"},
        "versions": {"commit": "abc123"},
    }
    files = {"curves": {"format_version": 1, "splits": {"test": CURVES}}, "data": DATA, "importance": IMPORTANCE}
    shown, data = read(make_run(tmp_path / "run", config=config, **files))
    assert data["scores"] == {"test": CURVES}
    assert data["importance"] == IMPORTANCE
    assert ["train", "3,840", "960", "25.00%"] in shown.rows
    assert ["test", "40", NOTHING, NOTHING] in shown.rows
    assert ["user", "1,000", "50.00%", "62.50%"] in shown.rows
    assert ["<b>item", "-0.01000", "0.5000"] in shown.rows
    assert ["--dense-lr", "0.001"] in shown.rows
    assert "1 option with its default" in shown.text
    alts = [image["alt"] for image in shown.images]
    assert "Precision against recall; average precision: test 0.6789." in alts
    assert "Histogram of the scores of test: 20 of label 1, 30 of label 0." in alts
    assert "The fields by importance, user first: loss of AUC if shuffled." in alts
    assert all(text in shown.text for text in ("A CPU", "0.50 of 2", "abc123"))


@pytest.mark.usefixtures("no_pictures")
def test_the_command_repeats_the_run(tmp_path: Path) -> None:
    """The command line itself reads it, into the same options."""
    options = {"terms": ["linear", "fm"], "batch_norm": True, "sparse_lr": 0.3, "qcomms": ["fp16", "bf16"]}
    written = {**CONFIG, "config": {**CONFIG["config"], **options}, "data": "my data", "world_size": 1}
    shown, _ = read(make_run(tmp_path / "run", config=written))
    [line] = [line for line in shown.text.splitlines() if line.startswith("python -m torchrec_deepfm train")]
    words = shlex.split(line)[4:]
    command = cli.parse(["train", *words])
    assert (str(command.data), str(command.output)) == ("my data", f"{tmp_path / 'run'}-again")
    assert command.config == TrainConfig(**written["config"])
    ranks, _ = read(make_run(tmp_path / "ranks"))
    assert "torchrun --nproc-per-node 2 -m torchrec_deepfm train --data data/own" in ranks.text
    assert f"--plan {tmp_path / 'ranks' / 'plan.json'}" in ranks.text


@pytest.mark.parametrize(
    ("files", "pictures", "text"),
    [
        ({"summary": None, "calibration": None}, 5, "This run is not finished. Its last record is of step 60."),
        ({"summary": None, "calibration": None, "metrics": None, "plan": None}, 0, "Its last record is of step 0."),
        ({"metrics": [train(1, 0.7)]}, 3, "The training loss goes from 0.7000 to 0.7000."),
        ({"metrics": [train(1, math.nan), evaluation(1, auc=None)]}, 3, "Learning curves"),
        ({"metrics": [train(1, None)]}, 2, "Nothing has been recorded."),
        ({"metrics": json.dumps(train(5, 0.5)) + '\n{"step": 6, "split": "tr'}, 3, "Learning curves"),
        ({"metrics": [{**train(20, 0.5), "lr": {}}, evaluation(20, "test")]}, 4, "Learning curves"),
        ({"calibration": {"splits": {"validation": [], "test": [BINS[0]]}}}, 6, "expected calibration error"),
        ({"calibration": {"splits": {"test": [{**BINS[0], "predicted": 0.0, "observed": 0.0}]}}}, 6, "Calibration"),
        ({"metrics": [train(step, 1 / step, step // 9) for step in range(1, 5000)]}, 6, "Learning curves"),
    ],
)
def test_odd_runs(tmp_path: Path, files: dict[str, object], pictures: int, text: str) -> None:
    shown, _ = read(make_run(tmp_path / "run", **files))
    assert len(shown.images) == pictures
    assert text in shown.text or any(text in (image["alt"] or "") for image in shown.images)


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        ({key: SUMMARY[key] for key in SUMMARY if key not in ("validation", "test", "best")}, "neither"),
        ({**SUMMARY, "restored_step": 40}, "step 40, the best one"),
        ({**SUMMARY, "weights": WEIGHTS}, "best, the run's own"),
        ({**SUMMARY, "weights": WEIGHTS}, "checkpoint_last"),
        ({**SUMMARY, "best": {"metric": "auc", "value": None, "step": None}}, "Result"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_odd_results(tmp_path: Path, summary: dict[str, object], text: str) -> None:
    shown, _ = read(make_run(tmp_path / "run", summary=summary))
    assert (len(shown.images), text in shown.text) == (7, True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": None}, "--run {}: not a run folder (no config.json); name the folder that train wrote"),
        ({"config": "{"}, "{}/config.json: the file is damaged ("),
        ({"config": {**CONFIG, "format_version": 99}}, "{}/config.json: the file is damaged (format_version: "),
        (
            {"config": {**CONFIG, "config": {"speed": 9}}},
            "{}/config.json: the file does not fit this version (config.s",
        ),
        ({"summary": "[1]"}, "{}/summary.json: the file is damaged (expected `object`, got `array`); no report "),
        ({"summary": "{}"}, "{}/summary.json: the file is damaged (object missing required field "),
        ({"summary": {"steps": 3}}, "{}/summary.json: the file is damaged (object missing required field "),
        ({"config": {**CONFIG, "config": 3}}, "{}/config.json: the file is damaged (config: expected `object`, got "),
        ({"plan": {**PLAN, "tables": [{}]}}, "{}/plan.json: "),
        ({"summary": {**SUMMARY, "steps": [1]}}, "{}/summary.json: the file is damaged (steps: expected `int`, got "),
        ({"summary": {**SUMMARY, "train_seconds": 10**400}}, "{}/summary.json: the file is damaged (train_seconds: "),
        ({"metrics": [{**train(1, 0.5), "step": 10**400}]}, "{}/metrics.jsonl, line 1: not a record of a training"),
        ({"metrics": 'half a line\n{"step": 1}\n'}, "{}/metrics.jsonl, line 1: not a record of a training"),
        ({"metrics": json.dumps(train(1, 0.5)) + "\n" + "[" * 100_000 + "\n"}, "{}/metrics.jsonl, line 2: not a rec"),
        ({"metrics": "\0" * 5000}, "{}/metrics.jsonl, line 1: not a record of a training"),
        (
            {"calibration": {"splits": {"test": [{**BINS[0], "rows": -1}, {**BINS[0], "rows": 1}]}}},
            "{}/calibration.json: the file is damaged (splits[...][0].rows: expected `int` >= 0)",
        ),
        ({"config": {**CONFIG, "versions": {"\ud800": "1"}}}, "{}/report.html: the page can't be written (a text"),
        ({"calibration": {"splits": {"test": [{"rows": 1}]}}}, "{}/calibration.json: the file is damaged (splits"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_damaged_runs_are_reported_in_one_line(tmp_path: Path, files: dict[str, object], message: str) -> None:
    folder = make_run(tmp_path / "run", **files)
    with pytest.raises(UserError) as refused:
        write_run_report(folder)
    assert str(refused.value).startswith(message.format(folder))
    assert "\n" not in str(refused.value)
    assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("no_pictures")
def test_names_that_are_not_utf_8(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    name = os.fsdecode(b"run \xff")
    try:
        folder = make_run(tmp_path / name, config={**CONFIG, "data": os.fsdecode(b"data/\xfe")})
    except OSError:
        pytest.skip("this file system takes no such name")
    shown, _ = read(folder)
    assert "Run run \N{REPLACEMENT CHARACTER}" in shown.text
    assert "data/?" in shown.text
    cli.main(["report", "--run", str(folder)])
    assert b"report.html" in capfdbinary.readouterr().out


def test_a_folder_of_seeds(tmp_path: Path) -> None:
    (tmp_path / "seed_3").mkdir()
    make_run(tmp_path / "seed_12")
    make_run(tmp_path / "seed_4")
    with pytest.raises(UserError) as refused:
        write_run_report(tmp_path)
    assert str(refused.value) == (
        f"--run {tmp_path}: the folder holds runs of several seeds; name one of them, such as {tmp_path / 'seed_4'}"
    )


def test_a_report_that_is_there_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    before = write_run_report(folder).read_text()
    (folder / "summary.json").write_text("{}")
    with pytest.raises(UserError):
        write_run_report(folder)
    assert (folder / "report.html").read_text() == before
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="not a run folder"):
        write_run_report(folder)


def test_a_report_that_fails_does_not_lose_the_run(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError("no room\nfor a picture")

    data, said = make_data(tmp_path / "data"), []
    config = TrainConfig(factor_dim=3, over_arch_layer_sizes=(4,), batch_size=200)
    with monkeypatch.context() as patched:
        patched.setattr("torchrec_deepfm.training.run.report.write_page", fail)
        result = train_run(config, data, tmp_path / "run", device, say=said.append)
    assert said == [
        "the report could not be drawn (no room for a picture); python -m torchrec_deepfm report tries again"
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result.summary
    assert not (tmp_path / "run" / "report.html").exists()
    shown, _ = read(tmp_path / "run")
    assert len(shown.images) == 8  # loss, AUC, ROC, precision; histogram and reliability of two splits
    assert train_run(config, data, tmp_path / "run", device).before

"""From raw text to an evaluated run: the commands one after the other."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import run_module


def test_from_raw_text_to_an_evaluated_run(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return run_module(["torchrec_deepfm", *words], cwd=tmp_path)

    made = run("synthetic", "--output", "raw", "--rows", "4000", "--click-rate", "0.1")
    assert (made.returncode, made.stderr) == (0, "")
    assert "best reachable AUC" in made.stdout
    splits = ["--validation", "raw/validation.tsv", "--test", "raw/test.tsv"]
    prepared = run("prepare", "--input", "raw/day_0.tsv", *splits, "--output", "data")
    assert (prepared.returncode, prepared.stderr) == (0, "")
    # A Python of its own: nothing is to be seen of the warnings that torch, FBGEMM and TorchRec have while they load.
    command = [sys.executable, "-m", "torchrec_deepfm", "train", "--data", "data", "--output", "run"]
    trained = subprocess.run(
        [*command, "--recipe", "smoke"], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert (trained.returncode, trained.stderr) == (0, "")
    named = trained.stdout.splitlines()[-1]
    assert named.startswith("wrote run/: ")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {name.strip("/,") for name in named.split()[2:]} == written
    assert written >= {
        "checkpoint",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "plan.json",
        "calibration.json",
        "curves.json",
        "data.json",
        "importance.json",
        "report.html",
        "summary.json",
        "tensorboard",
    }

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    truth = json.loads((tmp_path / "raw" / "truth.json").read_text())
    assert summary["test"]["best_reachable_auc"] == truth["files"]["test.tsv"]["auc"]
    assert summary["test"]["rows"] == truth["files"]["test.tsv"]["rows"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "validation", "test"}
    assert all({"step", "split", "loss"} <= line.keys() for line in lines)

    (tmp_path / "run" / "report.html").unlink()
    drawn = run("report", "--run", "run")
    assert (drawn.returncode, drawn.stdout, drawn.stderr) == (0, "wrote run/report.html\n", "")
    reported = run("recipes", "smoke", "--data", "data")
    assert (reported.returncode, reported.stderr) == (0, "")
    assert f"steps             {summary['steps']:,} of 256 samples" in reported.stdout

    again = run("train", "--data", "data", "--output", "run", "--recipe", "smoke")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("run: this training is finished, there is nothing left to do\n")

    evaluated = run("evaluate", "--run", "run", "--data", "data")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    result = json.loads((tmp_path / "run" / "evaluate_test.json").read_text())
    assert summary["test"].items() <= result.items()

"""The whole way as a user goes it: README's commands in a fresh copy, `make train` at its full size among them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from benchmarks.quality.workers.prepared_arrays import Arrays
from benchmarks.quality.workers.train_sklearn import features
from tests.support.end_to_end import ROOT, Workspace
from tests.support.ranks import CPU, one_rank, run_module
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.training.recipes import recipe
from torchrec_deepfm.training.trainer import train

LEFT_OUT = {
    "make test": "it is what runs this test",
    "torchx run apps/deepfm.py": "`make train` is the same on two ranks",
}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_readme_has_the_two_commands() -> None:
    assert commands()[:2] == ["make train", "make test"]


@pytest.fixture(scope="module")
def outputs(workspace: Workspace) -> dict[str, str]:
    """What each command of README printed: in order, in one copy of the repository, its environment on the path."""
    found = {}
    for command in commands():
        if command not in LEFT_OUT:
            done = workspace.run(command)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            found[command] = done.stdout + done.stderr
    return found


def test_every_command_of_readme(outputs: dict[str, str]) -> None:
    assert {*outputs, *LEFT_OUT} == set(commands())


def test_make_train_reaches_the_planted_optimum(outputs: dict[str, str], workspace: Workspace) -> None:
    """Two ranks, the default recipe, the default synthetic set."""
    [run] = re.findall(r"wrote (runs/\S+)/: ", outputs["make train"])
    made = summary(workspace.folder / run)
    assert made["world_size"] == 2
    best = made["test"]["best_reachable_auc"]
    assert (made["test"]["auc"] - 0.5) / (best - 0.5) >= 0.98
    assert made["test"]["lift"] == pytest.approx((made["test"]["auc"] - 0.5) / (best - 0.5))


def test_what_lacks_terms_lands_lower(outputs: dict[str, str], workspace: Workspace, tmp_path: Path) -> None:
    """Logistic regression and a factorization machine, on the data and with the options of README's first run."""
    data, lifts = PreparedData.open(workspace.folder / "data" / "prepared"), []
    for terms in (("linear",), ("linear", "fm")):
        config = replace(recipe("synthetic"), epochs=1, terms=terms)
        with one_rank():
            lifts.append(train(config, data, tmp_path / str(len(terms)), CPU).summary["test"]["lift"])
    lifts.append(summary(workspace.folder / "runs" / "first")["test"]["lift"])
    assert lifts[0] > 0.7
    assert np.diff(lifts).min() > 0.02


def test_two_ranks_learn_from_real_click_logs(shared_data: Path, tmp_path: Path) -> None:
    """By default, not worse than logistic regression with the best penalty by validation, less 0.01 for its noise."""
    prepare([shared_data / "criteo" / "dac_sample_12000.tsv"], tmp_path / "data", min_count=4)
    words = ["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", "2", "-m", "torchrec_deepfm", "train"]
    # One evaluation after the best is enough here: the weights written are the same.
    words += ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--patience", "1"]
    done = run_module(words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = summary(tmp_path / "run")
    assert found["world_size"] == 2
    assert found["validation"]["rows"] + found["test"]["rows"] < 12_000
    arrays = Arrays.read(tmp_path / "data")
    train, deviations = arrays.splits["train"], np.maximum(arrays.splits["train"].dense.std(axis=0), 1e-6)
    peer = LogisticRegression(C=0.03, max_iter=1000).fit(features(train, arrays, deviations), train.labels)
    chances = peer.predict_proba(features(arrays.splits["test"], arrays, deviations))[:, 1]
    assert found["test"]["auc"] > max(0.68, roc_auc_score(arrays.splits["test"].labels, chances) - 0.01)
    assert found["test"]["ne"] < 1.0

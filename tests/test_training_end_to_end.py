"""The whole way as a user goes it: `make train` at its full size, and TorchX on real click logs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import Workspace


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(workspace: Workspace) -> dict[str, Any]:
    """`make train`: two ranks, the default recipe, the default synthetic set."""
    before = set((workspace.folder / "runs").glob("*"))
    done = workspace.run("make train")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [run] = set((workspace.folder / "runs").glob("*")) - before
    assert f"wrote runs/{run.name}/" in done.stdout + done.stderr
    assert "of its lift over chance reached" in done.stdout + done.stderr
    return summary(run)


def test_make_train_reaches_the_planted_optimum(made: dict[str, Any]) -> None:
    assert made["world_size"] == 2
    best = made["test"]["best_reachable_auc"]
    assert (made["test"]["auc"] - 0.5) / (best - 0.5) >= 0.98
    assert made["test"]["lift"] == pytest.approx((made["test"]["auc"] - 0.5) / (best - 0.5))


@pytest.mark.parametrize(("terms", "at_most"), [("linear", 0.90), ("linear fm", 0.95)], ids=["LR", "FM"])
def test_what_lacks_terms_lands_lower(made: dict[str, Any], workspace: Workspace, terms: str, at_most: float) -> None:
    run = f"runs/{terms.replace(' ', '-')}"
    done = workspace.run(f"torchx run apps/deepfm.py -j 1x2 -- --terms {terms} --output {run}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(workspace.folder / run)["test"]["lift"] < at_most
    assert summary(workspace.folder / run)["test"]["auc"] < made["test"]["auc"] - 0.02


def test_two_ranks_learn_from_real_click_logs(workspace: Workspace, shared_data: Path) -> None:
    raw = shared_data / "criteo" / "dac_sample_12000.tsv"
    done = workspace.run(
        f"python -m torchrec_deepfm prepare --input {raw} --output data/criteo --min-count 4 && "
        "torchx run apps/deepfm.py -j 1x2 -- --data data/criteo --output runs/criteo --batch-size 64 --epochs 2 "
        "--over-arch-layer-sizes 64 64"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = summary(workspace.folder / "runs" / "criteo")
    assert found["world_size"] == 2
    assert found["validation"]["rows"] + found["test"]["rows"] < 12_000
    # Logistic regression on these rows gives 0.74 to 0.77; 1,200 test rows carry a noise of 0.015.
    assert found["test"]["auc"] > 0.68
    assert found["test"]["ne"] < 1.0


def test_a_users_mistake_ends_in_one_line_through_torchx(workspace: Workspace) -> None:
    done = workspace.run("torchx run apps/deepfm.py -j 1x2 -- --data nowhere --output runs/never")
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert "nowhere: no such folder; make it with prepare" in text
    assert "Traceback" not in text
    assert not (workspace.folder / "runs" / "never").exists()

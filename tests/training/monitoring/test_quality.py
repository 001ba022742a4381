"""A model that is worse than a constant, or inputs that lead to one, do not pass in silence."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import run_module
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.training.monitoring.quality import (
    binary_entropy,
    click_rate,
    first_loss_warnings,
    input_warnings,
    refuse_worse,
    result_warnings,
    scale_warnings,
    unknown_warnings,
)
from torchrec_deepfm.training.seeds import summarise

ROWS = 3000


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Labels that the user decides, and a Unix time as the table has it."""
    folder = tmp_path_factory.mktemp("ratings")
    draw = random.Random(0)
    users = [draw.randrange(30) for _ in range(ROWS)]
    labels = [int((user % 3 == 2) != (draw.random() < 0.25)) for user in users]
    lines = [
        f"{user},{draw.randrange(874_724_710, 893_286_638)},{label}" for user, label in zip(users, labels, strict=True)
    ]
    (folder / "ratings.csv").write_text("\n".join(["user,timestamp,label", *lines]))
    schema = Schema(label="label", numeric=("timestamp",), categorical=("user",), layout="table")
    return prepare([folder / "ratings.csv"], folder / "data", schema=schema, min_count=1)


def test_columns_far_from_unit_scale_are_named() -> None:
    draw = np.random.default_rng(0)
    columns = {
        "scaled": draw.normal(size=5000),
        "counts": draw.exponential(8.0, 5000) + 40,
        "tiny": draw.random(5000) * 1e-3,
        "rare": np.where(np.arange(5000) == 7, 2000.0, 0.0),
        "zeros": np.zeros(5000),
        "nine": np.full(5000, 9.0),
        "broken": np.where(np.arange(5000) == 7, np.nan, 1.0),
    }
    [line] = scale_warnings(list(columns), np.stack(list(columns.values()), axis=1))
    assert [name for name in columns if repr(name) in line] == ["counts", "tiny", "rare"]
    assert f"root mean square {math.sqrt(sum(x * x for x in columns['counts']) / 5000):.2g}," in line
    assert scale_warnings(["scaled"], columns["scaled"][:, None]) == []


def test_every_part_of_the_training_rows_is_sampled(ratings: PreparedData) -> None:
    dense = np.concatenate([ratings.arrays(day).dense.array for day in ratings.days("train")])
    [line] = input_warnings(ratings)
    assert f"root mean square {math.sqrt(np.mean(dense.astype(float) ** 2)):.2g}" in line
    labels = np.concatenate([ratings.arrays(day).labels.array for day in ratings.days("train")])
    assert click_rate(ratings) == pytest.approx(labels.mean())


@pytest.mark.parametrize("rate", [0.5, 0.034, 0.0, None])
def test_an_untrained_model_gives_no_warning(rate: float | None) -> None:
    assert first_loss_warnings(20, math.log(2) * 1.01, rate) == []
    [line] = first_loss_warnings(20, 30.0, rate)
    if rate:
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert binary_entropy(rate) == pytest.approx(entropy)
        assert f"{30 / entropy:.3g} times the entropy of the click rate ({entropy:.3g})" in line


def test_columns_that_held_out_rows_do_not_know_are_named() -> None:
    def line(mode: str = "vocabulary", **test: float) -> list[str]:
        train = {"user": 0.01, "item": 0.2, "shop": 0.0}
        return unknown_warnings({"mode": mode, "splits": {"train": {"zero": train}, "test": {"zero": train | test}}})

    assert line() == line(item=0.79) == line(user=0.49) == line("hash", user=1.0) == []
    [warning] = line(user=0.5, shop=0.9)
    assert warning.startswith(
        "column 'shop' is unknown or rare in 90% of the test rows, but in 0% of the training rows,"
    )
    assert "'user' is unknown or rare in 50% of the test rows, but in 1%" in warning
    assert "'item'" not in warning
    assert line(item=0.8) != []


def test_the_result_of_each_split_and_seed_counts() -> None:
    good, bad = {"auc": 0.7, "ne": 0.999}, {"auc": 0.6, "ne": 1.001}
    assert result_warnings({"validation": good, "test": good}) == []
    assert result_warnings({"validation": good, "test": {"auc": None, "ne": None}}) == []
    [line] = result_warnings({"validation": good, "test": bad})
    assert line.startswith("test: ne 1.00100 is above 1: ")
    refuse_worse({"test": bad}, "run", 1.01)
    with pytest.raises(ValueError, match=r"^run: validation: ne 0.99900 is above 0.9; the run is kept"):
        refuse_worse({"validation": good}, "run", 0.9)
    summary = summarise({3: {"test": good}, 4: {"test": bad | {"ne": 1.0005}, "warnings": ["test: worse"]}})
    assert summary["warnings"] == ["seed 4: test: worse"]
    with pytest.raises(ValueError, match=r"^runs/seed_4: test: ne 1.00050 is above 1"):
        refuse_worse(summary, "runs", 1.0)


def test_a_model_worse_than_a_constant_has_its_own_exit_code(ratings: PreparedData, tmp_path: Path) -> None:
    """On two ranks that may restart: they do not. The run is complete, and the same command ends the same way."""
    words = ["torchrec_deepfm", "train", "--data", str(ratings.folder), "--output", str(tmp_path / "run")]
    words += ["--recipe", "smoke", "--batch-size", "64"]
    launcher = ["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", "2", "--max_restarts", "2", "-m"]
    done = run_module([*launcher, *words])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ne = summary["validation"]["ne"]
    assert ne > 1
    error = f"error: {tmp_path / 'run'}: validation: ne {ne:.5f} is above 1"
    assert (done.returncode, done.stderr[: len(error)]) == (3, error), done.stdout + done.stderr
    assert done.stdout.count("trained 1 epoch") == 1
    assert [line.split(" ")[0] for line in summary["warnings"]] == ["numeric", "the", "validation:", "test:"]
    assert done.stdout.splitlines()[-4:] == [f"warning: {line}" for line in summary["warnings"]]
    again = run_module(words)
    assert (again.returncode, again.stderr) == (3, done.stderr)
    assert "is finished" in again.stdout
    accepted = run_module([*words, "--max-ne", "inf"])
    assert (accepted.returncode, accepted.stderr) == (0, "")

"""The documented commands of the large recipes, on tiny data in the layout of the published ones (docs/recipes.md)."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_module
from torchrec_deepfm.data.criteo_defaults import MLPERF_NUM_EMBEDDINGS
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.training.recipes import DATA, recipe

NUMERIC, CATEGORICAL = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]


def run(folder: Path, *words: str) -> str:
    done = run_module(["torchrec_deepfm", *words], cwd=folder)
    assert (done.returncode, done.stderr) == (0, ""), f"{words}\n{done.stderr}"
    return done.stdout


def documented(name: str) -> list[str]:
    """The command that `recipes` prints to prepare the data."""
    return DATA[name].prepare.split()


def train(folder: Path, name: str, *options: str) -> dict[str, Any]:
    run(folder, "train", "--recipe", name, "--data", DATA[name].folder, "--output", "run", "--max-ne", "inf", *options)
    assert (folder / "run" / "report.html").exists()
    config = json.loads((folder / "run" / "config.json").read_text())["config"]
    changed = {word.removeprefix("--").replace("-", "_") for word in options if word.startswith("--")}
    expected = vars(recipe(name))
    assert {key: value for key, value in config.items() if key not in changed} == json.loads(
        json.dumps({key: value for key, value in expected.items() if key not in changed})
    )
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


def test_criteo_terabyte(tmp_path: Path) -> None:
    """24 days, the last of them halved; MLPerf's 26 table sizes, of which the five of 40 million are cut to 4,000."""
    run(tmp_path, "synthetic", "--output", "days", "--rows", "9600", "--days", "24", "--click-rate", "0.2")
    for name in ("validation.tsv", "test.tsv", "truth.json"):  # Criteo publishes the days only
        (tmp_path / "days" / name).unlink()
    sizes = [str(min(rows, 4000)) for rows in MLPERF_NUM_EMBEDDINGS]
    command = ["days" if word == "DAYS" else word for word in documented("criteo-terabyte")]
    run(tmp_path, *command, "--num-embeddings", *sizes)
    data = PreparedData.open(tmp_path / DATA["criteo-terabyte"].folder)
    assert list(map(str, data.num_embeddings.values())) == sizes
    assert (len(data.days("train")), data.rows("train"), data.rows("validation"), data.rows("test")) == (
        23,
        9200,
        200,
        200,
    )
    small = ("--batch-size", "512", "--factor-dim", "7", "--over-arch-layer-sizes", "32", "16", "--eval-every", "6")
    summary = train(tmp_path, "criteo-terabyte", *small)
    assert summary["steps"] == 17
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "validation"] == [6, 12, 17]


def write_csv(path: Path, label: str, rows: int, draw: random.Random, *, raw: bool) -> None:
    """Rows in the layout of Criteo_x4 (raw counts and hashes, cells missing) or of Criteo_x1 (scaled, numbered)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([label, *NUMERIC, *CATEGORICAL])
        for _ in range(rows):
            categories = [draw.randrange(1 + draw.randrange(30)) for _ in CATEGORICAL]
            clicked = int(draw.random() < (0.6 if categories[0] % 2 else 0.1))
            if raw:
                numbers = ["" if draw.random() < 0.2 else str(int(draw.expovariate(0.01))) for _ in NUMERIC]
                writer.writerow(
                    [clicked, *numbers, *("" if c == 7 else f"{c * 2654435761 % 2**32:08x}" for c in categories)]
                )
            else:
                writer.writerow([clicked, *(f"{draw.random():.6f}" for _ in NUMERIC), *categories])


@pytest.mark.parametrize(("name", "label"), [("criteo-x1", "label"), ("criteo-x4", "Label")])
def test_criteo_kaggle_in_the_layouts_of_reczoo(tmp_path: Path, name: str, label: str) -> None:
    draw = random.Random(0)
    for split, rows in (("train", 3000), ("valid", 600), ("test", 600)):
        write_csv(tmp_path / f"{split}.csv", label, rows, draw, raw=name == "criteo-x4")
    run(tmp_path, *documented(name))
    data = PreparedData.open(tmp_path / DATA[name].folder)
    assert (data.rows("train"), data.rows("validation"), data.rows("test")) == (3000, 600, 600)
    assert data.made["min_count"] == {"criteo-x1": 1, "criteo-x4": 10}[name]
    assert (len(data.schema.numeric), len(data.schema.categorical)) == ((13, 26) if name == "criteo-x1" else (0, 39))
    summary = train(
        tmp_path,
        name,
        "--batch-size",
        "250",
        "--epochs",
        "2",
        "--over-arch-layer-sizes",
        "32",
        "16",
        "--sparse-lr",
        "0.01",
    )
    assert summary["validation"]["auc"] > 0.6, "the planted column has not been learnt"

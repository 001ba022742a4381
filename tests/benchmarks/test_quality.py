"""The quality benchmarks: statistics, tables, models, and tiny runs without peers that need an installation."""

import csv
import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

from benchmarks._lib import commands, seed_statistics
from benchmarks.quality import settings, table, variants, write_tables
from benchmarks.quality.workers import prepared_arrays, train_deepfm, training_jobs
from tests.benchmarks.scripts import forked, run
from torchrec_deepfm import embedding_tables
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader

# seed_statistics and write_tables


def test_statistics_follow_their_definitions() -> None:
    values = [0.81, 0.84, 0.8, 0.83]
    middle = sum(values) / 4
    spread = math.sqrt(sum((one - middle) ** 2 for one in values) / 3)
    assert seed_statistics.mean(values) == pytest.approx(middle, rel=1e-12)
    assert seed_statistics.deviation(values) == pytest.approx(spread, rel=1e-12)
    assert seed_statistics.standard_error(values) == pytest.approx(spread / 2, rel=1e-12)
    assert seed_statistics.deviation([0.7]) == seed_statistics.standard_error([0.7]) == 0.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # the standard error of the difference is sqrt(2) * 0.01, with a single value on one side 0.01
        ([0.80, 0.82], [0.77, 0.79], "better: +0.0300 ± 0.0141"),
        ([0.80, 0.82], [0.78, 0.80], "not worse: +0.0200 ± 0.0141"),
        ([0.80, 0.82], [0.81, 0.83], "not worse: -0.0100 ± 0.0141"),
        ([0.80, 0.82], [0.82, 0.84], "worse: -0.0200 ± 0.0141"),
        ([0.80, 0.82], [0.815], "not worse: -0.0050 ± 0.0100"),
        ([0.80], [0.8001], "-0.0001, one seed each"),
    ],
)
def test_compare_states_difference_and_standard_error(first: list[float], second: list[float], expected: str) -> None:
    assert seed_statistics.compare(first, second) == expected


def test_compare_paired_takes_the_error_of_the_differences() -> None:
    assert seed_statistics.compare_paired([0.5, 0.7], [0.4, 0.64]) == "better: +0.08000 ± 0.02000"


def test_tables_and_picture(tmp_path: Path) -> None:
    def scores(model: str, *auc: float) -> Any:
        few = tuple(range(len(auc)))
        return write_tables.ModelScores(
            data="set", model=model, split="test", seeds=few, auc=auc, logloss=auc, seconds=auc, epochs=auc
        )

    found = [scores("LR", 0.698), scores("FM", 0.69, 0.70), scores("DeepFM", 0.8, 0.81), scores("peer", 0.9)]
    text = write_tables.write(found, tmp_path, {"date": "today"})
    assert "FM against LR: not worse: -0.0030 ± 0.0050" in text
    assert "| FM | 0.6950 ± 0.0071 | 0.6950 ± 0.0071 | 1 | 1 | 2 | better: +0.1100 ± 0.0071 |" in text
    assert "| **DeepFM** | 0.8050 ± 0.0071 | 0.8050 ± 0.0071 | 1 | 1 | 2 |  |" in text
    assert "| peer | 0.9000 | 0.9000 | 1 | 1 | 1 | worse: -0.0950 ± 0.0050 |" in text
    with (tmp_path / "quality.csv").open(encoding="utf-8") as file:
        assert [(row["model"], row["seed"], row["auc"]) for row in csv.DictReader(file)] == [
            ("LR", "0", "0.698"),
            ("FM", "0", "0.69"),
            ("FM", "1", "0.7"),
            ("DeepFM", "0", "0.8"),
            ("DeepFM", "1", "0.81"),
            ("peer", "0", "0.9"),
        ]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "quality.json").read_text())["about"] == {"date": "today"}


def test_labels_of_the_picture_do_not_overlap() -> None:
    ticks = write_tables.readable_ticks((0.9, 0.1, 0.09, 0.05, 0.01, 0.001), (1.0, 0.01))
    assert ticks == [0.9, 0.1, 0.05, 0.01]  # least: x 1.41


# prepared_arrays


def test_score_counts_pairs_and_logs() -> None:
    labels = np.array([1, 0, 1, 0, 0])
    chances = np.array([0.9, 0.4, 0.4, 0.1, 1.0])
    won = sum(
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in chances[labels == 1]
        for low in chances[labels == 0]
    )
    kept = [min(max(one, 1e-7), 1 - 1e-7) for one in chances]
    losses = [-math.log(one if label else 1 - one) for label, one in zip(labels, kept, strict=True)]
    found = prepared_arrays.score(labels, chances)
    assert found == {"auc": pytest.approx(won / 6), "logloss": pytest.approx(sum(losses) / 5)}


# train_deepfm


def test_fm_and_dnn_is_its_equation() -> None:
    k, sizes = 3, (5, 4)
    torch.manual_seed(0)
    counts = {"a": 7, "b": 4}
    ebc = EmbeddingBagCollection(tables=embedding_tables(counts, 2 * k, init_std=0.5))
    model = train_deepfm.FMAndDNN(
        ebc, 2, sizes, 2 * k, activation=torch.nn.ReLU, dropout=0.0, batch_norm=False, dense_device=None, init_std=0.5
    )
    with torch.no_grad():
        model.bias.fill_(0.3)
        model.dense_arch.rows.normal_()
        for bag in ebc.embedding_bags.values():
            bag.weight.normal_()
    ids = {"a": [6, 0, 2], "b": [1, 3, 3]}
    features = KeyedJaggedTensor.from_lengths_sync(
        list(ids), torch.tensor(ids["a"] + ids["b"]), torch.ones(6, dtype=torch.int32)
    )
    numbers = torch.randn(3, 2)
    found = model(numbers, features)

    linears = [layer for layer in model.over_arch.layers if isinstance(layer, torch.nn.Linear)]
    assert linears[0].in_features == 4 * k  # of one set of latent vectors, not of both
    for row in range(3):
        packed = [numbers[row, j] * model.dense_arch.rows[j] for j in range(2)]
        packed += [ebc.embedding_bags[f"t_{name}"].weight[ids[name][row]] for name in ids]
        v, u, w = ([one[part] for one in packed] for part in (slice(0, k), slice(k, 2 * k), 2 * k))
        hidden = torch.cat(u)
        for layer in linears[:-1]:
            hidden = torch.relu(layer.weight @ hidden + layer.bias)
        pairs = sum(one @ other for one, other in combinations(v, 2))
        expected = 0.3 + sum(w) + pairs + linears[-1].weight @ hidden
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


# settings


def test_peers_with_the_same_settings_have_the_same_penalty() -> None:
    """DeepCTR-Torch sums the loss over the batch and adds l2 ||E||^2: per sample that is lambda/2 ||E||^2."""
    config = settings.recipe("paper")
    changed = settings.replace(config, sparse_optimizer="adam", embedding_l2=0.06, batch_size=512)
    found = settings._peer_settings(changed)
    weights = torch.randn(7, 3)
    per_sample = found["l2"] * weights.square().sum() / found["batch_size"]
    torch.testing.assert_close(per_sample, 0.06 / 2 * weights.square().sum())
    assert found["embedding_l2"] == 0.06  # FuxiCTR's is lambda/2 ||E||^2 too


# training_jobs


def test_results_saved_under_the_first_names_are_found(tmp_path: Path) -> None:
    """The description below was written by the scripts before they moved."""
    (tmp_path / "manifest.json").write_text('{"sha256": "abc"}')
    chosen = [row for row in settings.rows("frappe", precision="medium", peers=True) if "same" in row.model]
    row = next(row for row in chosen if row.model.startswith("FuxiCTR"))
    job = training_jobs.Job(
        data=tmp_path,
        model=row.model,
        worker=row.worker,
        settings=row.settings,
        seed=1,
        environment=row.environment,
    )
    asked = {
        "data": "abc",
        "model": "FuxiCTR DeepFM, as ours",
        "worker": "quality_fuxictr.py",
        "settings": row.settings,
        "seed": 1,
        "environment": "fuxictr-models",
    }
    path = tmp_path / "results" / tmp_path.name / "FuxiCTR_DeepFM_as_ours" / "1.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"asked": asked, "seconds": 7}))
    kept = training_jobs.kept_result(job, tmp_path)
    assert kept is not None
    assert kept["seconds"] == 7


# whole runs


@pytest.fixture
def processes() -> Iterator[None]:
    with forked(training_jobs, commands):
        yield


@pytest.mark.usefixtures("processes")
def test_quality_from_data_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--output", tmp_path, "--datasets", "synthetic", "frappe", "--quick", "--no-peers", "--shared", tmp_path)
    run(table, *words, "--models", "FM &", "DeepFM", "scikit", "--seeds", 3)
    text = capsys.readouterr().out
    results = {path.parent.name: path for path in tmp_path.glob("results/*/*/3.json")}
    assert set(results) == {"FM_DNN", "DeepFM", "scikit_learn_logistic_regression"}
    kept = {name: (path.stat().st_mtime_ns, json.loads(path.read_text())) for name, path in results.items()}
    for model, name in (("FM & DNN", "FM_DNN"), ("**DeepFM**", "DeepFM")):
        test = kept[name][1]["test"]
        assert f"| {model} | {test['auc']:.4f} | {test['logloss']:.4f} |" in text

    # The peers' reader returns the loader's rows.
    [folder] = tmp_path.glob("data/synthetic-*")
    arrays, data = prepared_arrays.Arrays.read(folder), PreparedData.open(folder)
    for split, found in arrays.splits.items():
        batches = list(Loader(data, split, batch_size=1000, shuffle=False, drop_last=False))
        assert len(found.labels) == data.rows(split)
        expected = torch.cat([batch.dense_features for batch in batches])[: len(found.labels)]
        assert torch.equal(torch.from_numpy(found.dense), expected)
        ids = torch.cat([batch.sparse_features.values().view(26, -1) for batch in batches], dim=1)
        assert batches[0].sparse_features.keys() == list(arrays.num_embeddings)
        assert torch.equal(torch.from_numpy(found.sparse.T), ids[:, : len(found.labels)].long())

    # Another seed trains the random models, and keeps the existing results.
    run(table, *words, "--models", "DeepFM", "scikit", "--seeds", 3, 4)
    text = capsys.readouterr().out
    assert {path.parent.name for path in tmp_path.glob("results/*/*/4.json")} == {"DeepFM"}
    assert all(path.stat().st_mtime_ns == kept[name][0] for name, path in results.items())
    with (tmp_path / "quality.csv").open(encoding="utf-8") as file:
        aucs = [float(row["auc"]) for row in csv.DictReader(file) if row["model"] == "DeepFM"]
    assert len(aucs) == 2
    assert f"| **DeepFM** | {sum(aucs) / 2:.4f} ± {abs(aucs[0] - aucs[1]) / math.sqrt(2):.4f} |" in text
    assert not list(tmp_path.glob("results/**/*.run"))

    # One variant has the rows and settings of the table: its result is reused, the others are compared with float32.
    words = ("precision", "--datasets", "synthetic", "--rows", 4000, "--seeds", 3, "--quick", "--output", tmp_path)
    run(variants, *words)
    trained = {path.parent.name for path in tmp_path.glob("results/*/*/3.json")} - set(results)
    assert trained == {"DeepFM_float32_precision_float32", "DeepFM_bf16_precision_bf16"}
    with (tmp_path / "precision.csv").open(encoding="utf-8") as file:
        found = {row["variant"]: float(row["auc"]) for row in csv.DictReader(file)}
    assert list(found) == ["float32", "medium", "bf16"]
    assert found["medium"] == kept["DeepFM"][1]["test"]["auc"]
    lines = [line.split(" | ") for line in (tmp_path / "precision.md").read_text().splitlines()[2:]]
    assert [line[4] for line in lines] == [
        "" if line[1] == "float32" else f"{found[line[1]] - found['float32']:+.5f}, one seed each" for line in lines
    ]

"""The quality benchmarks run, go on, and say what was measured; tiny sizes, and no peer that would be installed."""

import csv
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

from benchmarks.quality import prepared_arrays, settings, table, train_deepfm, variants, write_tables
from tests.benchmarks.scripts import run
from torchrec_deepfm import embedding_tables
from torchrec_deepfm.data.loader import Loader
from torchrec_deepfm.data.prepared import PreparedData

# quality_write_tables.py


def test_statistics_follow_their_definitions() -> None:
    values = [0.81, 0.84, 0.8, 0.83]
    middle = sum(values) / 4
    spread = math.sqrt(sum((one - middle) ** 2 for one in values) / 3)
    assert write_tables.mean(values) == pytest.approx(middle, rel=1e-12)
    assert write_tables.deviation(values) == pytest.approx(spread, rel=1e-12)
    assert write_tables.standard_error(values) == pytest.approx(spread / 2, rel=1e-12)
    assert write_tables.deviation([0.7]) == write_tables.standard_error([0.7]) == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([0.80, 0.82], [0.79, 0.81], True),
        ([0.80, 0.82], [0.81, 0.83], True),  # 0.01 below, and the error of the difference is sqrt(2) * 0.01
        ([0.80, 0.82], [0.83, 0.85], False),
        ([0.80], [0.80], True),
        ([0.80], [0.8001], False),
    ],
)
def test_not_below_allows_for_one_standard_error(ours: list[float], theirs: list[float], expected: bool) -> None:
    assert write_tables.not_below(ours, theirs) is expected


def test_tables_and_picture(tmp_path: Path) -> None:

    def figure(model: str, *auc: float) -> Any:
        few = tuple(range(len(auc)))
        return write_tables.Figure(
            data="set", model=model, split="test", seeds=few, auc=auc, logloss=auc, seconds=auc, epochs=auc
        )

    figures = [figure("LR", 0.7), figure("FM", 0.69, 0.70), figure("DeepFM", 0.8, 0.81), figure("peer", 0.9)]
    text = write_tables.write(figures, tmp_path, {"date": "today"})
    assert "| FM | 0.6950 ± 0.0071 | 0.6950 ± 0.0071 | 1 | 1 | 2 |" in text
    assert "- FM >= LR: yes (-0.0050, standard error 0.0050)" in text
    assert "- DeepFM >= FM: yes (+0.1100, standard error 0.0071)" in text
    assert "- DeepFM >= peer: NO (-0.0950, standard error 0.0050)" in text
    with (tmp_path / "quality.csv").open(encoding="utf-8") as file:
        assert [(row["model"], row["seed"], row["auc"]) for row in csv.DictReader(file)] == [
            ("LR", "0", "0.7"),
            ("FM", "0", "0.69"),
            ("FM", "1", "0.7"),
            ("DeepFM", "0", "0.8"),
            ("DeepFM", "1", "0.81"),
            ("peer", "0", "0.9"),
        ]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "quality.json").read_text())["about"] == {"date": "today"}


def test_labels_of_the_picture_keep_apart() -> None:
    apart = write_tables.apart
    assert apart((0.9, 0.1, 0.09, 0.05, 0.01, 0.001), (1.0, 0.01)) == [0.9, 0.1, 0.05, 0.01]  # least: x 1.41


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


def test_peers_as_ours_have_our_penalty() -> None:
    """DeepCTR-Torch sums the loss over the batch and adds l2 ||E||^2: per sample that is our lambda/2 ||E||^2."""
    config = settings.recipe("paper")
    changed = settings.replace(config, sparse_optimizer="adam", embedding_l2=0.06, batch_size=512)
    found = settings._as_ours(changed)
    weights = torch.randn(7, 3)
    per_sample = found["l2"] * weights.square().sum() / found["batch_size"]
    torch.testing.assert_close(per_sample, 0.06 / 2 * weights.square().sum())
    assert found["embedding_l2"] == 0.06  # FuxiCTR means lambda/2 ||E||^2 by it, as we do


# the whole


def test_quality_from_data_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--output", tmp_path, "--datasets", "synthetic", "frappe", "--quick", "--no-peers", "--shared", tmp_path)
    chosen = ("--models", "FM", "DeepFM", "scikit", "--seeds")
    run(table, *words, *chosen, 3)
    text = capsys.readouterr().out
    results = {path.parent.name: path for path in tmp_path.glob("results/*/*/3.json")}
    assert set(results) == {"FM", "FM_DNN", "DeepFM", "scikit_learn_logistic_regression"}
    kept = {name: (path.stat().st_mtime_ns, json.loads(path.read_text())) for name, path in results.items()}
    for model, name in (("FM", "FM"), ("FM & DNN", "FM_DNN"), ("**DeepFM**", "DeepFM")):
        test = kept[name][1]["test"]
        assert f"| {model} | {test['auc']:.4f} | {test['logloss']:.4f} |" in text

    # The peers' reader has the rows that the loader gives.
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

    # Another seed trains what is random, and leaves alone what is there.
    run(table, *words, *chosen, 3, 4)
    text = capsys.readouterr().out
    assert {path.parent.name for path in tmp_path.glob("results/*/*/4.json")} == {"FM", "FM_DNN", "DeepFM"}
    assert all(path.stat().st_mtime_ns == kept[name][0] for name, path in results.items())
    with (tmp_path / "quality.csv").open(encoding="utf-8") as file:
        aucs = [float(row["auc"]) for row in csv.DictReader(file) if row["model"] == "DeepFM"]
    assert len(aucs) == 2
    assert f"| **DeepFM** | {sum(aucs) / 2:.4f} ± {abs(aucs[0] - aucs[1]) / math.sqrt(2):.4f} |" in text
    assert not list(tmp_path.glob("results/**/*.run"))

    # The same rows and settings as one of the variants: its result is taken, the others are compared with float32.
    words = ("precision", "--datasets", "synthetic", "--rows", 4000, "--seeds", 3, "--quick", "--output", tmp_path)
    run(variants, *words)
    trained = {path.parent.name for path in tmp_path.glob("results/*/*/3.json")} - set(results)
    assert trained == {"DeepFM_float32_precision_float32", "DeepFM_bf16_precision_bf16"}
    with (tmp_path / "precision.csv").open(encoding="utf-8") as file:
        found = {row["variant"]: float(row["auc"]) for row in csv.DictReader(file)}
    assert list(found) == ["float32", "medium", "bf16"]
    assert found["medium"] == kept["DeepFM"][1]["test"]["auc"]
    lines = [line.split(" | ") for line in (tmp_path / "precision.md").read_text().splitlines()[2:]]
    assert [line[4] for line in lines] == [f"{found[line[1]] - found['float32']:+.5f}" for line in lines]

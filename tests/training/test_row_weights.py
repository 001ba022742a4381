"""Weights of rows, from the column to the loss and the metrics; scikit-learn and numpy have the expected values."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables, fit
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.evaluation.bootstrap import RowMetrics
from torchrec_deepfm.evaluation.evaluate import evaluate_run
from torchrec_deepfm.evaluation.options import EvaluateOptions
from torchrec_deepfm.notebook.fit import TrainedRun
from torchrec_deepfm.training.scoring.metrics import compute_metrics

PLAIN = Schema(label="click", numeric=("price",), categorical=("user",), layout="table")
WEIGHTED = Schema(label="click", numeric=("price",), categorical=("user",), layout="table", weight="w")


def table(rows: int, seed: int) -> pl.DataFrame:
    """Half of the rows have the wrong label, and little or no weight."""
    rng = np.random.default_rng(seed)
    user, wrong = rng.integers(0, 12, rows), rng.random(rows) < 0.5
    click = (user % 2 == 1) ^ (rng.random(rows) < 0.1) ^ wrong
    weight = np.where(wrong, rng.integers(0, 2, rows) / 64, 0.5 + rng.random(rows)).astype(np.float32)
    columns = {"user": [f"u{i}" for i in user], "price": rng.normal(size=rows), "click": click.astype(int), "w": weight}
    return pl.DataFrame(columns)


def expected(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    rate = np.average(labels, weights=weights)
    loss = log_loss(labels, predicted, sample_weight=weights)
    return {
        "auc": roc_auc_score(labels, predicted, sample_weight=weights),
        "logloss": loss,
        "ne": loss / log_loss(labels, np.full(len(labels), rate), sample_weight=weights),
        "calibration": np.average(predicted, weights=weights) / rate,
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedData, PreparedData]:
    folder = tmp_path_factory.mktemp("weights")
    rows = [table(300, 0), table(100, 1), table(70, 2)]
    made = []
    for schema in (PLAIN, WEIGHTED):
        output = folder / ("plain" if schema.weight is None else "weighted")
        made.append(prepare(rows[0], output, validation=rows[1], test=rows[2], schema=schema, min_count=1))
    return made[0], made[1]


def test_the_folder_holds_them_and_nothing_else_changes(folders: tuple[PreparedData, PreparedData]) -> None:
    plain, weighted = folders
    more = {path.name for path in weighted.folder.iterdir()} - {path.name for path in plain.folder.iterdir()}
    assert more == {"day_0_row_weights.npy", "validation_0_row_weights.npy", "test_0_row_weights.npy"}
    for path in plain.folder.glob("*.npy"):
        if path.name != "checksums.npy":
            assert path.read_bytes() == (weighted.folder / path.name).read_bytes(), path
    assert np.load(weighted.folder / "test_0_row_weights.npy")[:, 0].tolist() == table(70, 2)["w"].to_list()
    assert "weight" not in plain.schema.to_json()
    assert Schema.from_json(weighted.schema.to_json()) == weighted.schema
    split = prepare(table(300, 0), weighted.folder.with_name("split"), schema=WEIGHTED, min_count=1)
    found = [np.load(split.folder / f"{part}_0_row_weights.npy")[:, 0] for part in ("day", "validation", "test")]
    assert sorted(np.concatenate(found).tolist()) == sorted(table(300, 0)["w"].to_list())


def test_batches_carry_them_beside_the_labels(folders: tuple[PreparedData, PreparedData]) -> None:
    rows = table(300, 0)
    for data in folders:
        labels = torch.cat([batch.labels for batch in Loader(data, "train", batch_size=100)])
        assert labels.dtype == (torch.int32 if data is folders[0] else torch.float32)
        assert labels.reshape(300, -1)[:, 0].tolist() == rows["click"].to_list()
    assert labels[:, 1].tolist() == rows["w"].to_list()


def test_the_loss_is_the_weighted_sum_over_the_batch() -> None:
    torch.manual_seed(0)
    model = DeepFM(EmbeddingBagCollection(tables=embedding_tables({"C1": 9})), 0, (4,), init_std=1.0, dropout=0.0)
    ids = KeyedJaggedTensor.from_lengths_sync(["C1"], torch.arange(8), torch.ones(8).int())
    weights = torch.tensor([0.0, 1, 2, 0.5, 1, 3, 0, 0.25])
    clicks = torch.tensor([0.0, 1, 1, 0, 0, 1, 0, 1])
    given = torch.stack([clicks, weights], 1)
    loss, (_, logits, labels) = DeepFMTrain(model)(Batch(torch.empty(8, 0), ids, given))
    chances = 1 / (1 + np.exp(-logits.double().numpy()))
    losses = -np.where(clicks == 1, np.log(chances), np.log(1 - chances))
    assert loss.item() == pytest.approx(float((losses * weights.numpy()).sum() / 8), rel=1e-5)
    assert labels.tolist() == given.tolist()


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    logits, labels = rng.integers(-6, 6, 500).astype(np.float32) / 2, rng.integers(0, 2, 500).astype(np.float32)
    weights = rng.integers(0, 4, 500).astype(np.float32)
    predicted = 1 / (1 + np.exp(-logits.astype(float)))
    found = compute_metrics(logits, labels, weights=weights).to_json()
    assert {name: found[name] for name in RowMetrics.NAMES} == pytest.approx(expected(labels, predicted, weights))
    assert found == pytest.approx(
        compute_metrics(logits.repeat(weights.astype(int)), labels.repeat(weights.astype(int))).to_json()
        | {"rows": 500}
    )
    times = rng.integers(0, 3, 500)
    resampled = RowMetrics(logits, labels, weights)(times)
    assert resampled == pytest.approx(expected(labels, predicted, weights * times))
    assert RowMetrics(logits, labels, weights)(np.zeros(500, int)) == dict.fromkeys(RowMetrics.NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    output = tmp_path_factory.mktemp("run") / "run"
    options = {"epochs": 4, "batch_size": 50, "over_arch_layer_sizes": (8,), "sparse_lr": 0.1, "min_count": 1}
    rows, held_out = table(3000, 0), table(500, 1)
    return fit(rows, "click", weight="w", validation=held_out, test=table(400, 2), output=output, show=False, **options)


def test_a_training_by_them(run: TrainedRun, device: torch.device, tmp_path: Path) -> None:
    """The labels of rows without weight are not learned; the metrics are weighted; predictions need no weights."""
    rows = table(400, 2)
    predicted = run.predict(rows.drop("w", "click")).astype(float)
    labels, weights = rows["click"].to_numpy(), rows["w"].to_numpy()
    found = expected(labels, predicted, weights)
    assert found["auc"] > 0.85
    assert roc_auc_score(labels, predicted) < 0.6
    assert {name: run.metrics["test"][name] for name in found} == pytest.approx(found, abs=1e-5)
    assert 'weight = "w"' in run.schema
    rows.write_parquet(tmp_path / "rows.parquet")
    how = EvaluateOptions(bootstrap=20, output=tmp_path / "found.json")
    evaluated = evaluate_run(run.folder, [str(tmp_path / "rows.parquet")], device, how)
    assert {name: evaluated[name] for name in found} == pytest.approx(found, abs=1e-5)
    assert all(low < found[name] < high for name, (low, high) in evaluated["intervals"].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.lit(-1.0), ("train rows: row 1, column 'w': -1 is negative (expected a number, 0 or more); "
         "repair or remove the row")),
        (pl.lit(None, pl.Float64), ("train rows: row 1, column 'w': the weight is missing (expected a number, 0 or "
         "more); repair or remove the row")),
        (pl.lit("x"), "train rows: column 'w': it holds text"),
    ],
)  # fmt: skip
def test_bad_weights(change: pl.Expr, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        prepare(table(20, 0).with_columns(w=change), tmp_path / "out", schema=WEIGHTED, split="none", min_count=1)
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weight", "layout", "message"),
    [
        ("user", "table", "schema: weight: 'user' is also label or feature; remove it there"),
        ("click", "table", "schema: weight: 'click' is also label or feature; remove it there"),
        ("", "table", "schema: weight: '' is not a valid column name; give a text"),
        ("w", "criteo", 'schema: weight: only valid for named columns; set layout = "table"'),
    ],
)
def test_bad_schemas(weight: str, layout: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        Schema(label="click", numeric=(), categorical=("user",), layout=layout, weight=weight)
    assert str(refused.value) == message


def test_damaged_weights_are_found(folders: tuple[PreparedData, PreparedData]) -> None:
    weighted = folders[1]
    path = weighted.folder / "validation_0_row_weights.npy"
    content = path.read_bytes()
    try:
        values = np.load(path)
        values[3] = np.nan
        np.save(path, values)
        with pytest.raises(UserError, match="validation_0"):
            list(Loader(weighted, "validation", batch_size=100))
    finally:
        path.write_bytes(content)

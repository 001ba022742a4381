"""Negative downsampling: which rows are kept, and that probabilities are those of all rows."""

import filecmp
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from torchrec_deepfm import DeepFM, DeepFMTrain, embedding_tables, fit
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

SCHEMA = Schema(label="click", numeric=(), categorical=("user", "item"), layout="table")


def table(rows: int, seed: int) -> tuple[pl.DataFrame, np.ndarray]:
    """Rows, 7 in 100 of them positive, and their true chances."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 8, rows), rng.integers(0, 6, rows)
    chance = 1 / (1 + np.exp(3.5 - (user % 4) * 0.5 - (item % 3) * 0.4))
    click = (rng.random(rows) < chance).astype(int)
    return pl.DataFrame({"row": np.arange(rows), "user": user, "item": item, "click": click}), chance


def test_the_rows_that_are_kept(tmp_path: Path) -> None:
    """All positives and held-out rows, a tenth of the negatives; the same in small pieces as in one."""
    rows, _ = table(20_000, 0)
    schema = Schema(label="click", numeric=("row",), categorical=("user",), layout="table")
    found = {}
    for name, rate in (("all", 1.0), ("some", 0.1)):
        data = prepare(rows, tmp_path / name, schema=schema, min_count=1, negative_rate=rate)
        for part in ("day", "validation", "test"):
            numbers = np.load(data.folder / f"{part}_0_dense.npy")[:, 0].astype(int)
            labels = np.load(data.folder / f"{part}_0_labels.npy")[:, 0]
            found[name, part] = {label: set(numbers[labels == label].tolist()) for label in (0, 1)}
        assert data.rows("train") == sum(map(len, found[name, "day"].values()))
    for part in ("validation", "test"):
        assert found["some", part] == found["all", part]
    kept, negatives = found["some", "day"], found["all", "day"][0]
    assert kept[1] == found["all", "day"][1]
    assert kept[0] < negatives
    assert len(kept[0]) == pytest.approx(0.1 * len(negatives), abs=4 * np.sqrt(0.09 * len(negatives)))
    assert data.made["negative_rate"] == 0.1
    rows.write_parquet(tmp_path / "rows.parquet", row_group_size=777)
    again = prepare(
        [tmp_path / "rows.parquet"], tmp_path / "again", schema=schema, min_count=1, negative_rate=0.1, memory="1GiB"
    )
    for path in data.folder.glob("*.npy"):
        assert filecmp.cmp(path, again.folder / path.name, shallow=False), path


def test_the_loss_is_that_of_the_kept_rows() -> None:
    """In training the probability p of a kept row belongs to the model's q = p / (p + (1 - p) / w)."""
    torch.manual_seed(0)
    deepfm = DeepFM(EmbeddingBagCollection(tables=embedding_tables({"C1": 9})), 0, (4,), init_std=1.0, dropout=0.0)
    ids = KeyedJaggedTensor.from_lengths_sync(["C1"], torch.arange(8), torch.ones(8).int())
    batch = Batch(torch.empty(8, 0), ids, torch.tensor([0, 1, 1, 0, 0, 1, 0, 1]))
    model = DeepFMTrain(deepfm, negative_rate=0.2)
    loss, (_, logits, _) = model(batch)
    q = torch.sigmoid(logits.double()).numpy()
    p = q / (q + (1 - q) * 0.2)
    np.testing.assert_allclose(p / (p + (1 - p) / 0.2), q)
    losses = -np.where(batch.labels == 1, np.log(p), np.log(1 - p))
    assert loss.item() == pytest.approx(losses.mean(), rel=1e-5)
    assert model.eval()(batch)[0].item() == pytest.approx(DeepFMTrain(deepfm)(batch)[0].item(), rel=1e-6)


def test_a_downsampled_training_is_calibrated() -> None:
    """Mean probability, chance by chance, beside the truth and beside a training on all rows."""
    rows, _ = table(40_000, 0)
    held_out, chance = table(20_000, 1)
    predicted = {}
    for rate in (1.0, 0.1):
        run = fit(
            rows.drop("row"), schema=SCHEMA, validation=held_out.drop("row"), show=False, negative_rate=rate,
            epochs=2, batch_size=400 if rate == 1.0 else 100, over_arch_layer_sizes=(8,), dropout=0.0, sparse_lr=0.05,
            min_count=1,
        )  # fmt: skip
        predicted[rate] = run.predict(held_out).astype(float)
        assert run.metrics["validation"]["calibration"] == pytest.approx(1.0, abs=0.1)
        assert roc_auc_score(held_out["click"], predicted[rate]) > roc_auc_score(held_out["click"], chance) - 0.01
    assert predicted[0.1].mean() == pytest.approx(predicted[1.0].mean(), rel=0.1)
    high = chance > np.quantile(chance, 0.8)
    for group in (high, ~high):
        assert predicted[0.1][group].mean() == pytest.approx(chance[group].mean(), rel=0.15)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_bad_rates(rate: float, tmp_path: Path) -> None:
    message = f"--negative-rate {rate}: must be greater than 0, and at most 1"
    with pytest.raises(UserError) as refused:
        prepare(table(50, 0)[0], tmp_path / "out", schema=SCHEMA, negative_rate=rate)
    assert str(refused.value) == message

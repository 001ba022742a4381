"""A table with lists of numbers, trained on two ranks: every way to score a row gives what the equation gives."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from tests.inference.serve.serving import stream
from tests.model import oracle
from tests.support.ranks import CPU, one_rank, run_ranks
from torchrec_deepfm import load, load_model
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.distributed import process_group
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.evaluation.evaluate import evaluate_run
from torchrec_deepfm.evaluation.options import EvaluateOptions
from torchrec_deepfm.inference.explain import importance
from torchrec_deepfm.inference.export.export import export
from torchrec_deepfm.inference.load import load_sharded
from torchrec_deepfm.inference.predict import predict_files
from torchrec_deepfm.inference.serve.arrow_rows import read_stream
from torchrec_deepfm.inference.serve.rows import JsonRows, RequestError, columns_of
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.trainer import train

K, WIDTH = 4, 6
SCHEMA = Schema(
    label="y", numeric=("x", "e"), categorical=("user",), layout="table",
    columns={"e": Column(width=WIDTH, transform="standard")},
)  # fmt: skip


def rows(count: int = 400, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    user, e = random.integers(0, 8, count), random.normal(2.0, 3.0, (count, WIDTH))
    logit = np.where(user < 4, 1.0, -1.0) * (e[:, 0] - 2.0)  # the sign of the list's effect depends on the user
    columns = {"y": (random.random(count) < 1 / (1 + np.exp(-logit))).astype(int), "x": random.normal(size=count)}
    return pl.DataFrame({**columns, "e": e.tolist(), "user": [f"u{i}" for i in user]})


def on_ranks(folder: str) -> None:
    home = Path(folder)
    config = TrainConfig(
        factor_dim=K, over_arch_layer_sizes=(5,), dropout=0.0, batch_size=50, epochs=4, sparse_lr=0.2, dense_lr=0.02
    )
    train(config, PreparedData.open(home / "data"), home / "run", CPU)
    ranks = Workers(rank=process_group.rank(), count=process_group.count(), gather=process_group.gather)
    predict_files(load_sharded(home / "run"), [str(home / "new.parquet")], home / "sharded.parquet", ranks=ranks)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    rows(60, 1).write_parquet(folder / "new.parquet")
    prepare(rows(), folder / "data", validation=rows(200, 2), schema=SCHEMA, min_count=1)
    run_ranks(on_ranks, 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def expected(home: Path) -> NDArray[np.float64]:
    """The equation in plain Python, from the weights of the run and the raw rows."""
    model, known = load_model(home / "run"), np.array(rows()["e"].to_list(), np.float32).astype(float)
    weights = {name: value.double().tolist() for name, value in model.state_dict().items()}
    [table] = [value for name, value in weights.items() if "embedding_bags" in name]
    layers = [(weights[f"over_arch.layers.{i}.weight"], weights.get(f"over_arch.layers.{i}.bias")) for i in (0, 2)]
    frame = rows(60, 1)
    e = (np.array(frame["e"].to_list(), np.float32).astype(float) - known.mean(0)) / known.std(0)
    ids = load(home / "run").encoder.encode(frame).sparse[:, 0].tolist()
    found = []
    for x, numbers, user in zip(frame["x"].to_list(), e.tolist(), ids, strict=True):
        scaled = weights["dense_arch.rows"]
        fields = [
            oracle.field_of_number(scaled[0], x, K),
            oracle.field_of_bag(scaled[1:], list(enumerate(numbers)), K),
            oracle.field_of_bag(table, [(user, 1.0)], K),
        ]
        logit = weights["bias"][0] + oracle.first_order(fields) + oracle.second_order(fields)
        found.append(1 / (1 + np.exp(-logit - oracle.mlp(fields, layers))))
    return np.array(found)


def test_predictions_are_the_equation_sharded_or_not(home: Path, expected: NDArray[np.float64]) -> None:
    found = load(home / "run").predict(rows(60, 1).drop("y"))
    assert found == pytest.approx(expected, abs=1e-5)
    assert pl.read_parquet(home / "sharded.parquet")["probability"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert roc_auc_score(rows(60, 1)["y"], found) > 0.7  # only user and list together tell


def test_an_exported_model_scores_the_same(home: Path, expected: NDArray[np.float64], tmp_path: Path) -> None:
    export(home / "run", tmp_path / "package", to="torch-export")
    package = load(tmp_path / "package")
    assert package.predict(rows(60, 1)) == pytest.approx(expected, abs=1e-5)
    ours, theirs = load(home / "run").explain(rows(60, 1)[:9]), package.explain(rows(60, 1)[:9])
    assert ours.fields == theirs.fields == ("x", "e", "user")
    assert ours.probabilities == pytest.approx(expected[:9], abs=1e-5)
    assert theirs.contributions() == pytest.approx(ours.contributions(), abs=1e-5)


def test_evaluation_and_importance_take_the_list_as_one_field(home: Path) -> None:
    data = PreparedData.open(home / "data")
    with one_rank() as device:
        result = evaluate_run(home / "run", data, device, EvaluateOptions(split="validation"))
    predictor = load(home / "run")
    found = predictor.predict(rows(200, 2))
    assert result["auc"] == pytest.approx(roc_auc_score(rows(200, 2)["y"], found), abs=1e-6)
    fields = importance(predictor.score, predictor.encoder.encode(rows(200, 2)), rows(200, 2)["y"].to_numpy())
    assert {one.field for one in fields} == {"x", "e", "user"}
    [lost] = [one.auc_loss for one in fields if one.field == "e"]
    assert (lost or 0.0) > 0.2


def test_requests_hold_lists_of_one_length(home: Path, expected: NDArray[np.float64]) -> None:
    predictor = load(home / "run")
    columns = columns_of(predictor.encoder)
    reader = JsonRows(columns, most=60)
    given = rows(60, 1).drop("y").to_dicts()
    table = reader.read(json.dumps({"rows": given}).encode())
    assert predictor.predict(table) == pytest.approx(expected, abs=1e-5)
    arrow = rows(60, 1).select([column.name for column in columns]).to_arrow()
    fixed = arrow.set_column(1, "e", arrow["e"].combine_chunks().cast(pa.list_(pa.float64(), WIDTH)))
    assert columns[1].name == "e"
    for sent in (arrow, fixed):
        assert predictor.predict(read_stream(stream(sent), columns, 60)) == pytest.approx(expected, abs=1e-5)
    for bad in ([1.0] * 5, None, [1.0, None, 1.0, 1.0, 1.0, 1.0]):
        with pytest.raises(RequestError) as caught:
            reader.read(json.dumps({"rows": [given[0], {**given[1], "e": bad}]}).encode())
        [fault] = caught.value.faults
        assert (fault.row, fault.column) == (2, "e")
        assert fault.message.startswith("expected a list of 6 finite numbers, not")


def test_only_runs_with_lists_record_widths(home: Path, tmp_path: Path) -> None:
    """So that folders and checkpoints of other tables stay as they are."""
    assert json.loads((home / "run" / "config.json").read_text())["widths"] == [1, WIDTH]
    schema = Schema(label="y", numeric=("x",), categorical=("user",), layout="table")
    data = prepare(rows().drop("e"), tmp_path / "data", schema=schema, min_count=1, split="none")
    run_ranks(_train_plain, 1, str(tmp_path))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "widths" not in config
    assert config["numeric"] == ["x"]
    saved = [json.loads(path.read_text()) for path in (tmp_path / "run" / "checkpoint").rglob("*.json")]
    assert saved
    assert all("widths" not in json.dumps(one) for one in saved)
    with one_rank(), pytest.raises(UserError, match="numeric columns"):
        evaluate_run(home / "run", data, CPU, EvaluateOptions(split="train"))


def _train_plain(folder: str) -> None:
    config = TrainConfig(factor_dim=K, over_arch_layer_sizes=(5,), batch_size=100)
    train(config, PreparedData.open(Path(folder, "data")), Path(folder, "run"), CPU)

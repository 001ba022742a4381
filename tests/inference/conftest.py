"""Runs to use: what trainings leave behind."""

from pathlib import Path

import polars as pl
import pytest
import torch.distributed as dist

from tests.faults.runs import make_data
from tests.inference.test_load import read_raw
from tests.support.ranks import CPU, run_ranks
from torchrec_deepfm import load
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.inference.export.export import export
from torchrec_deepfm.inference.load import Predictor
from torchrec_deepfm.inference.serve.model import ServedModel
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(
    factor_dim=6, over_arch_layer_sizes=(16, 8), dropout=0.2, batch_norm=True, batch_size=100, epochs=3, sparse_lr=0.1,
    dense_lr=0.01, checkpoint_every=7, keep_last=3, ema=0.9, data_parallel_rows=20,
)  # fmt: skip


def train_sharded(data: Path, output: Path) -> int:
    """By columns, by rows, and replicated."""
    constraints = ("t_user=column_wise:min_partition=4", "t_item=row_wise")
    train(CONFIG, PreparedData.open(data), output, CPU, RunOptions(constraints=constraints))
    return dist.get_rank()


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Two numeric and three categorical columns; see ``make_data``."""
    return make_data(tmp_path_factory.mktemp("inference") / "data")


@pytest.fixture(scope="session")
def run(run_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with a moving average; do not change it."""
    output = tmp_path_factory.mktemp("inference") / "run"
    run_ranks(train_sharded, 2, run_data.folder, output)
    return output


@pytest.fixture(scope="session")
def onnx(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its package for onnxruntime; do not change it."""
    folder = tmp_path_factory.mktemp("packages") / "onnx"
    export(run, folder, to="onnx")
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> ServedModel:
    return ServedModel(run)


@pytest.fixture(scope="session")
def predictor(run: Path) -> Predictor:
    return load(run)


@pytest.fixture(scope="session")
def frame(run_data: PreparedData) -> pl.DataFrame:
    """The raw test rows by name, without their label."""
    return read_raw(run_data.folder.parent / "test.tsv").drop("label")

"""``predict`` with sharded tables of weighted lists: the bytes that one process with whole tables writes."""

from pathlib import Path

import polars as pl
import pytest
import torch.distributed as dist

import torchrec_deepfm
from tests.support.ranks import CPU, run_ranks
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.distributed import process_group
from torchrec_deepfm.inference import predict as module
from torchrec_deepfm.inference.load import load, load_sharded
from torchrec_deepfm.inference.predict import predict_files
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.trainer import train

SCHEMA = Schema(
    label="y", numeric=("x",), categorical=("user", "tags", "seen"), layout="table",
    columns={"tags": Column(list=True, weights="loads"), "seen": Column(list=True, type="integer")},
)  # fmt: skip
ROWS = 400


def rows() -> pl.DataFrame:
    """Lists of 0 to 3 values, some of them missing, each of the first column with a weight."""
    weights = [[0.25 + (i + j) % 5 for j in range(4)] for i in range(ROWS)]
    tags = [None if i % 11 == 0 else [f"t{(i * j) % 17}" for j in range(1, 1 + i % 4)] for i in range(ROWS)]
    return pl.DataFrame(
        {
            "y": [int(i * 7919 % 13 < 5) for i in range(ROWS)],
            "x": [i % 10 / 10 for i in range(ROWS)],
            "user": [f"u{i * 31 % 23}" for i in range(ROWS)],
            "tags": tags,
            "loads": [None if tag is None else loads[: len(tag)] for tag, loads in zip(tags, weights, strict=True)],
            "seen": [[i * k % 29 for k in range(i % 3)] for i in range(ROWS)],
        },
        schema_overrides={"tags": pl.List(pl.String), "loads": pl.List(pl.Float64), "seen": pl.List(pl.Int64)},
    )


def on_ranks(folder: str) -> int:
    """Train on two ranks, then predict together; return the numbers that this rank's tables hold."""
    module._PIECE_ROWS = 64
    home = Path(folder)
    config = TrainConfig(factor_dim=6, over_arch_layer_sizes=(8,), dropout=0.0, batch_size=50, sparse_lr=0.5)
    train(config, PreparedData.open(home / "data"), home / "run", CPU)
    ranks = Workers(rank=dist.get_rank(), count=dist.get_world_size(), gather=process_group.gather)
    predictor = load_sharded(home / "run")
    predict_files(predictor, [str(home / "raw.parquet")], home / "sharded.parquet", keep=["tags"], ranks=ranks)
    local = predictor.score._model.sparse_arch.named_parameters()
    return sum(each.numel() for name, each in local if "weight" in name)


def test_sharded_lists_end_in_the_bytes_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_ROWS", 64)
    rows().write_parquet(tmp_path / "raw.parquet")
    prepare([tmp_path / "raw.parquet"], tmp_path / "data", schema=SCHEMA, split="none", min_count=1)
    held = run_ranks(on_ranks, 2, str(tmp_path))
    predictor = load(tmp_path / "run")
    found = pl.read_parquet(tmp_path / "sharded.parquet")
    expected = predictor.predict(rows())
    assert abs(found["probability"].to_numpy() - expected).max() <= 1e-6
    assert found["probability"].std() > 0.01  # the lists matter, and their weights
    same = rows().with_columns(loads=pl.col("loads").list.eval(pl.element() * 2))
    assert abs(predictor.predict(same) - expected).max() > 1e-3
    predict_files(predictor, [str(tmp_path / "raw.parquet")], tmp_path / "whole.parquet", keep=["tags"])
    assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "sharded.parquet").read_bytes()
    assert found["tags"].to_list() == rows()["tags"].to_list()
    whole = sum(each.numel() for each in torchrec_deepfm.load_model(tmp_path / "run").sparse_arch.parameters())
    assert max(held) < whole

"""One rank and two reach the same AUC on the same global batches, with everything that acts on gradients or weights.

Left out is what is random by rank (dropout), and batch normalisation, whose statistics are those of each rank's part of
the batch.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import CPU, one_rank, run_ranks
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.synthetic.generate import generate
from torchrec_deepfm.training import trainer
from torchrec_deepfm.training.config import TrainConfig

GLOBAL_BATCH = 1000
BASE = TrainConfig(
    factor_dim=7, over_arch_layer_sizes=(32, 16), dropout=0.0, dense_lr=0.003, over_arch_l2=1e-4, ema=0.95, warmup=0.1,
)  # fmt: skip
CONFIGS = {
    "sharded": replace(
        BASE,
        data_parallel_rows=20,
        touched_embedding_l2=1e-3,
        touched_linear_l2=1e-4,
        ema_every=3,
        clip_norm=0.1,
        embedding_weight_decay=0.01,
    ),
    "replicated": replace(
        BASE, sparse_optimizer="adam", sparse_lr=0.003, embedding_l2=1e-5, linear_l2=1e-6, clip_norm=0.1
    ),
}


def train_all(folder: Path, output: Path, world_size: int) -> None:
    data = PreparedData.open(folder)
    for name, config in CONFIGS.items():
        trainer.train(replace(config, batch_size=GLOBAL_BATCH // world_size), data, output / name, CPU)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in folders ``1`` and ``2``. Evaluated on so many rows that a pair which changes places costs 5e-7."""
    folder = tmp_path_factory.mktemp("quality")
    generate(folder / "raw", rows=40_000, seed=1)
    splits = [[folder / "raw" / f"{name}.tsv"] for name in ("validation", "test")]
    data = prepare([folder / "raw" / "day_0.tsv"], folder / "data", validation=splits[0], test=splits[1], min_count=3)
    for world_size in (1, 2):
        (folder / str(world_size)).mkdir()
    with one_rank():
        train_all(data.folder, folder / "1", 1)
    run_ranks(train_all, 2, data.folder, folder / "2", 2)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_reach_the_auc_of_one(runs: Path, name: str) -> None:
    summaries = [read(runs / ranks / name / "summary.json") for ranks in ("1", "2")]
    assert [summary["world_size"] for summary in summaries] == [1, 2]
    tables = read(runs / "2" / name / "plan.json")["tables"]
    sharded = {rank for table in tables if table["sharding_type"] != "data_parallel" for rank in table["ranks"]}
    assert sharded == (set() if name == "replicated" else {0, 1})
    for split in ("validation", "test"):
        one, two = (summary[split] for summary in summaries)
        assert two["auc"] == pytest.approx(one["auc"], abs=1e-6)
        assert two["logloss"] == pytest.approx(one["logloss"], abs=1e-6)
        assert one["lift"] > 0.5, "nothing is learnt, so nothing is compared"

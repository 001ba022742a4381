"""A precision holds while a run is trained or evaluated, and for nothing else in the process."""

from pathlib import Path

import torch

from tests.faults.runs import make_data
from tests.support.ranks import one_rank
from torchrec_deepfm.evaluation.evaluate import evaluate_run
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.trainer import train


def test_what_follows_computes_as_before(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    config = TrainConfig(over_arch_layer_sizes=(8,), dropout=0.0, batch_size=64, precision="medium")
    with one_rank() as device:
        train(config, data, tmp_path / "run", device, report=False)
        assert _precision() == "highest"
        evaluate_run(tmp_path / "run", data, device)
        assert _precision() == "highest"


def _precision() -> str:
    return torch.get_float32_matmul_precision()

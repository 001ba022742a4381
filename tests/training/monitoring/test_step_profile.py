"""``train --profile``: the trace has the profiled steps, and the training is the same with it as without."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import make_data
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.monitoring.step_profile import operator_table
from torchrec_deepfm.training.trainer import train

CONFIG = TrainConfig(factor_dim=3, over_arch_layer_sizes=(4,), batch_size=50, dropout=0.0)


@dataclass(frozen=True, eq=False)
class Operator:
    key: str
    count: int
    self_cpu_time_total: float
    self_device_time_total: float


def losses(run: Path) -> list[Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [one["loss"] for one in records if one["split"] == "train"]


def test_five_steps(device: torch.device, tmp_path: Path) -> None:
    data, lines = make_data(tmp_path / "data"), []
    plain = train(CONFIG, data, tmp_path / "plain", device)
    train(CONFIG, data, tmp_path / "run", device, RunOptions(profile=5), say=lines.append)
    assert losses(tmp_path / "run") == losses(plain.folder)
    events = json.loads((tmp_path / "run" / "profile" / "rank_0.json").read_text())["traceEvents"]
    forward = [one for one in events if one.get("name") == "aten::binary_cross_entropy_with_logits"]
    assert len(forward) == 5  # a loss per step
    assert all(one["dur"] > 0 for one in forward)
    table = (tmp_path / "run" / "profile" / "rank_0.txt").read_text()
    [said] = [line for line in lines if "profile" in line]
    assert said.startswith(table)
    shares = [float(row.split()[1].rstrip("%")) for row in table.splitlines()[1:]]
    assert shares[-1] == 100
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert 50 < sum(shares[:-1]) <= 101


def test_fewer_steps_than_asked_for(device: torch.device, tmp_path: Path) -> None:
    data, lines = make_data(tmp_path / "data"), []
    done = train(CONFIG, data, tmp_path / "run", device, RunOptions(profile=10**6), say=lines.append).summary
    assert done["steps"] > 10
    events = json.loads((tmp_path / "run" / "profile" / "rank_0.json").read_text())["traceEvents"]
    losses_seen = [one for one in events if one.get("name") == "aten::binary_cross_entropy_with_logits"]
    assert len(losses_seen) == done["steps"] - 10
    few = TrainConfig(factor_dim=3, over_arch_layer_sizes=(4,), batch_size=2000)
    done = train(few, data, tmp_path / "few", device, RunOptions(profile=3), say=lines.append).summary
    assert lines[-1] == f"--profile 3: this start had {done['steps']} steps; it needs more than 10"
    assert not (tmp_path / "few" / "profile").exists()
    with pytest.raises(UserError, match="--profile -1: must be at least 0"):
        RunOptions(profile=-1)


def test_the_table_is_sums_and_shares() -> None:
    operators = [Operator("small", 4, 1000.0, 500.0), Operator("large", 2, 3000.0, 0.0)]
    assert [line.split() for line in operator_table(operators, 2, on_gpu=False).splitlines()[1:]] == [
        ["1.500", "75.0%", "1.0", "large"],
        ["0.500", "25.0%", "2.0", "small"],
        ["2.000", "100.0%", "all", "operators"],
    ]
    on_gpu = operator_table(operators, 2, on_gpu=True).splitlines()
    assert on_gpu[1].split() == ["0.250", "100.0%", "2.0", "small"]

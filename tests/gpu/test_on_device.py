"""The sharded model on the device that a rank would take: `make gpu-check` runs this on a GPU, `make test` on the CPU.

The logits are those of the paper's equation in plain Python. Steps of every fused optimizer, of Adam and of the
replicated table end in the weights that the CPU computes.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.model import oracle
from tests.support.ranks import CPU
from tests.support.samples import Sample, draw, read_state, to_batch
from torchrec_deepfm.distributed import process_group
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.arches import check_seen_ids
from torchrec_deepfm.sharding.inputs.sparse_optimizers import SPARSE_OPTIMIZERS
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import Precision, TrainConfig
from torchrec_deepfm.training.optim.optimizers import make_optimizer
from torchrec_deepfm.training.scoring.evaluation import autocast, float32_products

SIZES, K = {"a": 50, "b": 30, "c": 4}, 5
CONFIG = TrainConfig(
    factor_dim=K, over_arch_layer_sizes=(8, 4), dropout=0.0, init_std=0.3, data_parallel_rows=4, sparse_lr=0.1
)
TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "medium": 1e-2, "bf16": 3e-2}


@pytest.fixture(scope="module")
def own_device() -> Iterator[torch.device]:
    with process_group.process_group() as device:
        assert device.type == os.environ.get("TEST_DEVICE", device.type), "the GPU is not used"
        yield device


def make(config: TrainConfig, device: torch.device) -> DistributedModelParallel:
    return build_model(config, SIZES, 2, device).model


def logits(model: DistributedModelParallel, batch: Batch, precision: Precision, device: torch.device) -> list[float]:
    model.eval()
    with torch.no_grad(), float32_products(precision), autocast(precision, device):
        _, (_, found, _) = model(batch.to(device))
    values: list[float] = found.float().cpu().tolist()
    return values


def equation(state: dict[str, Tensor], sample: Sample) -> float:
    rows = {name.removeprefix("model."): value.tolist() for name, value in state.items()}
    tables = {key: rows[f"sparse_arch.embedding_bag_collection.embedding_bags.t_{key}.weight"] for key in SIZES}
    fields = [
        *(oracle.field_of_number(row, x, K) for row, x in zip(rows["dense_arch.rows"], sample.numbers, strict=True)),
        *(oracle.field_of_bag(tables[key], [(i, 1.0) for i in sample.bags[key]], K) for key in SIZES),
    ]
    layers = [(rows[f"over_arch.layers.{n}.weight"], rows.get(f"over_arch.layers.{n}.bias")) for n in (0, 2, 4)]
    return rows["bias"][0] + oracle.first_order(fields) + oracle.second_order(fields) + oracle.mlp(fields, layers)


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "medium", "bf16"])
def test_logits_are_those_of_the_equation(own_device: torch.device, precision: Precision, longest: int) -> None:
    model = make(CONFIG, own_device)
    state = {name: value.cpu() for name, value in read_state(model).items()}
    samples = draw(16, SIZES, 2, longest=longest)
    expected = [equation(state, sample) for sample in samples]
    found = logits(model, to_batch(samples, list(SIZES)), precision, own_device)
    assert found == pytest.approx(expected, abs=TOLERANCE[precision], rel=TOLERANCE[precision])
    assert max(expected) - min(expected) > 0.1, "an oracle that says little"


@pytest.mark.parametrize("optimizer", [name for name in SPARSE_OPTIMIZERS if name != "adam"])
def test_steps_end_in_the_weights_of_the_cpu(own_device: torch.device, optimizer: str) -> None:
    config = replace(CONFIG, sparse_optimizer=optimizer)
    states = []
    for device in (own_device, CPU):
        model = make(config, device)
        own = make_optimizer(model, config)
        model.train()
        for seed in range(3):
            own.zero_grad()
            loss, _ = model(to_batch(draw(32, SIZES, 2, seed=seed), list(SIZES)).to(device))
            loss.backward()
            own.step()
        states.append({name: value.cpu() for name, value in read_state(model).items()})
    start = {name: value.cpu() for name, value in read_state(make(config, own_device)).items()}
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(value, start[name]), f"{name} was not trained"


def test_an_id_past_the_end_is_refused(own_device: torch.device) -> None:
    model = make(CONFIG, own_device)
    samples = draw(4, SIZES, 2)
    samples[2].bags["a"][0] = SIZES["a"]

    def look_up() -> None:
        logits(model, to_batch(samples, list(SIZES)), "float32", own_device)
        check_seen_ids(model)

    with pytest.raises(UserError, match=r"^feature 'a' has the id 50, but its table has 50 rows"):
        look_up()

"""The phases of a step, beside a clock around the whole of it."""

import time

import pytest
import torch

from tests.sharding.by_hand import BATCH_SIZE, plan
from torchrec_deepfm.sharding.measure import PHASES, split_step
from torchrec_deepfm.sharding.table_list import Table
from torchrec_deepfm.sharding.workload import Draw, batches, build

TABLES = tuple(
    Table(name=f"t{number}", num_embeddings=2000, embedding_dim=16, pooling_factor=200) for number in range(4)
)


@pytest.mark.parametrize("kinds", [["table_wise"] * 4, ["data_parallel"] * 4, ["table_wise", "data_parallel"] * 2])
def test_phases_sum_up_to_the_step(kinds: list[str], device: torch.device) -> None:
    trained = build(TABLES, plan(TABLES, kinds, 1), device, optimizer="rowwise_adagrad", over_arch_layer_sizes=(64,))
    own = batches(TABLES, Draw(batch_size=BATCH_SIZE), 0, 1, device)[0]
    trained.step(own)
    shares = []
    for _ in range(20):
        start = time.perf_counter()
        split = split_step(trained, own)
        whole = time.perf_counter() - start
        assert set(split) == set(PHASES)
        assert min(split.values()) >= 0
        assert sum(split.values()) <= whole
        shares.append(sum(split.values()) / whole)
    # What is left out is the work of the marks themselves. A phase that went missing would take its share from all.
    assert max(shares) > 0.96

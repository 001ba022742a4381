"""What of a batch for a GPU is pinned and travels at each step, and what is there already; `meta` stands for it."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.support.data.folders import LISTS, SCHEMA, make
from torchrec_deepfm.data.loader.batch import Assembler
from torchrec_deepfm.data.loader.row_reader import SplitRows
from torchrec_deepfm.data.schema import Schema

META = torch.device("meta")


def two_batches(folder: Path, schema: Schema, gpu: torch.device | None) -> tuple[list[Batch], list[int]]:
    """Batches of ten rows, and how many numbers were pinned at a time."""
    data = make(folder, (25,), schema)
    source = SplitRows(data, "train")
    pinned: list[int] = []

    def pin(self: Tensor, device: object = None) -> Tensor:
        pinned.append(self.numel())
        return self.clone()

    with mock.patch.object(torch.Tensor, "pin_memory", pin):
        assembler = Assembler(data, source, 10, gpu=gpu)
        batches = [assembler.batch(rows, source.take(rows)) for rows in (np.arange(10), np.arange(10, 20))]
    return batches, pinned


def test_lengths_and_offsets_of_one_hot_columns_are_on_the_gpu_once(tmp_path: Path) -> None:
    (first, second), pinned = two_batches(tmp_path / "data", SCHEMA, META)
    assert pinned == 2 * [3 * 10, 2 * 10, 10]  # ids, numbers, labels
    for part in ("_lengths", "_offsets"):
        there = [getattr(batch.to(META).sparse_features, part) for batch in (first, second)]
        assert there[0] is there[1]
        assert there[0].is_meta
        assert there[0].dtype == torch.int32


def test_offsets_of_lists_are_left_to_the_gpu(tmp_path: Path) -> None:
    batches, pinned = two_batches(tmp_path / "data", LISTS, META)
    ids = [len(batch.sparse_features.values()) for batch in batches]
    assert sorted(pinned) == sorted([*ids, *ids, 40, 40, 20, 20, 10, 10])  # and weights, lengths, numbers, labels
    assert all(batch.sparse_features.offsets_or_none() is None for batch in batches)


@pytest.mark.parametrize("schema", [SCHEMA, LISTS])
def test_the_values_are_those_of_a_batch_for_the_cpu(tmp_path: Path, schema: Schema) -> None:
    plain, pinned = two_batches(tmp_path / "plain", schema, None)
    assert pinned == []
    own, _ = two_batches(tmp_path / "gpu", schema, torch.device("cpu"))
    for a, b in zip(plain, own, strict=True):
        assert torch.equal(a.dense_features, b.dense_features)
        assert torch.equal(a.labels, b.labels)
        for key in schema.categorical:
            x, y = a.sparse_features[key], b.sparse_features[key]
            assert torch.equal(x.values(), y.values())
            assert torch.equal(x.offsets(), y.offsets())

"""The batch of a loss that is not finite is read again: none is kept."""

import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.data.folders import LISTS, make
from tests.support.ranks import one_rank
from torchrec_deepfm.data.loader import epoch_order
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.monitoring.nonfinite import LossWatch


def lists(batch: Any) -> list[list[float]]:
    features = batch.sparse_features
    parts = (batch.dense_features, features.values(), features.lengths(), features.weights(), batch.labels)
    return [part.flatten().tolist() for part in parts]


@pytest.mark.parametrize(("late", "bad"), [(0, 4), (0, 7), (20, 1), (20, 6), (20, 8)])
def test_the_batch_of_the_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int, bad: int) -> None:
    monkeypatch.setattr(epoch_order, "BLOCK_ROWS", 4)
    loader = Loader(
        make(tmp_path / "data", (20, 23), LISTS), "train", batch_size=3, world_size=2, shuffle=True, drop_last=True
    )
    watch, step, seen = LossWatch(loader, late=late), 0, dict[int, list[list[float]]]()
    losses: list[torch.Tensor] = []
    kept: list[weakref.ref[torch.Tensor]] = []
    while step < bad + late:
        epoch, number = divmod(step, len(loader))
        if number == 0:
            loader.set_epoch(epoch)
            batches = iter(loader)
        step += 1
        batch = next(batches)
        watch.place(step, loader.position(number))
        watch.rates(step, {"sparse": step / 8, "dense": 0.5})
        seen[step] = lists(batch)
        kept.append(weakref.ref(batch.dense_features))
        losses.append(torch.tensor(float("nan") if step == bad else 1.0))
    del batch, batches
    watch.check(step - late, losses[-late - 1 :])
    assert watch.bad_step == bad
    assert sum(one() is not None for one in kept) == 0
    with one_rank(), pytest.raises(UserError, match=rf"^step {bad}: the loss is not finite \(learning rates: sparse "):
        watch.refuse(bad, tmp_path, mock.Mock(saved=None))
    saved = torch.load(tmp_path / f"nonfinite_step_{bad:08d}" / "rank_0.pt", weights_only=True)
    found = [saved[name].flatten().tolist() for name in ("dense_features", "values", "lengths", "weights", "labels")]
    assert found == seen[bad]

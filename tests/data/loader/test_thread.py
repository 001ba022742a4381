"""The thread that reads ahead: it changes no batch, and it always ends."""

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.support.data.batches import DAYS, rows_of
from tests.support.data.folders import LISTS, SCHEMA, make
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def gone() -> bool:
    """Whether the loaders' threads end."""
    for _ in range(500):
        if not threads():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("schema", [SCHEMA, LISTS], ids=["one-hot", "lists"])
@pytest.mark.parametrize("prefetch", [1, 2, 5, 100])
def test_the_thread_changes_nothing(tmp_path, small_blocks, prefetch, schema):
    data = make(tmp_path / "data", DAYS, schema)
    with_thread = Loader(data, "train", batch_size=10, shuffle=True, prefetch=prefetch)
    without = Loader(data, "train", batch_size=10, shuffle=True, prefetch=0)
    for a, b in zip(with_thread, without, strict=True):
        assert torch.equal(a.dense_features, b.dense_features)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.sparse_features.values(), b.sparse_features.values())
        assert torch.equal(a.sparse_features.lengths(), b.sparse_features.lengths())
    assert gone()


def test_batches_are_made_ahead_and_no_further(data, monkeypatch):
    made = []
    original = Loader._batch

    def counted(self, run, step):
        made.append((step, threading.current_thread().name))
        return original(self, run, step)

    monkeypatch.setattr(Loader, "_batch", counted)
    batches = iter(Loader(data, "train", batch_size=10, prefetch=2))
    assert made == []
    next(batches)
    for _ in range(500):
        if len(made) == 3:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert [step for step, _ in made] == [0, 1, 2]
    assert all(name.startswith("loader") for _, name in made)
    batches.close()
    assert gone()
    assert len(made) == 3


def test_the_thread_ends_with_an_iterator_that_is_dropped(data):
    batches = iter(Loader(data, "train", batch_size=10))
    next(batches)
    assert threads()
    del batches
    gc.collect()
    assert gone()


def test_a_mistake_in_the_thread_reaches_the_caller_at_its_batch(tmp_path):
    data = make(tmp_path / "data", (100,))
    path = data.folder / "day_0_labels.npy"
    array = np.load(path)
    array[35] = 9
    np.save(path, array)
    batches = iter(Loader(data, "train", batch_size=10, prefetch=2))
    assert [rows_of(next(batches))[0] for _ in range(3)] == [0, 10, 20]
    with pytest.raises(UserError, match="row 35, column y: 9 is not a valid label"):
        next(batches)
    assert list(batches) == []
    assert gone()


@pytest.mark.parametrize("ending", ["sys.exit(7)", "os.kill(os.getpid(), 2)"])
def test_the_interpreter_ends_in_the_middle_of_an_epoch(data, ending):
    code = f"""
import os, sys
from pathlib import Path
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.dataset.prepared import PreparedData
batches = iter(Loader(PreparedData.open(Path({str(data.folder)!r})), "train", batch_size=1, prefetch=50))
next(batches)
print("ready", flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "ready\n"
    if "exit" in ending:
        assert done.returncode == 7, done.stderr
    else:
        assert done.returncode in (1, 130, -2), done.stderr
        assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"

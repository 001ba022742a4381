"""What a save leaves behind in the process that trains."""

import threading
import time
from pathlib import Path

import torch

from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts
from torchrec_deepfm.training.checkpoint.manager import Checkpoints


def test_a_save_leaves_no_thread(tmp_path: Path, device: torch.device) -> None:
    """Its OpenMP threads would count for ever, and with more of them than cores those of the training sleep."""
    checkpoints = Checkpoints(str(tmp_path), keep_last=1)
    before = set(threading.enumerate())
    memory = torch.arange(1_000_000.0)  # large enough for more than one thread
    for step in (1, 2):
        checkpoints.save(step, {"weight": TensorCuts(tuple(memory.size()), [Cut((0,), memory)])}, {})
        checkpoints.wait()
        deadline = time.monotonic() + 10
        while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, left
    checkpoints.close()

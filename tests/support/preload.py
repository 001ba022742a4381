"""What the server of `fork.py` imports before it forks: everything slow that starts no thread.

Polars and pyarrow are left out, as importing them starts threads; they load in a third of a second. So is pandas, which
imports pyarrow: scikit-learn would import it if it could, and does without it here. A fork may import all three.
"""

import gc
import sys
from pathlib import Path
from unittest import mock

gc.disable()
sys.modules["pandas"] = None  # type: ignore[assignment]  # makes its import fail
with mock.patch("warnings.showwarning"):
    import matplotlib.figure  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.optim
    import torch.distributed.run
    import torch.utils.tensorboard  # noqa: F401
    import torchrec.distributed.planner  # noqa: F401
    import tyro  # noqa: F401

    import torchrec_deepfm.cli.main
    import torchrec_deepfm.training.trainer  # noqa: F401
del sys.modules["pandas"]
gc.freeze()  # no fork searches what is imported for garbage, and copies its pages
gc.set_threshold(100_000, 20, 50)  # as in conftest.py
gc.enable()

threads = len(list(Path("/proc/self/task").iterdir()))
assert threads == 1, f"{threads} threads run in the server, which do not survive a fork"

"""What the server of `fork.py` imports before it forks: everything slow.

Forks lack the server's threads. Polars and Arrow each start jemalloc's, whose locks jemalloc itself releases in a fork,
and Polars one that waits for spilled files to remove. No other may run.
"""

import gc
from pathlib import Path
from unittest import mock

from tests.support.fork import end_without_cleaning

gc.disable()
with mock.patch("warnings.showwarning"):
    import matplotlib.figure  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.compute
    import pyarrow.orc
    import pyarrow.parquet  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.optim
    import torch.distributed.run
    import torch.utils.tensorboard  # noqa: F401
    import torchrec.distributed.planner  # noqa: F401
    import tyro  # noqa: F401

    import torchrec_deepfm.cli.main
    import torchrec_deepfm.data.prepare.prepare
    import torchrec_deepfm.training.trainer  # noqa: F401
gc.freeze()  # no fork searches what is imported for garbage, and copies its pages
gc.set_threshold(100_000, 20, 50)  # as in conftest.py
gc.enable()

HARMLESS = {"jemalloc_bg_thd", "polars-ooc-clea"}
threads = sorted((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
assert len([name for name in threads if name not in HARMLESS]) == 1, f"threads do not survive a fork: {threads}"

end_without_cleaning()

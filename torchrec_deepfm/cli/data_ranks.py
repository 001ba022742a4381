"""The ranks of ``prepare`` and ``predict``, which share files and no model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from torchrec_deepfm import console

if TYPE_CHECKING:
    from torchrec_deepfm.data.prepare.workers import Workers

# A rank may wait for another one as long as a day of Criteo Terabyte takes.
_TIMEOUT: Final = timedelta(days=30).total_seconds()


@contextmanager
def data_ranks() -> Iterator["Workers"]:
    """This process alone, without torch, or as one of several ranks; they hand freed memory back to the kernel."""
    from torchrec_deepfm.data.prepare.workers import Workers

    if "RANK" not in os.environ:
        yield Workers()
        return
    console.import_quietly("torch")
    from torchrec_deepfm.distributed import process_group as ranks

    with ranks.process_group(_TIMEOUT, cpu=True, keep_memory=False):
        yield Workers(rank=ranks.rank(), count=ranks.count(), gather=ranks.gather)

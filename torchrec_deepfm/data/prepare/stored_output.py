"""The output of ``prepare`` at an address: written on the local disk, then stored, its manifest last."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_deepfm.data.dataset.prepared import MANIFEST
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.remote.places import PreparedOutput


@contextmanager
def prepared_output(path: Path, workers: Workers) -> Iterator[Path]:
    """Give the folder to prepare into, and store it at the end if its path is an address; a collective.

    Yields the local folder. Raises ``UserError``: the address holds something else, or storing failed; the same call
    resumes.
    """
    output = PreparedOutput(path)
    done = False
    try:
        workers.on_first(lambda: output.begin(MANIFEST))
        yield output.local
        workers.on_first(lambda: output.finish(MANIFEST))
        done = True
    finally:
        if workers.is_main:
            output.close(done=done)

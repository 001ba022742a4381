"""The predictions at an address: a file that is written on the local disk, then stored as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.remote.places import FileOutput


@contextmanager
def predicted_output(path: Path, ranks: Workers) -> Iterator[Path]:
    """Give the file to write to, and store it at the end if its path is an address; a collective.

    What exists at the address is fetched first, for ``predict_files`` to tell its own finished file from another one.

    Yields the local file. Raises ``UserError``: the address can't be reached, or another process of this host is
    writing it.
    """
    output = FileOutput(path)
    done = False
    try:
        ranks.on_first(output.begin)
        yield output.local
        ranks.on_first(output.finish)
        done = True
    finally:
        if ranks.is_main:
            output.close(done=done)

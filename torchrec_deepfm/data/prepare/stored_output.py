"""The output of ``prepare`` or ``predict`` at an address: written on the local disk, then stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.remote.places import FileOutput, PreparedOutput


@contextmanager
def stored_output(output: FileOutput | PreparedOutput, workers: Workers) -> Iterator[Path]:
    """Give the local place to write to, and store it at the end if the output is at an address; a collective.

    What exists at the address is looked at first, so that the same call resumes, and finds its own finished output.

    Raises ``UserError``: the address holds something else or can't be reached, or another process of this host is
    writing it.
    """
    done = False
    try:
        workers.on_first(output.begin)
        yield output.local
        workers.on_first(output.finish)
        done = True
    finally:
        if workers.is_main:
            output.close(done=done)

"""Trainings of tests draw no pictures: eleven cost a second of CPU each time, and few tests look at them.

Everything else of a report is made. `pytestmark = pytest.mark.pictures` has a module's pictures drawn; forks draw none,
commands in processes of Python's own draw theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torchrec_deepfm.report.page import Picture

EMPTY = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4="  # <svg xmlns="..."/>


@contextmanager
def undrawn() -> Iterator[None]:
    """Reports show empty pictures."""
    with mock.patch.object(Picture, "address", EMPTY):
        yield

import os
from pathlib import Path

import pytest

from tests.end_to_end import Workspace

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and torch reads this when it is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take longest, to be begun first: a worker that is done with its own takes the next file.
LONG = ("test_training_end_to_end.py", "tests/distributed/", "tests/faults/")

collect_ignore = ["support/preload.py"]  # only for a process that is about to fork


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the repository, shared by the tests that type commands; the sample data are made there once."""
    return Workspace.copy(tmp_path_factory.mktemp("user") / "torchrec_deepfm")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real click data beside the repository, where there are any."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data, real click data that may not be redistributed")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if name in item.nodeid), len(LONG)))

from pathlib import Path

import pytest

from tests.end_to_end import Workspace

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

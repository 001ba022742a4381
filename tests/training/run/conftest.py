"""A finished run and one that was killed, to be damaged."""

import shutil
from pathlib import Path

import pytest

from tests.faults.runs import make_data
from tests.support.ranks import one_rank
from tests.training.run.killed_runs import CONFIG, KilledError, train_until
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.training.trainer import train


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="session")
def templates(clicks: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with one_rank() as device:
        train(CONFIG, clicks, folder / "finished", device)
        with pytest.raises(KilledError):
            train_until(22, clicks, folder / "unfinished", device, KilledError())
    return folder


@pytest.fixture
def finished(templates: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates / "finished", tmp_path / "run"))


@pytest.fixture
def unfinished(templates: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints of step 16 and 20, and perhaps the one of its best evaluation."""
    return Path(shutil.copytree(templates / "unfinished", tmp_path / "run"))

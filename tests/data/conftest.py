import pytest

from tests.support.data.batches import DAYS
from tests.support.data.folders import LISTS, make
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader import epoch_order


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Four days with one id per row and column."""
    return make(tmp_path_factory.mktemp("loader") / "data", DAYS)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Four days with columns of lists, one of them weighted."""
    return make(tmp_path_factory.mktemp("loader") / "lists", DAYS, LISTS)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows so small that these folders have many."""
    monkeypatch.setattr(epoch_order, "BLOCK_ROWS", 4)
    monkeypatch.setattr(epoch_order, "WINDOW_BLOCKS", 3)

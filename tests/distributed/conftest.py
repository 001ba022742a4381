from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import one_rank
from torchrec_deepfm.data.prepare import prepare
from torchrec_deepfm.data.prepared import PreparedData
from torchrec_deepfm.data.synthetic import generate


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The CPU, with a process group of this process alone."""
    with one_rank() as cpu:
        yield cpu


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """10,000 training rows and 1,000 in each other split; do not change it."""
    folder = tmp_path_factory.mktemp("data")
    raw = generate(folder / "raw", rows=10_000, seed=1)
    days, validation, test = (sorted((folder / "raw").glob(f"{name}*.tsv")) for name in ("day", "validation", "test"))
    assert len(days) == len(raw.files) - 2
    return prepare(days, folder / "prepared", validation=validation, test=test, min_count=3)

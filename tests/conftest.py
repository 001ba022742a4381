import gc
import getpass
import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import hypothesis
import pytest

from tests.support.end_to_end import Workspace
from tests.support.fork import end_without_cleaning
from tests.support.pictures import undrawn

if TYPE_CHECKING:
    import torch

    from torchrec_deepfm.data.dataset.prepared import PreparedData

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; torch and Polars read these when they are loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("POLARS_MAX_THREADS", "1")
    end_without_cleaning()
gc.disable()  # until all tests are imported

# Tests write many small files, and `prepare` waits for each to be on the disk: three quarters of its time. In memory it
# does not wait. Not where libraries can't be loaded from there, nor where it is as small as a container's.
MEMORY = Path("/dev/shm")
ROOM = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= 6 << 30
if ROOM and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell; tests' processes would inherit it
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else runs on the machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Files that take longest, to be begun first: a worker that is done with its own takes the next file.
LONG = ("training/test_end_to_end.py", "test_docs.py", "tests/training/", "tests/experiment/", "tests/sharding/")

collect_ignore = ["support/preload.py"]  # only for a process that is about to fork


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `tmp_path` is, for what asks `tempfile`; compiled code stays where the next session finds it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    multiprocessing.util.get_temp_dir()  # of the server of forks, which outlives the session
    with mock.patch.object(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp"))):
        yield


@pytest.fixture(scope="module", autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports are drawn only in modules with the mark `pictures`."""
    with nullcontext() if request.node.get_closest_marker("pictures") else undrawn():
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the repository, shared by the tests that type commands; the sample data are made there once."""
    return Workspace.copy(tmp_path_factory.mktemp("user") / "torchrec_deepfm")


@pytest.fixture
def device() -> "Iterator[torch.device]":
    """The CPU, with a process group of this process alone."""
    from tests.support.ranks import one_rank  # loads torch, which many tests do not need

    with one_rank() as cpu:
        yield cpu


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> "PreparedData":
    """10,000 training rows and 1,000 in each other split; do not change it."""
    from torchrec_deepfm.data.prepare.prepare import prepare
    from torchrec_deepfm.data.synthetic.generate import generate

    folder = tmp_path_factory.mktemp("data")
    raw = generate(folder / "raw", rows=10_000, seed=1)
    days, validation, test = (sorted((folder / "raw").glob(f"{name}*.tsv")) for name in ("day", "validation", "test"))
    assert len(days) == len(raw.files) - 2
    return prepare(days, folder / "prepared", validation=validation, test=test, min_count=3)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real click data beside the repository, where there are any."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data, real click data that may not be redistributed")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


def pytest_collection_finish() -> None:
    gc.freeze()  # no collection searches what was imported
    gc.set_threshold(100_000, 20, 50)  # Python's 700 make it a twelfth of the time
    gc.enable()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        gc.unfreeze()  # or DuckDB lists what is left; workers end without

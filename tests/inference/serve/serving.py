"""A server in the process of a test, and what its requests are made of."""

import asyncio
import contextlib
import io
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from unittest import mock

import httpx
import pyarrow as pa

from torchrec_deepfm.inference.serve import server
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.inference.serve.model import ServedModel

JSON = {"Content-Type": "application/json"}


@contextlib.asynccontextmanager
async def serving(
    model: ServedModel, limits: Limits | None = None, read: Callable[[], ServedModel] | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """A server in this process, and its lines; it is stopped by SIGTERM."""
    said: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    again = read or (lambda: model)
    with mock.patch.object(server, "gc"):  # all that the tests have imported would be searched for garbage
        task = asyncio.create_task(server.run(model, again, listener, limits or Limits(), said.append))
        while not said:
            await asyncio.sleep(0.01)
            if task.done():
                task.result()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client, said
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 30)
    assert said[-1] == "stopped; all requests that were accepted are answered"


def scenario(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def stream(table: pa.Table, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue()

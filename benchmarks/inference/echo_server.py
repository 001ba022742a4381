"""The floor of ``serve_load``: the HTTP server of ``serve``, that reads a request and gives a constant answer.

python -m benchmarks.inference.echo_server  # prints its address
"""

import asyncio
import json
import socket
from typing import Any

import uvicorn

ANSWER = json.dumps({"probabilities": [0.5], "model": "0" * 64}).encode()
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer as an ASGI application."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as serve's
        print(f"http://127.0.0.1:{listening.getsockname()[1]} echoes", flush=True)
        config = uvicorn.Config(answer, http="httptools", lifespan="off", log_level="warning", access_log=False)
        asyncio.run(uvicorn.Server(config).serve([listening]))

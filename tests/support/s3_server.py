"""A real S3 server on loopback (moto's), behind a proxy that injects faults into its HTTP answers."""

import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal["500", "503", "reset", "cut", "slow", "expired"]
_ERRORS = {  # as S3 answers; Google's storage gives the same as JSON
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}


class FaultProxy:
    """Forwards HTTP to a server.

    Attributes:
        seen: method and path of every request, with the fault that it met.
    """

    def __init__(self, port: int, *, json_errors: bool = False) -> None:
        self.seen: list[tuple[str, str, Kind | None]] = []
        self._faults: list[tuple[Kind, Callable[[str, str], bool], list[int]]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: Any) -> None: ...

            def _forward(self) -> None:
                body = self._body()
                path = self.path
                if "uploadType=multipart" in path and (name := re.search(rb'"name": "([^"]+)"', body)):
                    path += f"&name={name[1].decode()}"  # Google's: the file's name is in the body
                kind = proxy._next(self.command, path)
                proxy.seen.append((self.command, path, kind))
                if kind in _ERRORS:
                    status, code, message = _ERRORS[kind]
                    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
                    if json_errors:
                        text = json.dumps({"error": {"code": status, "message": message}})
                    kind_of_text = "application/json" if json_errors else "application/xml"
                    headers = {"Content-Type": kind_of_text, "x-ms-error-code": code}  # the last is Azure's
                    self._answer(status, headers, text.encode())
                    return
                if kind == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                if kind == "slow":
                    time.sleep(1.0)
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                if kind == "cut":  # half of the body, then a reset
                    self._answer(answer.status, dict(answer.getheaders()), content, sent=len(content) // 2)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                self._answer(answer.status, dict(answer.getheaders()), content)
                upstream.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815 (names of the base class)

            def _body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                return self.rfile.read(int(self.headers.get("Content-Length", "0")))

            def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
                self.send_response_only(status)
                lengths = [value for name, value in headers.items() if name.lower() == "content-length"]
                length = lengths[0] if lengths else str(len(content))  # of a HEAD, that of the object
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content if sent is None else content[:sent])

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _next(self, method: str, path: str) -> Kind | None:
        for kind, meets, left in self._faults:
            if left[0] and meets(method, path):
                left[0] -= 1
                return kind
        return None

    @contextmanager
    def fault(
        self, kind: Kind, *, times: int = 1 << 30, method: str = "", path: str = ""
    ) -> Iterator[list[tuple[str, str, Kind | None]]]:
        """Let so many of the requests of a method, to a path that has a part, meet a fault; yields what met one."""
        one = (kind, lambda given, to: method in ("", given) and path in to, [times])
        self._faults.append(one)
        first, met = len(self.seen), []
        try:
            yield met
        finally:
            self._faults.remove(one)
            met += [request for request in self.seen[first:] if request[2] is not None]

    def close(self) -> None:
        self._server.shutdown()


@contextmanager
def s3_server() -> Iterator[FaultProxy]:
    """A server with a bucket named ``bucket``, behind its proxy."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = FaultProxy(port)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    try:
        yield proxy
    finally:
        proxy.close()
        server.stop()

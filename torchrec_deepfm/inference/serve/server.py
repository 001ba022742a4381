"""``serve``: one process, one model at a time, until SIGTERM; SIGHUP reads the model again.

The event loop of uvicorn reads and checks requests and scores short batches; a thread scores the others
(``batching.py``).
"""

import asyncio
import contextlib
import functools
import gc
import ipaddress
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.serve.app import QUEUED, make_app, raw, refusal
from torchrec_deepfm.inference.serve.batching import Batcher
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.inference.serve.metrics import ServiceMetrics
from torchrec_deepfm.inference.serve.model import ServedModel

_HEADER_BYTES: Final = 16 << 10
_OTHER_FILES: Final = 256  # besides connections: libraries, the model, the listener
_HEADER_SECONDS: Final = 10.0
# The event loop gives up Python's lock at every system call, and the thread of the model then keeps it for up to this
# long. The default of 5 ms costs answers under overload.
_SWITCH_SECONDS: Final = 0.001
_REFUSAL: Final = raw(refusal())
_LAST_REFUSAL: Final = _REFUSAL.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)
_WAITING_CONNECTIONS: Final = 4096  # that the system keeps while no more are accepted, or fewer (net.core.somaxconn)
_ACCEPT_PAUSE: Final = 0.1  # seconds after the system has refused a connection, for want of files or memory
_PATHS: Final = ("/", "/predict", "/explain", "/health", "/metrics", "/openapi.json")


class _Served:
    """A model with its application, and how many requests are inside."""

    def __init__(self, model: ServedModel, limits: Limits, metrics: ServiceMetrics) -> None:
        self.model = model
        self.batcher = Batcher(
            model.answer,
            rows=limits.batch_rows,
            wait=limits.batch_wait_ms / 1e3,
            queue_rows=limits.queue_rows,
            observe=metrics.batch_rows.observe,
        )
        self.app = make_app(model, self.batcher, limits, metrics)
        self.inside = 0
        self.empty = asyncio.Event()

    async def retire(self) -> None:
        """Answer the requests that are inside, then end."""
        while self.inside:
            self.empty.clear()
            await self.empty.wait()
        await self.batcher.close()


class Service:
    """The application that uvicorn runs: every request goes to the newest model and stays with it.

    ``read`` reads it, at the start and at each reload.
    """

    def __init__(self, read: Callable[[], ServedModel], limits: Limits, say: Callable[[str], None]) -> None:
        self._read, self._limits, self._say = read, limits, say
        self.metrics = ServiceMetrics()
        self._served: _Served | None = None
        self._lock = asyncio.Lock()
        self._busy = refusal()

    def full(self) -> bool:
        """Whether as many requests wait as may."""
        served = self._served
        return served is not None and served.batcher.unanswered >= self._limits.queue_requests

    def refused(self, path: str) -> None:
        """Count a request that was refused before it came here."""
        self.metrics.requests.labels(path, 429).inc()
        self.metrics.seconds.labels(path).observe(0)

    async def start(self, model: ServedModel) -> None:
        """Answer with a model from now on; the one before answers what it has taken."""
        before, self._served = self._served, _Served(model, self._limits, self.metrics)
        batcher = self._served.batcher
        self.metrics.waiting.set_function(lambda: batcher.waiting)
        self.metrics.model.clear()
        self.metrics.model.labels(model.sha256).set(1)
        if before is not None:
            await before.retire()
            before = None
            gc.unfreeze()
            gc.collect()
        # What a model consists of lives as long as it does: collections in between need not look at it.
        gc.freeze()

    async def reload(self) -> None:
        """Read the model again; if that fails, the one before stays."""
        async with self._lock:
            try:
                model = await asyncio.to_thread(self._read)
            except Exception as error:  # whatever is wrong with the new one must not end the service
                self.metrics.reloads.labels("failed").inc()
                self._say(f"reload failed, the model before still answers: {' '.join(str(error).splitlines())}")
                return
            await self.start(model)
            self.metrics.reloads.labels("done").inc()
            self._say(f"reloaded {model.name}, model {model.sha256[:12]}")

    async def stop(self) -> None:
        """Answer what was taken, then end."""
        if self._served is not None:
            await self._served.retire()
        gc.unfreeze()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI application does."""
        served = self._served
        assert served is not None
        path, start, status = _metric_path(scope["path"]), time.perf_counter(), 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        served.inside += 1
        try:
            await (self._busy if path in QUEUED and self.full() else served.app)(scope, receive, sending)
        finally:
            served.inside -= 1
            served.empty.set()
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)


def _metric_path(path: str) -> str:
    """The path under which metrics count a request: there is a bounded number."""
    return path if path in _PATHS else "other"


class _Protocol(HttpToolsProtocol):
    """Limits headers in size and time, on which uvicorn would wait for ever, and refuses what is too much.

    ``room`` is released when the connection has ended.
    """

    def __init__(self, service: Service, room: asyncio.Semaphore, **options: Any) -> None:
        super().__init__(**options)
        self._service, self._room = service, room
        self._late: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._refusing = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._room.release()
        self._unwatch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > _HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")
        self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        path = self.url.partition(b"?")[0].decode("latin-1")
        # Under overload most requests end here: what uvicorn and Starlette do for one would leave no time to answer the
        # others. Not for one that waits to be asked for its body: it may send another request in its place.
        if not (path in QUEUED and self._service.full() and self._waits() and not self.expect_100_continue):
            super().on_headers_complete()
            return
        self._refusing = True
        self._service.refused(path)
        self.transport.write(_REFUSAL if self.parser.should_keep_alive() else _LAST_REFUSAL)

    def on_body(self, body: bytes) -> None:
        if not self._refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refusing:
            super().on_message_complete()
            return
        self._refusing = False
        self._unwatch()  # the next request has a time of its own
        if not self.parser.should_keep_alive():
            self.transport.close()

    def _waits(self) -> bool:
        """Whether the connection waits for a request; the next one's answer may be under way."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._waits():  # body and answer have a limit of their own
            self._unwatch()
        elif self._late is None and not self.transport.is_closing():
            self._late = asyncio.get_running_loop().call_later(_HEADER_SECONDS, self._close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self._waits() and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server with our signals and our way to accept: it ends with exit code 0 after SIGTERM.

    At its limit of connections it accepts no more of them, and the system lets the others wait. To accept and refuse
    them would take the time of the answers.
    """

    def __init__(
        self, config: uvicorn.Config, room: asyncio.Semaphore, reload: Callable[[], None], started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._room, self._reload, self._started = room, reload, started
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # with what it is to listen on, it would accept without a limit
        for listener in sockets or []:
            listener.setblocking(False)
            task = asyncio.create_task(self._accept(listener))
            task.add_done_callback(lambda _: setattr(self, "should_exit", True))
            self._accepting.append(task)
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.wait(self._accepting)
        await super().shutdown(sockets)
        for task in self._accepting:
            if not task.cancelled():
                task.result()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                await self._room.acquire()
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError:
                    self._room.release()
                    await asyncio.sleep(_ACCEPT_PAUSE)
                else:
                    group.create_task(self._connect(connection))

    async def _connect(self, connection: socket.socket) -> None:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        protocol = functools.partial(
            make, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
        except OSError:  # it has ended already
            connection.close()
            self._room.release()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.handle_exit, signum, None)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        yield


def serve(read: Callable[[], ServedModel], *, host: str, port: int, limits: Limits, say: Callable[[str], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C; what was accepted before is answered. SIGHUP calls ``read`` again."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    limits = _within_open_files(limits, say)
    with _listen(host, port) as listener:
        asyncio.run(run(read(), read, listener, limits, say))


async def run(
    model: ServedModel,
    read: Callable[[], ServedModel],
    listener: socket.socket,
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """Serve on a socket that listens already; see ``serve``."""
    service = Service(read, limits, say)
    await service.start(model)
    address, port = listener.getsockname()[:2]
    name = f"[{address}]" if ":" in address else address
    local = ipaddress.ip_address(address).is_loopback
    # A page of another site may reach this machine's own addresses by a name that it makes point here.
    app = TrustedHostMiddleware(service, ["127.0.0.1", "localhost", "[::1]", name] if local else ["*"])
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(service.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    def started() -> None:
        if not local:
            say(f"warning: {name} can be reached from other machines, without password or encryption")
        say(f"serving {model.name} on http://{name}:{port} (model {model.sha256[:12]}); SIGHUP reloads, SIGTERM stops")

    room = asyncio.Semaphore(limits.max_connections)
    config = uvicorn.Config(
        app,
        http=functools.partial(_Protocol, service, room),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
    )
    await _Server(config, room, reload, started).serve([listener])
    for task in list(reloads):
        await task
    await service.stop()
    say("stopped; all requests that were accepted are answered")


def _within_open_files(limits: Limits, say: Callable[[str], None]) -> Limits:
    """Raise this process's limit on open files for the connections; where that is refused, take fewer of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        needed = hard
        limits = replace(limits, max_connections=max(hard - _OTHER_FILES, 1))
        say(f"note: at most {limits.max_connections:,} connections, as a process may open {hard:,} files (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return limits


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UserError(f"must be 0 to {2**16 - 1:,}", where=f"--port {port}")
    try:
        [family, _, _, _, address], *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.create_server(address[:2], family=family, backlog=_WAITING_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(
            f"can't listen there ({what})", where=f"--host {host} --port {port}", remedy="choose another one"
        ) from error
    # asyncio sets it only on sockets that name their protocol, and accepted ones name the listener's. Without it the
    # body of an answer waits for the acknowledgement of its head, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener

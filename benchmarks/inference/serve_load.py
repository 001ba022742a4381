"""Latency and rate of ``serve`` under load; every answer is compared with ``predict``'s.

    python -m benchmarks.inference.serve_load
    python -m benchmarks.inference.serve_load --echo --batches 1

A synthetic log, prepared and trained (39 fields, factor_dim 15, MLP 400-400-400), exported to ONNX, served by one
process. A client process beside it sends at a fixed rate (open loop: a slow answer does not slow the next request); its
times count from when a request was due. Capacity is the rate with 32 requests always under way. The server's CPU time
per answer hardly depends on what else the machine does.
"""

import asyncio
import gc
import json
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import tyro

from benchmarks._lib.commands import environment, module_command, torchrec_deepfm
from benchmarks._lib.formatting import markdown
from benchmarks._lib.windows import cpu_seconds


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    rows: int = 100_000
    """Rows to train on."""
    seconds: float = 4.0
    """Of each load."""
    loads: tuple[float, ...] = (0.5, 0.7, 1.0, 3.0)
    """Of capacity."""
    batches: tuple[int, ...] = (1, 64)
    """Rows per request."""
    package: Path | None = None
    """Serve this package, made before; and test.tsv beside it."""
    connections: int = 6000
    """That the client opens at most, more than the server accepts. A request that has none waits, and its time runs."""
    echo: bool = False
    """Measure a server that gives constant answers instead: what client and HTTP take of the times."""


_IDLE_SECONDS = 3  # uvicorn closes a connection that is idle for 5
_LOST = 0  # in the place of a status


class Client:
    """Connections that are kept, at most a number of them, plain HTTP/1.1 on asyncio's streams."""

    def __init__(self, port: int, bodies: list[bytes], connections: int) -> None:
        self._port, self._room = port, asyncio.Semaphore(connections)
        head = (
            "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        )
        self._requests = [head.format(len(body)).encode() + body for body in bodies]
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, number: int) -> tuple[int, bytes]:
        """Send a request; return status and body."""
        async with self._room:
            return await self._ask(number)

    async def _ask(self, number: int) -> tuple[int, bytes]:
        used, *streams = self._idle.pop() if self._idle else (0.0,)
        if time.monotonic() - used > _IDLE_SECONDS:
            streams = list(await asyncio.open_connection("127.0.0.1", self._port))
        reader, writer = streams
        writer.write(self._requests[number % len(self._requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]
        if b"connection: close" not in head.lower():
            self._idle.append((time.monotonic(), reader, writer))
        return int(head[9:12]), body

    async def close(self) -> None:
        """Close all connections; the server counts those that are idle too."""
        for _, _, writer in self._idle:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, _, writer in self._idle), return_exceptions=True)


async def closed(client: Client, seconds: float) -> float:
    """Requests per second with 32 always under way."""
    done, end = 0, time.perf_counter() + seconds

    async def one(number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            status, _ = await client.ask(number)
            assert status == 200, status
            done += 1

    await asyncio.gather(*(one(number) for number in range(32)))
    return done / seconds


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    number: int
    status: int
    body: bytes
    seconds: float
    """Since it was due."""
    at: float
    """Seconds since the first one was due."""


async def opened(client: Client, rate: float, seconds: float) -> list[Answer]:
    """Send at a rate; return what came of each request."""
    found: list[Answer] = []
    start = time.perf_counter()

    async def one(number: int, due: float) -> None:
        try:
            status, body = await client.ask(number)
        except (OSError, asyncio.IncompleteReadError):
            status, body = _LOST, b""
        now = time.perf_counter()
        found.append(Answer(number, status, body, now - due, now - start))

    tasks = []
    for number in range(int(rate * seconds)):
        due = start + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(number, due)))
    await asyncio.gather(*tasks)
    return found


def client_main(port: int, pid: int, folder: Path, options: Options) -> None:
    """The client's process: writes a line for each load."""
    gc.disable()  # with all requests of a load in memory a collection takes long enough to send a burst after it
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request under way has a connection
    lines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    expected = np.load(folder / "expected.npy")
    for size in options.batches:
        places = range(0, len(rows) - size, size)
        bodies = [json.dumps({"rows": rows[place : place + size]}).encode() for place in places]
        client = Client(port, bodies, options.connections)

        async def measure(size: int = size, client: Client = client, count: int = len(bodies)) -> None:
            await closed(client, 1)
            before = cpu_seconds(pid)
            capacity = await closed(client, options.seconds)
            per_answer = 1e3 * (cpu_seconds(pid) - before) / (capacity * options.seconds)
            print(f"{size} rows: {capacity:,.0f} requests/s with 32 under way, {per_answer:.2f} ms of CPU each")
            for load in options.loads:
                before = cpu_seconds(pid)
                found = await opened(client, load * capacity, options.seconds)
                used = cpu_seconds(pid) - before
                wrong = 0
                for answer in found:
                    if answer.status == 200 and not options.echo:
                        place = answer.number % count * size
                        given = np.array(json.loads(answer.body)["probabilities"])
                        wrong += not np.abs(given - expected[place : place + size]).max() <= 1e-6
                good = [answer for answer in found if answer.status == 200]
                times = 1e3 * np.array([answer.seconds for answer in good])
                statuses = Counter(answer.status for answer in found)
                lines.append({
                    "rows": size, "load": load, "rate": load * capacity,
                    "answered": sum(answer.at < options.seconds for answer in good) / options.seconds,
                    "p50": float(np.quantile(times, 0.5)), "p99": float(np.quantile(times, 0.99)), "wrong": wrong,
                    "429": statuses[429], "503": statuses[503], "lost": statuses[_LOST],
                    "cpu": 1e3 * used / max(1, len(good)),
                })  # fmt: skip
            await client.close()

        asyncio.run(measure())
    (folder / "lines.json").write_text(json.dumps(lines))


def main(options: Options) -> None:
    """Print a table."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        package = options.package or folder / "package"
        text = package.parent / "test.tsv"
        if options.package is None:
            data, text = folder / "data", folder / "raw/test.tsv"
            torchrec_deepfm("synthetic", "--output", folder / "raw", "--rows", options.rows)
            torchrec_deepfm("prepare", "--input", folder / "raw/day_0.tsv", "--output", data, "--min-count", 3)
            torchrec_deepfm("train", "--data", data, "--output", folder / "run", "--recipe", "synthetic",
                            "--epochs", 1, "--factor-dim", 15, "--over-arch-layer-sizes", 400, 400, 400)  # fmt: skip
            torchrec_deepfm("export", "--run", folder / "run", "--output", package, "--to", "onnx")
        from torchrec_deepfm.inference.load import load

        predictor = load(package)
        names = predictor.encoder.raw_schema.names
        frame = pl.read_csv(text, separator="\t", has_header=False, new_columns=names).drop(names[0]).head(6400)
        (folder / "rows.json").write_text(json.dumps(frame.to_dicts()))
        np.save(folder / "expected.npy", predictor.predict(frame))
        command = module_command("torchrec_deepfm", "serve", "--package", package, "--port", 0)
        if options.echo:
            command = module_command("benchmarks.inference.echo_server")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
            assert server.stdout is not None
            port = int(re.search(r":(\d+) ", server.stdout.readline())[1])  # type: ignore[index]
            client = multiprocessing.get_context("spawn").Process(
                target=client_main, args=(port, server.pid, folder, options)
            )
            client.start()
            client.join()
            server.terminate()
            code = server.wait(60)
        if client.exitcode or code not in ((0, -signal.SIGTERM) if options.echo else (0,)):
            sys.exit(f"client {client.exitcode}, server {code}")
        lines = json.loads((folder / "lines.json").read_text())
        head = ("rows", "of capacity", "sent/s", "answered/s", "p50 ms", "p99 ms", "429", "503", "lost", "wrong",
                "CPU ms/answer")  # fmt: skip
        table = [
            (x["rows"], x["load"], f"{x['rate']:,.0f}", f"{x['answered']:,.0f}", f"{x['p50']:.1f}", f"{x['p99']:.1f}",
             x["429"], x["503"], x["lost"], x["wrong"], f"{x['cpu']:.2f}")
            for x in lines
        ]  # fmt: skip
        print(markdown(head, table))


if __name__ == "__main__":
    main(tyro.cli(Options))

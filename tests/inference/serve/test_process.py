"""``serve`` as a process: how it starts, reloads and stops, by sockets and signals; slow clients, a slow model."""

import asyncio
import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from tests.inference.serve.serving import JSON, scenario, serving
from tests.support.fork import Fork
from torchrec_deepfm import load
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.export.export import export
from torchrec_deepfm.inference.load import Predictor
from torchrec_deepfm.inference.serve import server
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.inference.serve.model import ServedModel


def test_stop_and_reload_lose_nothing(
    model: ServedModel, predictor: Predictor, run: Path, frame: pl.DataFrame, tmp_path: Path
) -> None:
    export(run, tmp_path / "package", to="torch-export")
    link = tmp_path / "current"
    link.symlink_to(run)
    rows = frame[:40].to_dicts()
    expected = predictor.predict(frame[:40])

    async def body() -> None:
        async with serving(model, read=lambda: ServedModel(link)) as (client, said):
            answers: list[tuple[int, httpx.Response]] = []
            running = True

            async def ask(place: int) -> None:
                while running:
                    answers.append((place, await client.post("/predict", json={"rows": rows[place : place + 2]})))

            asking = [asyncio.create_task(ask(place)) for place in range(0, 40, 10)]
            for target, line in (("gone", "reload failed, the model before"), ("package", "reloaded")):
                link.unlink()
                link.symlink_to(tmp_path / target)
                os.kill(os.getpid(), signal.SIGHUP)
                while not said[-1].startswith(line):
                    await asyncio.sleep(0.01)
            assert said[1].count("\n") == 0
            for _ in range(10):
                await asyncio.sleep(0.01)
            running = False
            await asyncio.gather(*asking)
            for place, answer in answers:
                assert answer.status_code == 200
                assert answer.json()["probabilities"] == pytest.approx(expected[place : place + 2].tolist(), abs=1e-6)
            assert {answer.json()["model"] for _, answer in answers} >= {model.sha256}
            explained = (await client.post("/explain", json={"rows": rows[:1]})).json()  # by the package
            assert explained["model"] != model.sha256
            assert explained["rows"][0]["probability"] == pytest.approx(expected[0], abs=1e-6)
            # Requests that were sent before SIGTERM are answered after it.
            connected = 0

            async def content() -> AsyncIterator[bytes]:
                nonlocal connected
                connected += 1
                yield json.dumps({"rows": rows}).encode()

            last = [asyncio.create_task(client.post("/predict", content=content(), headers=JSON)) for _ in range(8)]
            while connected < 8:
                await asyncio.sleep(0.01)
            assert (await client.get("/health")).json()["model"] != model.sha256
            os.kill(os.getpid(), signal.SIGTERM)
            for answer in await asyncio.gather(*last):
                assert answer.json()["probabilities"] == pytest.approx(expected.tolist(), abs=1e-6)

    scenario(body)


def test_slow_clients_and_a_slow_model(
    model: ServedModel, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_HEADER_SECONDS", 0.2)
    release = threading.Event()
    answer_now = model.answer
    slow = ServedModel.__new__(ServedModel)
    slow.__dict__ |= model.__dict__

    def answer(batch: Any) -> Any:
        release.wait(20)
        return answer_now(batch)

    slow.answer = answer  # type: ignore[method-assign]
    one = {"rows": frame[:1].to_dicts()}

    async def body() -> None:
        limits = Limits(timeout=0.5, queue_rows=2, batch_rows=1)
        async with serving(slow, limits) as (client, _):
            port = client.base_url.port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /predict HT")
            assert await asyncio.wait_for(reader.read(), 10) == b""  # closed
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            answers = await asyncio.gather(*(client.post("/predict", json=one) for _ in range(8)))
            codes = [one.status_code for one in answers]
            assert sorted(set(codes)) == [429, 503]
            assert codes.count(503) <= 4  # one at the model, and those that the queue holds
            assert {one.headers["retry-after"] for one in answers} == {"1"}
            release.set()
            while (again := await client.post("/predict", json=one)).status_code != 200:
                await asyncio.sleep(0.05)
            assert len(again.json()["probabilities"]) == 1

    scenario(body)


def test_bad_starts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, message in (
            ([], "--run, --package: name one of the two"),
            (["--package", str(tmp_path)], "not a package"),
            (["--run", str(tmp_path)], "not a run folder"),
            (["--run", str(run), "--port", "70000"], "--port 70000: must be 0 to 65,535"),
            (["--run", str(run), "--port", str(taken.getsockname()[1])], "can't listen there"),
            (["--run", str(run), "--host", "no such host"], "can't listen there"),
            (["--run", str(run), "--threads", "0"], "--threads 0: must be at least 1"),
            (["--run", str(run), "--queue-rows", "0"], "--queue-rows 0: must be 1 to"),
        ):
            with pytest.raises(SystemExit) as stop:
                main(["serve", *words])
            assert stop.value.code == 2
            assert message in (said := capsys.readouterr().err)
            assert said.count("\n") == 1
    monkeypatch.delitem(sys.modules, "torchrec_deepfm.inference.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        main(["serve", "--run", str(run)])
    assert "uvicorn is not installed; pip install 'torchrec_deepfm[serve]'" in capsys.readouterr().err


def test_a_model_without_numbers_is_not_served(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(run)
    broken = Predictor(
        path=run, sha256="0" * 64, encoder=found.encoder, score=lambda rows: np.full(len(rows), np.nan, np.float32)
    )
    monkeypatch.setattr("torchrec_deepfm.inference.serve.model.load", lambda *args, **options: broken)
    with pytest.raises(UserError, match="can't score a row of missing values"):
        ServedModel(run)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_commands_of_the_page(run: Path, onnx: Path, tmp_path: Path) -> None:
    """docs/inference.md's service, in a process of its own, on a free port."""
    page = (Path(__file__).parents[3] / "docs" / "inference.md").read_text()
    [block] = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    start, predict, health = block.splitlines()
    shutil.copytree(onnx, tmp_path / "package")
    python, module, *words = start.replace("8000", "0").split()
    assert (python, module) == ("python", "-m")
    log, until = tmp_path / "log", time.monotonic() + 60
    process = Fork(words, env=os.environ, cwd=tmp_path, stdout=log, stderr=log)
    try:
        while not (place := re.search(r"on http://127.0.0.1:(\d+)", log.read_text() if log.exists() else "")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)
        said = [
            json.loads(
                subprocess.run(line.replace("8000", place[1]), shell=True, capture_output=True, check=True).stdout
            )
            for line in (predict, health)
        ]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
    row = {"row": 3, "noise": 0.5, "user": "1f", "item": "2a", "shop": None}
    assert said[0]["probabilities"] == pytest.approx(load(run).predict([row]).tolist(), abs=1e-6)
    assert said[1] == {"status": "ok", "model": load(tmp_path / "package").sha256, "path": "package"}


def test_an_answer_does_not_wait_for_acknowledgements():
    """Head and body of an answer are two packets; with Nagle's algorithm the second one waits."""
    with server._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_reload_waits_for_a_request_whose_body_is_under_way(
    model: ServedModel, predictor: Predictor, run: Path, frame: pl.DataFrame
) -> None:
    """The model that took its head answers it, though another one answers the requests that come meanwhile."""
    body = json.dumps({"rows": frame[:2].to_dicts()}).encode()
    other = ServedModel(run, checkpoint="28")

    async def check() -> None:
        async with serving(model, read=lambda: other) as (client, said):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            writer.write(b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
            assert b" 100 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)  # the model has it
            os.kill(os.getpid(), signal.SIGHUP)
            while (await client.get("/health")).json()["model"] != other.sha256:
                await asyncio.sleep(0.01)
            writer.write(body)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            assert b" 200 " in head.splitlines()[0]
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            answer = json.loads(await reader.readexactly(length))
            writer.close()
            assert answer["model"] == model.sha256
            assert answer["probabilities"] == pytest.approx(predictor.predict(frame[:2]).tolist(), abs=1e-6)
            while not said[-1].startswith("reloaded"):
                await asyncio.sleep(0.01)

    scenario(check)


def test_a_full_queue_refuses_before_the_body(
    model: ServedModel, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusing costs no parsing and no connection; other routes are answered."""
    release, answer_now = threading.Event(), model.answer
    slow = ServedModel.__new__(ServedModel)
    slow.__dict__ |= model.__dict__
    slow.answer = lambda batch: answer_now(batch) if release.wait(20) else []  # type: ignore[method-assign]
    one = {"rows": frame[:1].to_dicts()}

    async def body() -> None:
        async with serving(slow, Limits(queue_requests=2, batch_rows=1)) as (client, _):
            taken = [asyncio.create_task(client.post("/predict", json=one)) for _ in range(2)]
            while "deepfm_waiting_rows 1.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            for path, content in (("/predict", b"not JSON"), ("/explain", b"not JSON"), ("/predict", b"x" * 100_000)):
                answer = await client.post(path, content=content, headers=JSON)
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
                assert "connection" not in answer.headers
            assert (await client.get("/health")).status_code == 200
            release.set()
            assert {answer.status_code for answer in await asyncio.gather(*taken)} == {200}
            assert (await client.post("/predict", json=one)).status_code == 200

    scenario(body)


def test_headers_that_are_too_long(model: ServedModel) -> None:
    """They end the connection though they never end; those of a usual length do not."""

    async def body() -> None:
        async with serving(model) as (client, _):
            for size, status in ((server._HEADER_BYTES // 2, b"200"), (2 * server._HEADER_BYTES, b"400")):
                reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size)
                if status == b"200":
                    await asyncio.sleep(0.1)
                    writer.write(b"\r\nConnection: close\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):  # where the server leaves some of it unread
                    assert (await asyncio.wait_for(reader.read(), 10)).split()[1] == status
                writer.close()

    scenario(body)


def test_refusals_keep_a_connection_in_order(model: ServedModel, frame: pl.DataFrame) -> None:
    """While the queue is full, a body that comes late is skipped, and the next request is answered after it."""
    release, answer_now = threading.Event(), model.answer
    slow = ServedModel.__new__(ServedModel)
    slow.__dict__ |= model.__dict__
    slow.answer = lambda batch: answer_now(batch) if release.wait(20) else []  # type: ignore[method-assign]
    one = json.dumps({"rows": frame[:1].to_dicts()}).encode()

    async def body() -> None:
        async with serving(slow, Limits(queue_requests=1)) as (client, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            kind = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(one)
            post = b"POST /predict?x=1 HTTP/1.1\r\n" + kind

            async def answered() -> tuple[int, bytes]:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                length = re.search(rb"content-length: (\d+)", head)
                return int(head[9:12]), await reader.readexactly(int(length[1]) if length else 0)

            taken = asyncio.create_task(client.post("/predict", content=one, headers=JSON))
            while "deepfm_waiting_rows 0.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            writer.write(post + b"\r\n" + one[:7])
            status, why = await answered()
            assert status == 429
            assert json.loads(why)["detail"][0]["message"].startswith("too many rows")
            writer.write(one[7:] + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + post + b"\r\n" + one)
            assert (await answered())[0] == 200
            assert (await answered())[0] == 429
            release.set()
            assert (await taken).status_code == 200
            writer.write(post + b"Connection: close\r\n\r\n" + one)
            assert (await answered())[0] == 200
            assert await reader.read() == b""
            counted = (await client.get("/metrics")).text
            assert 'deepfm_requests_total{path="/predict",status="429"} 2.0' in counted

    scenario(body)


def test_a_connection_too_many_waits(model: ServedModel, frame: pl.DataFrame) -> None:
    """Until one of the others ends; those are answered meanwhile."""
    one = json.dumps({"rows": frame[:1].to_dicts()}).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    async def body() -> None:
        async with serving(model, Limits(max_connections=2)) as (client, _):
            streams = [await asyncio.open_connection("127.0.0.1", client.base_url.port) for _ in range(5)]

            async def ask(number: int) -> int:
                reader, writer = streams[number]
                writer.write(head % len(one) + one)
                answer = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.findall(rb"content-length: (\d+)", answer)[0]))
                return int(answer[9:12])

            waiting = [asyncio.create_task(ask(number)) for number in (2, 3, 4)]
            for _ in range(2):
                assert [await asyncio.wait_for(ask(number), 10) for number in (0, 1)] == [200, 200]
            assert not any(task.done() for task in waiting)
            for number, task in enumerate(waiting):  # one at a time, in the order of the connections
                streams[number][1].close()
                assert await asyncio.wait_for(task, 10) == 200
                assert [other.done() for other in waiting] == [True] * (number + 1) + [False] * (2 - number)
            streams[3][1].close()  # for the client's own

    scenario(body)


def test_a_want_of_files_ends_no_service(
    model: ServedModel, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that the system does not let it accept wait, and are answered."""
    refused: list[int] = []

    async def body() -> None:
        loop = asyncio.get_running_loop()
        accept_now = loop.sock_accept

        async def accept(listener: socket.socket) -> tuple[socket.socket, object]:
            if len(refused) < 2:
                refused.append(errno.EMFILE)
                raise OSError(errno.EMFILE, "Too many open files")
            return await accept_now(listener)

        monkeypatch.setattr(loop, "sock_accept", accept)
        async with serving(model, Limits(max_connections=1)) as (client, _):
            assert (await client.get("/health")).status_code == 200

    scenario(body)
    assert len(refused) == 2


def test_connections_within_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[int] = [1024, 2048]
    said: list[str] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: now.__setitem__(slice(None), limits))
    assert server._within_open_files(Limits(max_connections=1000), said.append).max_connections == 1000
    assert now == [1256, 2048]
    assert said == []
    assert server._within_open_files(Limits(), said.append).max_connections == 2048 - 256
    assert now == [2048, 2048]
    assert "1,792 connections" in said[0]

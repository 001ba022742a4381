"""``serve``: answers equal ``predict``'s; what it refuses; how it starts, reloads and stops, by sockets and signals."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.inference.test_load import read_raw
from torchrec_deepfm import load
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.export import export
from torchrec_deepfm.inference.load import Predictor
from torchrec_deepfm.inference.serve import server
from torchrec_deepfm.inference.serve.arrow_rows import STREAM, read_stream
from torchrec_deepfm.inference.serve.batching import Batcher, QueueFullError
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.inference.serve.model import ServedModel
from torchrec_deepfm.inference.serve.rows import JsonRows, RequestError, columns_of

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(run: Path) -> ServedModel:
    return ServedModel(run)


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load(run)


@pytest.fixture(scope="module")
def frame(run_data: PreparedData) -> pl.DataFrame:
    return read_raw(run_data.folder.parent / "test.tsv").drop("label")


@contextlib.asynccontextmanager
async def serving(
    model: ServedModel, limits: Limits | None = None, read: Callable[[], ServedModel] | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """A server in this process, and its lines; it is stopped by SIGTERM."""
    said: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    again = read or (lambda: model)
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


def test_answers_are_those_of_predict(model: ServedModel, predictor: Predictor, frame: pl.DataFrame) -> None:
    expected = predictor.predict(frame)
    assert expected.std() > 0.01
    rows = frame.to_dicts()

    async def body() -> None:
        async with serving(model, Limits(batch_wait_ms=20)) as (client, _):
            slices = [(start, start + 1 + start % 5) for start in range(0, 60, 3)]
            requests = [client.post("/predict", json={"rows": rows[first:last]}) for first, last in slices]
            for (first, last), answer in zip(slices, await asyncio.gather(*requests), strict=True):
                assert answer.status_code == 200
                assert answer.json()["probabilities"] == pytest.approx(expected[first:last].tolist(), abs=1e-6)
                assert answer.json()["model"] == predictor.sha256
            answer = await client.post("/predict", content=stream(frame.to_arrow()), headers={"Content-Type": STREAM})
            assert answer.headers["content-type"] == STREAM
            found = pa.ipc.open_stream(answer.content).read_all()
            assert found.schema == pa.schema({"probability": pa.float32()})
            assert np.abs(found["probability"].to_numpy() - expected).max() <= 1e-6
            metrics = {
                (sample.name, sample.labels.get("path"), sample.labels.get("status")): sample.value
                for family in text_string_to_metric_families((await client.get("/metrics")).text)
                for sample in family.samples
            }
            assert metrics["deepfm_requests_total", "/predict", "200"] == len(slices) + 1
            assert metrics["deepfm_batch_rows_sum", None, None] == len(frame) + sum(b - a for a, b in slices)
            assert metrics["deepfm_batch_rows_count", None, None] < len(slices)  # they were scored together

    scenario(body)


def test_explain(model: ServedModel, predictor: Predictor, frame: pl.DataFrame) -> None:
    async def body() -> None:
        async with serving(model) as (client, _):
            answer = (await client.post("/explain", json={"rows": frame[:3].to_dicts()})).json()
            assert (await client.get("/health")).json() == {
                "status": "ok",
                "model": predictor.sha256,
                "path": model.name,
            }
        expected = predictor.predict(frame[:3])
        for row, probability in zip(answer["rows"], expected.tolist(), strict=True):
            logit = row["bias"] + row["deep"] + sum(field["contribution"] for field in row["fields"])
            assert 1 / (1 + np.exp(-logit)) == pytest.approx(probability, abs=1e-6)
            assert row["probability"] == pytest.approx(probability, abs=1e-6)
            assert [field["field"] for field in row["fields"]] == ["row", "noise", "user", "item", "shop"]
            halves = {field["field"]: field["first_order"] for field in row["fields"]}
            for pair in row["pairs"]:  # all ten of them
                for name in (pair["field"], pair["other_field"]):
                    halves[name] += pair["contribution"] / 2
            assert halves == pytest.approx({f["field"]: f["contribution"] for f in row["fields"]}, abs=1e-6)

    scenario(body)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "recursion limit"),
        (b"\xff\xfe", 400, "not valid JSON"),
        ({}, 422, 'expected {"rows"'),
        ({"rows": []}, 422, "rows is empty"),
        ({"rows": [5]}, 422, "row 1: expected an object"),
        ({"rows": [{"noise": "x"}]}, 422, "row 1, 'noise': expected a finite number, or null, not 'x'"),
        ({"rows": [{"noise": float("nan")}]}, 422, "row 1, 'noise': expected a finite number"),
        ({"rows": [{}, {"noise": 10**400}]}, 422, "row 2, 'noise': expected a finite number"),
        ({"rows": [{"user": "g"}]}, 422, "row 1, 'user': expected a text of at most 8 hexadecimal digits"),
        ({"rows": [{"user": "0" * 10_000}]}, 422, "row 1, 'user': expected a text of at most 8"),
        ({"rows": [{"user": ["1"]}]}, 422, "row 1, 'user': expected a text"),
        ({"rows": [{}, {"price": 3}]}, 422, "row 2, 'price': unknown column"),
        ({"rows": [{"user": "..."}, {}]}, 422, "row 1, 'user'"),
        ({"rows": [{}] * 101}, 413, "more than 100 rows"),
        (b" " * 300_000, 413, "larger than 0.25 MiB"),
    ],
)
def test_refusals(model: ServedModel, frame: pl.DataFrame, content: Any, status: int, message: str) -> None:
    if isinstance(content, dict):
        good = frame[:1].to_dicts()[0]
        rows = [good | row if isinstance(row, dict) else row for row in content.get("rows", [])]
        content = json.dumps({"rows": rows} if "rows" in content else content).encode()

    async def body() -> None:
        async with serving(model, Limits(max_rows=100, max_body_mb=0.25)) as (client, _):
            answer = await client.post("/predict", content=content, headers=JSON)
            assert answer.status_code == status
            first = answer.json()["detail"][0]
            where = "" if first["row"] is None else f"row {first['row']}"
            where += "" if first["column"] is None else f", {first['column']!r}"
            assert message in f"{where}: {first['message']}"

            async def chunks() -> AsyncIterator[bytes]:
                yield content

            answer = await client.post("/predict", content=chunks(), headers=JSON)  # of a length that is not announced
            assert answer.status_code == status

    scenario(body)


def test_a_missing_column_is_named(model: ServedModel, frame: pl.DataFrame) -> None:
    async def body() -> None:
        async with serving(model) as (client, _):
            answer = await client.post("/predict", json={"rows": frame[:2].drop("item").to_dicts()})
            assert [(one["row"], one["column"]) for one in answer.json()["detail"]] == [(1, "item"), (2, "item")]
            for headers, status in (
                ({"Content-Type": "text/plain"}, 415),
                (JSON | {"Content-Encoding": "gzip"}, 415),
                (JSON | {"Host": "evil.example"}, 400),
            ):
                assert (await client.post("/predict", content=b"{}", headers=headers)).status_code == status
            assert (await client.get("/predict")).status_code == 405
            assert (await client.get("/../etc/passwd")).status_code == 404

    scenario(body)


def test_a_bad_row_spoils_no_other_request(
    model: ServedModel, predictor: Predictor, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the encoder refuses comes back to its own request, though both share a batch."""
    read = type(predictor.encoder).encode

    def refuse_third(self: RowEncoder, table: Any, *, on_bad_row: Any = "error") -> Any:
        found = read(self, table.slice(0, 2) if len(table) == 4 else table, on_bad_row=on_bad_row)
        return found if len(table) != 4 else dataclass_with_bad(found, read(self, table.slice(3), on_bad_row="skip"))

    def dataclass_with_bad(first: Any, last: Any) -> Any:
        return type(first)(
            dense=np.concatenate([first.dense, last.dense]), sparse=np.concatenate([first.sparse, last.sparse]),
            bags={}, bad={2: "column 'user': 'x' is strange"},
        )  # fmt: skip

    monkeypatch.setattr(RowEncoder, "encode", refuse_third)
    rows = frame[:4].to_dicts()

    async def body() -> None:
        async with serving(model, Limits(batch_wait_ms=200, batch_rows=4)) as (client, _):
            good, bad = await asyncio.gather(
                client.post("/predict", json={"rows": rows[:2]}), client.post("/predict", json={"rows": rows[2:]})
            )
            assert good.json()["probabilities"] == pytest.approx(predictor.predict(frame[:2]).tolist(), abs=1e-6)
            assert bad.status_code == 422
            assert bad.json()["detail"] == [{"message": "column 'user': 'x' is strange", "row": 1, "column": None}]

    scenario(body)


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
            last = [asyncio.create_task(client.post("/predict", json={"rows": rows})) for _ in range(8)]
            while (await client.get("/health")).json()["model"] == model.sha256:
                await asyncio.sleep(0.01)
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


def test_openapi_has_the_columns(model: ServedModel, frame: pl.DataFrame) -> None:
    async def body() -> None:
        async with serving(model) as (client, _):
            found = (await client.get("/openapi.json")).json()
        content = found["paths"]["/predict"]["post"]["requestBody"]["content"]
        schemas = found["components"]["schemas"]

        def follow(reference: dict[str, str]) -> Any:
            return schemas[reference["$ref"].removeprefix("#/components/schemas/")]

        rows = follow(content["application/json"]["schema"])["properties"]["rows"]
        row = follow(rows["items"])
        assert (rows["minItems"], rows["maxItems"]) == (1, 4096)
        assert row["required"] == list(row["properties"]) == frame.columns
        assert {"type": "number"} in row["properties"]["noise"]["anyOf"]
        assert not row["additionalProperties"]
        assert "422" in found["paths"]["/predict"]["post"]["responses"]
        assert STREAM in content

    scenario(body)


def test_batches() -> None:
    """Order, size, keys, and that one payload's error is its own."""
    seen: list[list[int]] = []
    go = threading.Event()

    def call(payloads: Any) -> list[Any]:
        go.wait(20)
        seen.append(list(payloads))
        return [ValueError(str(one)) if one == 5 else one * 10 for one in payloads]

    async def body() -> None:
        batcher = Batcher(call, rows=4, wait=0.02, queue_rows=12)
        first = asyncio.create_task(batcher.submit(0, 1, "a"))
        await asyncio.sleep(0.1)  # it is at the model now
        rest = [asyncio.create_task(batcher.submit(n, 2, "b" if n == 4 else "a")) for n in range(1, 7)]
        alone = asyncio.create_task(batcher.submit(7, 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert isinstance((await asyncio.gather(alone, return_exceptions=True))[0], QueueFullError)
        rest[1].cancel()
        go.set()
        assert await first == 0
        found = await asyncio.gather(*rest, return_exceptions=True)
        await batcher.close()
        assert [found[0], *found[2:4], found[5]] == [10, 30, 40, 60]
        assert str(found[4]) == "5"
        assert seen == [[0], [1, 3], [4], [5, 6]]

    scenario(body)


@pytest.fixture(scope="module")
def table_encoder(tmp_path_factory: pytest.TempPathFactory) -> RowEncoder:
    """Every kind of column, hashed."""
    folder = tmp_path_factory.mktemp("kinds")
    schema = Schema(
        label="y", numeric=("x",), categorical=("text", "whole", "tags", "cut", "hour", "day", "both"), layout="table",
        columns={
            "hour": Column(of="at", part="hour"), "day": Column(of="seconds", part="weekday", format="s"),
            "both": Column(cross=("text", "whole")),
            "whole": Column(type="integer"), "tags": Column(list=True, weights="w", type="integer"),
            "cut": Column(list=True, separator="|", type="string"),
        },
    )  # fmt: skip
    frame = pl.DataFrame(
        {"y": [0, 1, 1], "x": [1.5, 2.0, None], "text": ["a", "b", None], "whole": [1, 2, 3],
         "tags": [[1], [2, 3], []], "w": [[1.0], [0.5, 2.0], []], "cut": ["p|q", "", None],
         "at": ["2024-01-01 05:00:00"] * 3, "seconds": [1.7e9, 0.0, None]}
    )  # fmt: skip
    frame.write_parquet(folder / "raw.parquet")
    data = prepare(
        [folder / "raw.parquet"], folder / "data", schema=schema, split="none", hash=True, num_embeddings=(999,)
    )
    RowEncoder.save(data, folder / "encoder")
    return RowEncoder.open(folder / "encoder")


def test_every_kind_of_column(table_encoder: RowEncoder) -> None:
    """JSON and Arrow give the ids that the encoder gives for the same Python values."""
    rows = [
        {
            "x": 3,
            "text": "a",
            "whole": 7,
            "tags": [4, 5],
            "w": [1, 0.25],
            "cut": "p|z",
            "at": "2024-05-06 07:08:09",
            "seconds": 1715000000,
        },
        {"x": None, "text": None, "whole": None, "tags": None, "w": None, "cut": None, "at": None, "seconds": None},
        {
            "x": 1e9,
            "text": "12",
            "whole": -(2**63),
            "tags": [],
            "w": [],
            "cut": "q",
            "at": "2024-05-07",
            "seconds": 1715100000,
        },
    ]
    columns = columns_of(table_encoder)
    odd = [dict(row) for row in rows]
    odd[0] |= {"whole": "7", "cut": "p|z"}
    odd[0]["seconds"] = 1715000000.0
    odd[2] |= {"text": 12, "whole": str(-(2**63))}
    expected = table_encoder.encode(rows)
    table = JsonRows(columns, 9).read(json.dumps({"rows": odd}).encode())
    streamed = read_stream(stream(pa.Table.from_pylist(rows)), columns, 9)
    views = read_stream(polars_stream(pl.DataFrame(pa.Table.from_pylist(rows))), columns, 9)
    coded = pa.Table.from_pylist(rows)
    coded = coded.set_column(coded.schema.get_field_index("text"), "text", coded["text"].dictionary_encode())
    timed = pa.Table.from_pylist(rows)
    place = timed.schema.get_field_index("at")
    stamps = pa.array([None if row["at"] is None else datetime.fromisoformat(row["at"]) for row in rows])
    timed = read_stream(stream(timed.set_column(place, "at", stamps)), columns, 9)
    for given in (table, streamed, views, timed, read_stream(stream(coded), columns, 9)):
        found = table_encoder.encode(given)
        assert found.dense.tolist() == expected.dense.tolist()
        assert found.sparse.tolist() == expected.sparse.tolist()
        for name in ("tags", "cut"):
            assert found.bags[name].ids.tolist() == expected.bags[name].ids.tolist()
            assert found.bags[name].lengths.tolist() == expected.bags[name].lengths.tolist()
    assert found.bags["tags"].weights is not None
    assert found.bags["tags"].weights.tolist() == [1, 0.25]
    lists = JsonRows(columns, 9).read(json.dumps({"rows": [rows[0] | {"cut": ["p", "z"]}]}).encode())
    assert table_encoder.encode(lists).bags["cut"].ids.tolist() == expected.bags["cut"].ids[:2].tolist()
    for change, message in (
        ({"whole": "9223372036854775808"}, "expected an integer of 64 bits, or null, not '9223372036854775808'"),
        ({"whole": 1.5}, "expected an integer of 64 bits, or null, not 1.5"),
        ({"tags": ["9" * 19]}, "each an integer of 64 bits"),
        ({"tags": [1] * 1025}, "a list of at most 1,024 values"),
        ({"text": "a" * 1025}, "a text of at most 1,024 characters"),
        ({"text": 1.5}, "a text of at most"),
        ({"at": 5}, "a time as text"),
        ({"w": [1e999, 1]}, "each a finite number"),
    ):
        with pytest.raises(RequestError) as refused:
            JsonRows(columns, 9).read(json.dumps({"rows": [rows[0] | change]}).encode())
        assert refused.value.status == 422
        assert message in str(refused.value)
        assert (refused.value.faults[0].row, refused.value.faults[0].column) == (1, next(iter(change)))
    with pytest.raises(RequestError, match="is text, where other rows hold a list"):
        JsonRows(columns, 9).read(json.dumps({"rows": [rows[0], rows[0] | {"cut": ["p"]}]}).encode())


def polars_stream(frame: pl.DataFrame) -> bytes:
    sink = io.BytesIO()
    frame.write_ipc_stream(sink)
    return sink.getvalue()


def test_arrow_bombs(table_encoder: RowEncoder) -> None:
    """A small stream that unfolds to a lot, or points outside itself."""
    columns = columns_of(table_encoder)
    good = pa.table(
        {"x": [1.0], "text": ["a"], "whole": [1], "tags": [[1]], "w": [[1.0]], "cut": ["p"], "at": ["2024-05-06"],
         "seconds": [0]}
    )  # fmt: skip

    def replaced(name: str, array: Any) -> pa.Table:
        rows = good.take(np.zeros(len(array), np.int64)).combine_chunks()
        return rows.set_column(rows.schema.get_field_index(name), name, array)

    def refused(body: bytes, most: int = 10**9) -> RequestError:
        with pytest.raises(RequestError) as found:
            read_stream(body, columns, most)
        return found.value

    for codec in ("lz4", "zstd"):
        assert "compressed" in str(refused(stream(good, codec)))
    # Only the dictionary is compressed: Arrow leaves empty bodies alone.
    coded = pa.DictionaryArray.from_arrays(pa.array([None], pa.int8()), pa.array(["a" * 100]))
    assert "compressed" in str(refused(stream(replaced("text", coded), "zstd")))
    assert "more than 3 rows" in str(refused(stream(replaced("x", pa.nulls(4))), 3))
    long = pa.array(["a" * 4000])
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int8)), long)
    assert "64 MiB of text" in str(refused(stream(replaced("text", shared))))
    inside = pa.LargeListArray.from_arrays(np.arange(0, 20_001, 1000), shared)
    assert "64 MiB of text" in str(refused(stream(replaced("tags", inside))))
    view = pa.concat_arrays([long.cast(pa.string_view())])
    words = np.tile(np.frombuffer(view.buffers()[1], np.int32), 20_000)
    views = pa.Array.from_buffers(pa.string_view(), 20_000, [None, pa.py_buffer(words), *view.buffers()[2:]])
    assert "64 MiB of text" in str(refused(stream(replaced("text", views))))
    assert "a longer text" in str(refused(stream(replaced("text", pa.array(["a" * 5000])))))
    assert "a longer list" in str(refused(stream(replaced("tags", pa.array([[1] * 2000])))))
    overlapping = pa.ListViewArray.from_arrays([0, 0], [1000, 1000], pa.array(np.arange(1000)))
    assert "not Arrow's" in str(refused(stream(replaced("tags", overlapping))))
    wide = pa.FixedSizeListArray.from_arrays(pa.nulls(1000), 1000)
    assert "not Arrow's" in str(refused(stream(replaced("tags", wide))))
    assert "'x'" not in str(refused(stream(good.drop_columns("x"))))
    assert refused(stream(good.drop_columns("x"))).faults[0].column == "x"
    assert refused(stream(good.append_column("zz", pa.array([1])))).faults[0].column == "zz"
    assert refused(outside(good)).status == 400
    content = stream(good)
    assert refused(b"").status == refused(content[:100]).status == refused(b"\0" * 64).status == 400
    generator = np.random.default_rng(0)
    for _ in range(300):  # damaged anywhere: refused or read, never a crash
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            damaged[place] = generator.integers(0, 256)
        with contextlib.suppress(RequestError):
            read_stream(bytes(damaged), columns, 10)


def outside(table: pa.Table) -> bytes:
    """A stream with a text of a gigabyte, by its offsets, which Arrow's reader does not follow."""
    content = stream(table.set_column(table.schema.get_field_index("text"), "text", pa.array(["a" * 77])))
    honest, lying = (np.array([0, end], np.int32).tobytes() for end in (77, 2**30))
    place = content.rindex(honest)
    return content[:place] + lying + content[place + len(lying) :]


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
def test_the_commands_of_the_page(run: Path, tmp_path: Path) -> None:
    """docs/inference.md's service, in a process of its own, on a free port."""
    page = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    [block] = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    start, predict, health = block.splitlines()
    export(run, tmp_path / "package", to="onnx")
    words = start.replace("8000", "0").split()[1:]
    with subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = re.search(r"on http://127.0.0.1:(\d+)", process.stdout.readline())[1]  # type: ignore[index]
            said = [
                json.loads(
                    subprocess.run(line.replace("8000", port), shell=True, capture_output=True, check=True).stdout
                )
                for line in (predict, health)
            ]
            process.send_signal(signal.SIGTERM)
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

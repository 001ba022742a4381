"""``serve``: answers equal ``predict``'s; what it refuses; batches; the description of its routes."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.inference.serve.serving import JSON, scenario, serving, stream
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.inference.load import Predictor
from torchrec_deepfm.inference.serve.arrow_rows import STREAM
from torchrec_deepfm.inference.serve.batching import Batcher, QueueFullError
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.inference.serve.model import ServedModel, Work


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


REFUSED: list[tuple[Any, int, str]] = [
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
]


def test_refusals(model: ServedModel, frame: pl.DataFrame) -> None:
    good = frame[:1].to_dicts()[0]

    async def body() -> None:
        async with serving(model, Limits(max_rows=100, max_body_mb=0.25)) as (client, _):
            for given, status, message in REFUSED:
                content = given
                if isinstance(given, dict):
                    rows = [good | row if isinstance(row, dict) else row for row in given.get("rows", [])]
                    content = json.dumps({"rows": rows} if "rows" in given else given).encode()
                answer = await client.post("/predict", content=content, headers=JSON)
                first = answer.json()["detail"][0]
                where = "" if first["row"] is None else f"row {first['row']}"
                where += "" if first["column"] is None else f", {first['column']!r}"
                said = f"{where}: {first['message']}"
                assert message in said
                assert answer.status_code == status, said

                async def chunks(content: bytes = content) -> AsyncIterator[bytes]:
                    yield content

                # Of a length that is not announced:
                answer = await client.post("/predict", content=chunks(), headers=JSON)
                assert answer.status_code == status, said

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


def test_requests_of_a_batch_that_do_not_fit_together_are_answered_apart(
    model: ServedModel, predictor: Predictor, frame: pl.DataFrame
) -> None:
    """A number that no Arrow column holds is found when the rows of a batch become one table."""
    columns = (*model.columns[:-1], replace(model.columns[-1], kind="integer"))
    name = columns[-1].name
    row = frame[:1].to_dicts()[0] | {name: None}
    odd = copy(model)
    odd.columns = columns
    good, bad = odd.answer([Work(rows=[row]), Work(rows=[row | {name: "9" * 19}])])
    assert good.tolist() == pytest.approx(predictor.predict([row]).tolist(), abs=1e-6)
    assert (bad.status, bad.faults[0].row, bad.faults[0].column) == (422, 1, name)


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

"""The routes of the service, for one model."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Hashable
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any, Final

import jinja2
import msgspec
import pyarrow as pa
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from torchrec_deepfm.inference.serve.arrow_rows import STREAM, read_stream
from torchrec_deepfm.inference.serve.batching import Batcher, QueueFullError
from torchrec_deepfm.inference.serve.limits import Limits
from torchrec_deepfm.inference.serve.metrics import ServiceMetrics
from torchrec_deepfm.inference.serve.model import ServedModel, Work, parts
from torchrec_deepfm.inference.serve.rows import Fault, JsonRows, RequestError, Row

EXPLAIN_ROWS: Final = 100
_PAIRS: Final = 20
_BODIES: Final = 16  # of the largest size, held at once
# A page that the browser lets load nothing, run no other script, and stand in no frame.
_POLICY: Final = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE: Final = jinja2.Environment(autoescape=True).from_string(
    (resources.files(__package__) / "page.html.j2").read_text("utf-8")
)
_RETRY: Final = {"Retry-After": "1"}
QUEUED: Final = frozenset(("/predict", "/explain"))


class Prediction(BaseModel):
    """Click probabilities in the order of the rows, and the digest of the model."""

    probabilities: list[Annotated[float, Field(ge=0, le=1)]]
    model: str


class FieldPart(BaseModel):
    """What a field adds to a logit: its first order, and with half of its pairs its contribution."""

    field: str
    value: str
    first_order: float
    contribution: float


class PairPart(BaseModel):
    """What a pair of fields adds to a logit."""

    field: str
    other_field: str
    contribution: float


class RowParts(BaseModel):
    """logit = bias + deep + the sum of the fields' contributions; the strongest pairs are listed too."""

    probability: float
    logit: float
    bias: float
    deep: float
    fields: list[FieldPart]
    pairs: list[PairPart]


class ExplainResponse(BaseModel):
    """The rows taken apart, and the digest of the model."""

    rows: list[RowParts]
    model: str


class Health(BaseModel):
    """What is served."""

    status: str
    model: str
    path: str


class Problem(BaseModel):
    """What is wrong, where: row from 1, column by name."""

    message: str
    row: int | None = None
    column: str | None = None


class Problems(BaseModel):
    """Why a request was refused."""

    detail: list[Problem]


def make_app(model: ServedModel, batcher: Batcher, limits: Limits, metrics: ServiceMetrics) -> ASGIApp:
    """Build the application of a model, which ``batcher`` calls; ``metrics`` counts."""
    # Swagger's and ReDoc's pages would load scripts from elsewhere.
    app = FastAPI(title="DeepFM", version=model.sha256[:12], docs_url=None, redoc_url=None)
    rows = JsonRows(model.columns, limits.max_rows)
    few = JsonRows(model.columns, min(EXPLAIN_ROWS, limits.max_rows))
    held = 0

    async def body_of(request: Request) -> bytes:
        nonlocal held
        most, found = int(limits.max_body_mb * 2**20), bytearray()
        too_large = RequestError(413, Fault(f"the body is larger than {limits.max_body_mb:g} MiB; send fewer rows"))
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > most:
            raise too_large
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, Fault("a compressed body is not taken; send it without Content-Encoding"))
        before = 0
        try:
            async for chunk in request.stream():
                found += chunk
                held, before = held + len(chunk), before + len(chunk)
                if len(found) > most:
                    raise too_large
                if held > _BODIES * most:
                    raise QueueFullError
        finally:
            held -= before
        return bytes(found)

    async def rows_of(request: Request, reader: JsonRows) -> tuple[pa.Table | list[Row], Hashable]:
        """The rows of a request, and what those have in common that may share its batch."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == STREAM and reader is rows:
            table = read_stream(await body_of(request), model.columns, limits.max_rows)
            return table, table.schema
        if kind == "application/json":
            found = reader.read(await body_of(request))
            return found, reader.form(found)
        arrow = f" or {STREAM}" if reader is rows else ""
        raise RequestError(415, Fault(f"Content-Type is {kind or 'absent'}; expected application/json{arrow}"))

    async def answered(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
        """An answer within the time limit, or the error in its place."""
        try:
            async with asyncio.timeout(limits.timeout):
                return await answer()
        except RequestError as error:
            return _problems(error.status, *error.faults)
        except QueueFullError:
            return refusal()
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        except TimeoutError:
            if not getattr(request.state, "read", False):
                return _problems(408, Fault(f"the body was not there within {limits.timeout:g} s"))
            return _problems(503, Fault(f"not answered within {limits.timeout:g} s; try again later"), headers=_RETRY)

    @app.post("/predict", response_model=Prediction, responses=_responses(413, 415, 422, 429, 503))
    async def predict(request: Request) -> Response:
        """Predict the click probabilities of rows; the answer to an Arrow stream is one with ``probability``."""

        async def answer() -> Response:
            given, key = await rows_of(request, rows)
            request.state.read = True
            scores = await batcher.submit(Work(rows=given), len(given), key)
            if request.headers.get("content-type", "").startswith(STREAM):
                found = pa.table({"probability": scores})
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, found.schema) as stream:
                    stream.write_table(found)
                return Response(sink.getvalue().to_pybytes(), media_type=STREAM)
            return _json({"probabilities": scores.tolist(), "model": model.sha256})

        return await answered(request, answer)

    @app.post("/explain", response_model=ExplainResponse, responses=_responses(413, 415, 422, 429, 503))
    async def explain(request: Request) -> Response:
        """Take the logits of up to 100 rows apart: bias, fields, pairs of fields, deep part."""

        async def answer() -> Response:
            given, _ = await rows_of(request, few)
            request.state.read = True
            found = await batcher.submit(Work(rows=given, explain=True), len(given))
            listed = [parts(found, row, _PAIRS) for row in range(len(given))]
            return _json({"rows": listed, "model": model.sha256})

        return await answered(request, answer)

    @app.get("/", response_class=Response)
    async def page() -> Response:
        """A page to try a row."""
        nonce = secrets.token_urlsafe(16)
        text = _PAGE.render(columns=model.columns, name=model.name, sha256=model.sha256, nonce=nonce)
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": _POLICY.format(nonce)})

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Which model answers."""
        return _json({"status": "ok", "model": model.sha256, "path": model.name})

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counts and times, in Prometheus' text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def openapi() -> dict[str, Any]:
        """The description of the routes, with the columns of this model."""
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, reader in (("/predict", rows), ("/explain", few)):
                name = path[1:].title() + "Rows"
                schema = reader.type.json_schema(ref_template=f"#/components/schemas/{name}{{model}}")
                inner = {f"{name}{key}": value for key, value in schema.pop("$defs").items()}
                found["components"]["schemas"] |= {name: schema, **inner}
                content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
                if reader is rows:
                    content[STREAM] = {"schema": {"type": "string", "format": "binary"}}
                found["paths"][path]["post"]["requestBody"] = {"content": content, "required": True}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    direct = {"/predict": predict, "/explain": explain}

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what costs the model time past FastAPI, which would double the time around it."""
        if scope["method"] == "POST" and (handler := direct.get(scope["path"])) is not None:
            response = await handler(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await app(scope, receive, send)

    return route


def refusal() -> Response:
    """The answer to a request that comes when the queue is full."""
    return _problems(429, Fault("too many rows wait for the model; try again later"), headers=_RETRY)


def raw(response: Response) -> bytes:
    """A response with its whole body as it is sent: status line, headers and body."""
    lines = [b"HTTP/1.1 %d %s" % (response.status_code, HTTPStatus(response.status_code).phrase.encode())]
    lines += [b"%s: %s" % header for header in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _problems(status: int, *faults: Fault, headers: dict[str, str] | None = None) -> JSONResponse:
    detail = [{"message": one.message, "row": one.row, "column": one.column} for one in faults]
    return JSONResponse({"detail": detail}, status, headers)


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problems} for status in (400, 408, *statuses)}

"""Rows of requests: every kind of column in JSON and Arrow gives the ids of ``predict``; streams that lie."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tests.inference.serve.serving import stream
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.inference.serve.arrow_rows import read_stream
from torchrec_deepfm.inference.serve.rows import JsonRows, RequestColumn, RequestError, as_table, columns_of


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
    table = from_json(columns, odd)
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
    lists = from_json(columns, [rows[0] | {"cut": ["p", "z"]}])
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
            from_json(columns, [rows[0] | change])
        assert refused.value.status == 422
        assert message in str(refused.value)
        assert (refused.value.faults[0].row, refused.value.faults[0].column) == (1, next(iter(change)))
    with pytest.raises(RequestError, match="is text, where other rows hold a list"):
        from_json(columns, [rows[0], rows[0] | {"cut": ["p"]}])


def from_json(columns: Sequence[RequestColumn], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return as_table(columns, JsonRows(columns, 9).read(json.dumps({"rows": rows}).encode()))


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

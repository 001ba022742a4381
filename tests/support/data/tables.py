"""Small tables for tests, and what is reported about bad ones."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError

SMALL = Schema(label="y", numeric=("n",), categorical=("c",), layout="table")
BAGS = Schema(
    label="y",
    numeric=(),
    categorical=("b",),
    columns={"b": Column(list=True, weights="w", separator="|")},
    layout="table",
)


def rows_of(named, schema, **options):
    skip_bad = options.pop("skip_bad", False)
    return [
        row
        for source in open_tables(str(named), schema, **options)
        for piece in source.pieces(skip_bad=skip_bad)
        for row in piece.frame.rows()
    ]


def message(named, schema=SMALL):
    with pytest.raises(UserError) as caught:
        rows_of(named, schema)
    text = str(caught.value)
    assert "\n" not in text
    return text


def parquet(path, columns, **options):
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def small(path, **columns):
    return parquet(path, {"y": [0, 1], "n": [1, 2], "c": ["a", "b"]} | columns)


def text_file(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

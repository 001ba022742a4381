"""Rows of a request as an Arrow IPC stream, which comes from a stranger.

Arrow checks the form of a stream. Here is what it does not: that a small stream does not unfold to a large table
(compression, dictionaries and views that share a text), and that offsets stay inside their buffers.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_deepfm.inference.serve.rows import MAX_TEXT, Fault, RequestColumn, RequestError

STREAM: Final = "application/vnd.apache.arrow.stream"
MAX_UNFOLDED: Final = 64 << 20  # bytes of text, once every cell has its own
_COMPRESSION: Final = 3  # field of RecordBatch in Arrow's Message.fbs


def read_stream(body: bytes, columns: Sequence[RequestColumn], most: int) -> pa.Table:
    """Read and check a stream of at most ``most`` rows with these columns, of types that share no memory.

    RequestError: it is not a stream (400), unfolds to too much (413), or its columns or values do not fit (422).
    """
    try:
        for message in pa.MessageReader.open_stream(body):
            if message.type in ("record batch", "dictionary") and _is_compressed(message.metadata, message.type):
                raise RequestError(400, Fault("the Arrow stream is compressed; write it without compression"))
        with pa.ipc.open_stream(body) as stream:
            _check_columns(stream.schema, columns)
            batches, rows, texts = [], 0, 0
            for batch in stream:
                rows += len(batch)
                if rows > most:
                    raise RequestError(413, Fault(f"more than {most:,} rows; send them in several requests"))
                batch.validate(full=True)
                texts += sum(_text_bytes(batch.column(one.name), one) for one in columns)
                if texts > MAX_UNFOLDED:
                    raise RequestError(413, Fault("the rows hold more than 64 MiB of text; send fewer"))
                batches.append(pa.record_batch({one.name: _plain(batch.column(one.name)) for one in columns}))
    except (pa.ArrowException, OSError, UnicodeError, struct.error) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(400, Fault(f"the body is not a valid Arrow IPC stream: {line}")) from error
    if not rows:
        raise RequestError(422, Fault("the stream has no row; give at least one"))
    try:
        return pa.Table.from_batches(batches)
    except pa.ArrowException as error:
        raise RequestError(400, Fault("the batches of the stream differ in their types")) from error


def _check_columns(schema: pa.Schema, columns: Sequence[RequestColumn]) -> None:
    names, wanted = schema.names, [column.name for column in columns]
    for name in wanted:
        if names.count(name) != 1:
            what = "is absent; give it, with nulls where values are missing" if name not in names else "appears twice"
            raise RequestError(422, Fault(f"the column {what}", column=name))
    for name in names:
        if name not in wanted:
            raise RequestError(422, Fault("unknown column; leave it out", column=name))


def _text_bytes(array: pa.Array, column: RequestColumn) -> int:
    """Check the type and the lengths of a column; return the bytes of all its texts."""
    kind, types = array.type, pa.types
    fixed = types.is_fixed_size_list(kind) and kind.list_size == column.width
    if column.is_list and (types.is_list(kind) or types.is_large_list(kind) or fixed):
        if (pc.max(pc.list_value_length(array)).as_py() or 0) > column.most:
            raise RequestError(422, Fault(f"expected {column.words}, not a longer list", column=column.name))
        return _text_bytes(array.flatten(), replace(column, is_list=False))
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        return 0
    if column.kind.endswith("time") and (types.is_timestamp(kind) or types.is_date(kind)):
        return 0
    if types.is_string_view(kind):  # Arrow has no function for their length: the first of four 32-bit words
        lengths = pa.array(np.frombuffer(array.buffers()[1], np.int32)[4 * array.offset :: 4][: len(array)])
    elif types.is_dictionary(kind) and types.is_string(kind.value_type) | types.is_large_string(kind.value_type):
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
    elif types.is_string(kind) or types.is_large_string(kind):
        lengths = pc.binary_length(array)
    else:
        raise RequestError(422, Fault(f"expected {column.words}, not Arrow's {kind}", column=column.name))
    if (pc.max(lengths).as_py() or 0) > 4 * MAX_TEXT:  # bytes of UTF-8
        raise RequestError(422, Fault(f"expected {column.words}, not a longer text", column=column.name))
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)


def _plain(array: pa.Array) -> pa.Array:
    """The same values of a type without dictionaries and views."""
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode()
    return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array


def _is_compressed(metadata: pa.Buffer, kind: str) -> bool:
    """Whether the body of a message is compressed: a field of a flatbuffer that pyarrow does not show.

    A table is a signed distance back to its list of offsets: their size in bytes, the table's size, one per field.
    """
    content = metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        """Place of a field's value; 0 if it is absent."""
        offsets = table - struct.unpack_from("<i", content, table)[0]
        place = 4 + 2 * number
        inside = place < struct.unpack_from("<H", content, offsets)[0]
        found = struct.unpack_from("<H", content, offsets + place)[0] if inside else 0
        return table + found if found else 0

    def follow(place: int) -> int:
        return int(place + struct.unpack_from("<I", content, place)[0])

    batch = follow(field(follow(0), 2))  # Message.header
    if kind == "dictionary":
        batch = follow(field(batch, 1))  # DictionaryBatch.data
    return field(batch, _COMPRESSION) != 0

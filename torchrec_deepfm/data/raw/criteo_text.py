"""Criteo's text logs -> typed pieces: tab separated, no header; a label, I integers, F categories in hexadecimal.

Polars parses blocks of whole lines. What it accepts silently (signs, spaces, short lines) is checked by counting; a
block that fails in any way is checked again line by line, by one regular expression that defines a good line.
So the rule has one home, good data are fast, and a bad line is named.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw.addresses import File, find_text, one_line
from torchrec_deepfm.data.raw.bad_rows import Skipped
from torchrec_deepfm.data.raw.file_kind import COMPRESSIONS, HEAD_BYTES, check_head, compression, explain_damage
from torchrec_deepfm.data.raw.source import Piece
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.remote.address import AddressFile

T = TypeVar("T")

PIECE_BYTES: Final = 1 << 26
_READ_BYTES: Final = 1 << 20

_INTEGER = "-?[0-9]+"
_HEX = "[0-9a-fA-F]{1,8}"
_HEX_DIGITS = 8
_LONG = 400
# After line ends are replaced by newlines, a good block has only these characters.
_CHARACTERS = b"0123456789abcdefABCDEF-\t\n"
_TAB, _NEWLINE = b"\t\n"
_CACHED = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_REPAIR = "repair or remove the line, or skip such lines (--on-bad-row skip)"
_TEXT = "Criteo's text, which this schema reads"
_NEEDS_SCHEMA = (
    "describe its columns: python -m torchrec_deepfm schema infer FILE --output schema.toml, then prepare with "
    "--schema schema.toml"
)
# The longest text of the input that an error message repeats.
_SHOWN = 40


class TextLog:
    """One text file in Criteo's format, plain, ``.gz`` or ``.zst``, at a local path or where ``find_text`` found it.

    A piece has about ``piece_bytes`` of text; a line must fit. ``labelled``: whether lines begin with the label;
    ``None`` looks at the first line. Columns to ``keep`` are carried along, categories in 8 hexadecimal digits.
    UserError: the file is absent, a folder, or can't be opened, or lacks one of them.
    """

    def __init__(
        self,
        path: Path | File,
        schema: Schema,
        *,
        piece_bytes: int = PIECE_BYTES,
        labelled: bool | None = True,
        keep: Sequence[str] = (),
    ) -> None:
        self._file = path if isinstance(path, File) else find_text(str(path))
        _check_readable(self._file)
        self.path, self.bytes = self._file.name, self._file.bytes
        self._schema = schema
        self._piece_bytes = piece_bytes
        self._labelled = self._has_labels() if labelled is None else labelled
        self._keep, names = tuple(keep), _names(schema, labelled=self._labelled)
        for name in self._keep:
            if name not in names:
                raise UserError(f"there is no column {name!r}", where=self.path, remedy=f"choose {one_of(names, name)}")

    def pieces(self, *, start: int, line: int, skip_bad: bool) -> Iterator[Piece]:
        """Continue reading at byte ``start`` of the text; see ``Source.pieces``.

        ``start``: where a piece ended, in bytes of uncompressed text. Yields pieces of whole lines.
        """
        for piece in self.share(start=start, line=line, skip_bad=skip_bad, mine=lambda number: True):
            assert piece is not None
            yield piece

    def share(self, *, start: int, line: int, skip_bad: bool, mine: Callable[[int], bool]) -> Iterator[Piece | None]:
        """Read some of the pieces; of the others only the bytes are read, and ``None`` is yielded.

        ``mine``: whether to parse a piece, by its number from 0 on; the rest as for ``pieces``.
        """
        # One piece and one block ahead: reading and unpacking, parsing, and the caller run at the same time.
        with _ahead(self._blocks(start)) as blocks, _ahead(self._parsed(blocks, start, line, skip_bad, mine)) as pieces:
            yield from pieces

    def _parsed(
        self,
        blocks: Iterator[tuple[bytes, float]],
        start: int,
        line: int,
        skip_bad: bool,
        mine: Callable[[int], bool],
    ) -> Iterator[Piece | None]:
        for number in itertools.count():
            try:
                block = next(blocks, None)
            except OSError as error:
                raise self._unreadable(error, line) from error
            if block is None:
                return
            text, done = block
            piece = self._piece(text, start, line, done, skip_bad) if mine(number) else None
            yield piece
            start, line = start + len(text), line + _lines(_normal(text))

    def _blocks(self, start: int) -> Iterator[tuple[bytes, float]]:
        """Cut the text from ``start`` on into blocks of whole lines."""
        codec = compression(self.path)
        with _opened(self._file) as raw:
            if codec is None:
                stream = raw
                stream.seek(start)
            else:
                stream = pa.CompressedInputStream(raw, codec)
                _skip(stream, start)
            rest = b""
            while True:
                block, ended = self._read(stream, rest)
                if isinstance(ended, OSError):
                    # What was unpacked comes first: a bad line in it is the error to report.
                    if cut := block.rfind(b"\n") + 1:
                        yield block[:cut], raw.tell() / max(self.bytes, 1)
                    raise ended
                if ended:
                    if block:
                        yield block, 1.0
                    return
                rest = block
                cut = rest.rfind(b"\n") + 1
                if not cut:  # no newline at all: lines may end in carriage returns (the last one may be half a CRLF)
                    cut = rest.rfind(b"\r", 0, -1) + 1
                if not cut:
                    raise UserError(
                        f"a line is longer than {self._piece_bytes:,} bytes",
                        where=self.path,
                        remedy=f"not a text log of {len(self._schema.names)} columns",
                    )
                yield rest[:cut], raw.tell() / max(self.bytes, 1)
                rest = rest[cut:]

    def _read(self, stream: pa.NativeFile, begun: bytes) -> tuple[bytes, bool | OSError]:
        """Fill a block in small reads, since a read that fails loses what it had unpacked."""
        parts, missing = [begun], self._piece_bytes - len(begun)
        while missing > 0:
            try:
                part = stream.read(min(missing, _READ_BYTES))
            except OSError as error:
                return b"".join(parts), error
            if not part:
                return b"".join(parts), True
            parts.append(part)
            missing -= len(part)
        return b"".join(parts), False

    def _piece(self, text: bytes, start: int, line: int, done: float, skip_bad: bool) -> Piece:
        size = len(text)
        if start == 0 and text.startswith(_BYTE_ORDER_MARK):
            text = text[len(_BYTE_ORDER_MARK) :]
        text = _normal(text)
        lines = _lines(text)
        frame = _parse(text, self._schema, labelled=self._labelled)
        if frame is not None and self._unfit(frame):
            frame = None
        skipped: tuple[Skipped, ...] = ()
        if frame is None:
            good, skipped = self._sort_out(text, line, skip_bad)
            frame = _parse_slowly(good, self._schema, labelled=self._labelled)
        kept = self._kept(frame, skipped) if self._keep else None
        return Piece(frame=frame, end=start + size, line=line + lines, done=done, skipped=skipped, kept=kept)

    def _kept(self, frame: pl.DataFrame, skipped: Sequence[Skipped]) -> pa.Table:
        schema, columns = self._schema, {}
        for name in dict.fromkeys(self._keep):
            if name == schema.label:
                columns[name] = frame["label"]
            elif name in schema.numeric:
                columns[name] = frame[f"n{schema.numeric.index(name)}"].cast(pl.Float64)
            else:
                codes = frame[f"c{schema.categorical.index(name)}"].to_list()
                columns[name] = pl.Series([None if code is None else f"{code:08x}" for code in codes], dtype=pl.String)
        kept = pl.DataFrame(columns).to_arrow()
        if not skipped:
            return kept
        bad, good = {one.place for one in skipped}, iter(range(len(frame)))
        places = [None if place in bad else next(good) for place in range(len(frame) + len(bad))]
        return kept.take(pa.array(places, pa.int64()))

    def _has_labels(self) -> bool:
        """Whether the first line has a cell for the label; a line of any other length is an error that names it."""
        codec = compression(self.path)
        try:
            with _opened(self._file) as raw:
                head = (raw if codec is None else pa.CompressedInputStream(raw, codec)).read(_READ_BYTES)
        except OSError as error:
            raise self._unreadable(error, 0) from error
        first = re.split(rb"[\r\n]", head.removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n"), maxsplit=1)[0]
        return bool(first.count(b"\t") != len(self._schema.names) - 2)

    def _sort_out(self, text: bytes, line: int, skip_bad: bool) -> tuple[list[bytes], tuple[Skipped, ...]]:
        """Part the good lines from the bad ones; raise over the first bad one unless they are to be skipped."""
        pattern = re.compile(line_pattern(self._schema, labelled=self._labelled).encode())
        good: list[bytes] = []
        skipped: list[Skipped] = []
        for number, row in enumerate(text.split(b"\n"), start=line + 1):
            if not row:
                continue
            if pattern.fullmatch(row) and not self._has_unfit(row):
                good.append(row)
                continue
            fault = _describe(row.decode("utf-8", "surrogateescape"), self._schema, labelled=self._labelled)
            if not skip_bad:
                header = number == 1 and row.partition(b"\t")[0].strip(b"0123456789")
                remedy = f"if this is a table with a header, {_NEEDS_SCHEMA}" if header else _REPAIR
                raise UserError(f"line {number}{fault}", where=self.path, remedy=remedy)
            place = len(good) + len(skipped)
            skipped.append(Skipped(line=number, reason=fault.lstrip(", "), place=place))
        return good, tuple(skipped)

    def _unfit(self, frame: pl.DataFrame) -> bool:
        return any(
            numeric.unfit(frame[f"n{j}"], self._schema.options(name).transform).any()
            for j, name in enumerate(self._schema.numeric)
        )

    def _has_unfit(self, row: bytes) -> bool:
        fields = row.split(b"\t")[self._labelled : self._labelled + len(self._schema.numeric)]
        return any(
            _number_fault(field.decode("ascii"), self._schema.options(name).transform)
            for field, name in zip(fields, self._schema.numeric, strict=True)
        )

    def _unreadable(self, error: OSError, line: int) -> UserError:
        suffix = Path(self._file.path).suffix.lower()
        if suffix in COMPRESSIONS:
            return UserError(f"after line {line}, {explain_damage(suffix, error)}", where=self.path)
        return UserError(
            f"the file can't be read after line {line} ({error})", where=self.path, remedy="check the disk"
        )


@contextmanager
def _ahead(iterator: Iterator[T]) -> Iterator[Iterator[T]]:
    """Fetch the next item in a thread while the caller works on the last one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def items() -> Iterator[T]:
            coming = thread.submit(next, iterator, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, iterator, end)
                yield item  # type: ignore[misc]

        yield items()


def _count(text: bytes, byte: int) -> int:
    """Count a frequent byte: numpy is four times as fast as ``bytes.count`` on parts that fit the cache."""
    array = np.frombuffer(text, np.uint8)
    return sum(int(np.count_nonzero(array[i : i + _CACHED] == byte)) for i in range(0, len(array), _CACHED))


def _normal(text: bytes) -> bytes:
    """Lines that end in newlines."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def _lines(text: bytes) -> int:
    return _count(text, _NEWLINE) + (not text.endswith(b"\n") and bool(text))


def _names(schema: Schema, *, labelled: bool) -> tuple[str, ...]:
    return schema.names if labelled else schema.names[1:]


def line_pattern(schema: Schema, *, labelled: bool = True) -> str:
    r"""Return the regular expression that a whole good line matches.

    Example:
        >>> re.fullmatch(line_pattern(Schema(label="y", numeric=("n",), categorical=("c",))), "1\t-3\tff") is not None
        True
    """
    cells = rf"(?:\t(?:{_INTEGER})?){{{len(schema.numeric)}}}(?:\t(?:{_HEX})?){{{len(schema.categorical)}}}"
    if labelled:
        return f"[01]{cells}"
    # Without the label in front, the first cell has no tab before it.
    first = _INTEGER if schema.numeric else _HEX
    rest = (max(len(schema.numeric) - 1, 0), len(schema.categorical) - (not schema.numeric))
    return rf"(?:{first})?(?:\t(?:{_INTEGER})?){{{rest[0]}}}(?:\t(?:{_HEX})?){{{rest[1]}}}"


def _parse(text: bytes, schema: Schema, *, labelled: bool) -> pl.DataFrame | None:
    """Parse a block of good lines; ``None`` where anything is out of the ordinary."""
    if not text:
        return None
    lines = _lines(text)
    # Together these exclude everything that Polars accepts silently. It refuses a line that is too long, so the
    # right number of tabs over all lines means the right number in each.
    tabs = len(_names(schema, labelled=labelled)) - 1
    if text.translate(None, _CHARACTERS):
        return None
    if _count(text, _TAB) != tabs * lines:
        shorter = re.sub(rb"\n{2,}", b"\n", text).lstrip(b"\n")  # blank lines are not rows
        return _parse(shorter, schema, labelled=labelled) if len(shorter) < len(text) else None
    integers, categories = range(len(schema.numeric)), range(len(schema.categorical))
    columns: dict[str, type[pl.DataType]] = {"label": pl.String} if labelled else {}
    columns |= {f"n{j}": pl.Int64 for j in integers} | {f"c{j}": pl.String for j in categories}
    try:
        frame = pl.read_csv(text, separator="\t", has_header=False, quote_char=None, schema=columns)
        if len(frame) != lines:
            return None
        checks = frame.select(
            *([pl.col("label").is_in(["0", "1"]).all() & pl.col("label").is_not_null().all()] if labelled else []),
            *((pl.col(f"c{j}").str.len_bytes().max() <= _HEX_DIGITS).fill_null(True) for j in categories),
        )
        if not all(checks.row(0)):
            return None
        return frame.select(
            *([pl.col("label").cast(pl.UInt8)] if labelled else []),
            *(pl.col(f"n{j}") for j in integers),
            *(_from_hex(j) for j in categories),
        )
    except pl.exceptions.PolarsError:
        return None


def _parse_slowly(lines: list[bytes], schema: Schema, *, labelled: bool) -> pl.DataFrame:
    """Parse lines that are known to be good, with integers beyond 64 bits among them."""
    rows = [line.decode("ascii").split("\t") for line in lines]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_names(schema, labelled=labelled))
    first = labelled + len(schema.numeric)
    named: dict[str, pl.Series] = {}
    if labelled:
        named["label"] = pl.Series(columns[0], dtype=pl.String).cast(pl.UInt8)
    for j, values in enumerate(columns[labelled:first]):
        # Longer than any finite float64: leading zeros, which int() has a limit for.
        numbers = [(int(value) if len(value) < _LONG else float(value)) if value else None for value in values]
        exact = all(n is None or (isinstance(n, int) and -(2**63) <= n < 2**63) for n in numbers)
        kind = pl.Int64 if exact else pl.Float64
        named[f"n{j}"] = pl.Series([None if n is None else n if exact else float(n) for n in numbers], dtype=kind)
    frame = pl.DataFrame(
        named | {f"c{j}": pl.Series(values, dtype=pl.String) for j, values in enumerate(columns[first:])}
    )
    frame = frame.with_columns(pl.col(f"c{j}").replace("", None) for j in range(len(schema.categorical)))
    return frame.with_columns(_from_hex(j) for j in range(len(schema.categorical)))


def _from_hex(j: int) -> pl.Expr:
    return pl.col(f"c{j}").str.to_integer(base=16, dtype=pl.UInt32)


def _skip(stream: pa.NativeFile, count: int) -> None:
    while count:
        read = len(stream.read(min(count, PIECE_BYTES)))
        if not read:
            raise OSError("the text is shorter than it was")
        count -= read


def _opened(file: File) -> pa.NativeFile:
    if file.filesystem is None:
        return pa.OSFile(file.path, "rb")
    return pa.PythonFile(AddressFile(file.filesystem, file.path), mode="r")


def _check_readable(file: File) -> None:
    path = file.name
    if file.filesystem is None and Path(path).is_dir():
        raise UserError("this is a folder", where=path, remedy="name the files in it")
    try:
        with _opened(file) as opened:
            head = opened.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise UserError("no such file", where=path, remedy="check the path") from error
    except OSError as error:
        what = error.strerror or one_line(error)
        raise UserError(f"the file can't be read ({what})", where=path, remedy="check its permissions") from error
    if head.startswith(b"PAR1"):
        raise UserError(f"this is a Parquet file, not {_TEXT}", where=path, remedy=_NEEDS_SCHEMA)
    check_head(path, file.path, head)


def _number_fault(field: str, transform: str | None) -> str:
    """Why an integer can't be used; empty if it can."""
    if not field:
        return ""
    number = float(field)
    if abs(number) == float("inf"):
        return "is too large for a number"
    return numeric.UNFIT[str(transform)] if numeric.unfit(pl.Series([number]), transform).any() else ""


def _describe(row: str, schema: Schema, *, labelled: bool) -> str:
    """Say what is wrong with a bad line, to go after its number."""
    fields = row.split("\t")
    names = _names(schema, labelled=labelled)
    if len(fields) != len(names):
        what = f"{len(schema.numeric)} numbers, {len(schema.categorical)} categories, tab separated"
        return f" has {len(fields)} columns, expected {len(names)} ({'label, ' if labelled else ''}{what})"
    for index, (name, field) in enumerate(zip(names, fields, strict=True), not labelled):
        shown = repr(field if len(field) <= _SHOWN else field[:_SHOWN] + "...")
        if index == 0:
            if not field:
                return f", column {name}: the label is missing (expected 0 or 1)"
            if field not in ("0", "1"):
                return f", column {name}: {shown} is not a valid label (expected 0 or 1)"
        elif index <= len(schema.numeric):
            if field and not re.fullmatch(_INTEGER, field):
                return f", column {name}: {shown} is not an integer"
            if field and (fault := _number_fault(field, schema.options(name).transform)):
                return f", column {name}: {shown} {fault}"
        elif field and not re.fullmatch(_HEX, field):
            return f", column {name}: {shown} is not a hexadecimal number of at most 8 digits"
    raise AssertionError(f"a line that matches in parts but not as a whole: {row!r}")

"""CSV tables of a user's own, against the plain Python values that were written into them."""

import csv
import gzip
import io
import itertools
import math
import random

import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data.raw.test_table_source import FLOATS, MANY, between, maybe, to_number
from tests.support.data.tables import SMALL, message, rows_of, text_file
from torchrec_deepfm.data.raw import table_files
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.data.schema import Column, Schema

CSV = Schema(
    label="y",
    numeric=("n 1",),
    categorical=("tëxt", "number", "bag"),
    columns={
        "number": Column(type="integer"),
        "bag": Column(list=True, separator="|", type="integer", weights="loads"),
    },
    layout="table",
)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
CSV_ROWS = st.tuples(
    st.sampled_from(["0", "1", "true", "FALSE", "1.0", " 0"]),
    maybe(FLOATS | between(-(10**25), 10**25)),
    maybe(CELLS),
    maybe(between(-(2**63), 2**63 - 1)),
    maybe(st.lists(maybe(between(-9, 10**12)), min_size=1, max_size=3)),
)


def csv_expected(row):
    label, value, text, whole, bag = row
    bag = None if bag is None or bag == [None] else bag  # an empty cell is a missing list
    kept = None if bag is None else [v for v in bag if v is not None]
    weights = None if bag is None else [j + 0.5 for j, v in enumerate(bag) if v is not None]
    return (1 if label.strip().lower() in ("1", "true", "1.0") else 0, to_number(value), text, whole, kept, weights)


def cell(value):
    return "" if value is None else str(value)


def csv_text(rows, *, delimiter=",", ending="\r\n"):
    out = io.StringIO(newline="")
    # Python 3.11 quotes a lone CR only where CR is among the line's end.
    quoting = csv.QUOTE_MINIMAL if ending == "\r\n" else csv.QUOTE_ALL
    writer = csv.writer(out, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerow(["unread", "bag", "y", "n 1", "tëxt", "number", "loads"])
    for label, value, text, whole, bag in rows:
        cells = "|".join(map(cell, bag or ()))
        loads = "|".join(f"{j + 0.5}" for j, _ in enumerate(bag or ())) if cells else ""
        writer.writerow(["x", cells, label, cell(value), cell(text), cell(whole), loads])
    return out.getvalue()


@MANY
@given(st.lists(CSV_ROWS, min_size=1, max_size=12), st.data())
@example([("1", 1e400, 'é,\n"', 3, [None, 4])], None)
def test_csv_holds_what_was_written(tmp_path, rows, data):
    def draw(values, otherwise):
        return otherwise if data is None else data.draw(values)

    rows = [(label, None if value == math.inf else value, *rest) for label, value, *rest in rows]
    suffix = draw(st.sampled_from([".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst"]), ".csv")
    text = csv_text(
        rows, delimiter="\t" if ".tsv" in suffix else ",", ending=draw(st.sampled_from(["\n", "\r\n"]), "\n")
    )
    content = text.encode("utf-8-sig" if draw(st.booleans(), False) else "utf-8")
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    if suffix.endswith(".zst"):
        content = bytes(pa.Codec("zstd").compress(content, asbytes=True))
    path = text_file(tmp_path / f"t{suffix}", content)
    [source] = open_tables(str(path), CSV, piece_rows=draw(between(1, 13), 1))
    pieces = list(source.pieces())
    assert [row for piece in pieces for row in piece.frame.rows()] == [csv_expected(row) for row in rows]
    at = draw(between(0, len(pieces) - 1), 0)
    again = list(source.pieces(start=pieces[at].end))
    assert [p.frame.rows() for p in again] == [p.frame.rows() for p in pieces[at + 1 :]]


def test_broken_and_bad_rows_are_left_out_and_listed_wherever_reading_begins(tmp_path, monkeypatch):
    """Against a plain count of the rows, over many blocks, with blank lines, and newlines in cells."""
    monkeypatch.setattr(table_files, "_BLOCK_BYTES", 300)
    draw = random.Random(5)
    lines, good, bad = [], [], []
    for number in range(2, 900):
        kind = draw.choices(["good", "many", "few", "label", "number"], [20, 1, 1, 1, 1])[0]
        value = f"v{number}\n" if draw.random() < 0.1 else f"v{number}"
        lines.append(
            {
                "good": f'1,{number},"{value}"',
                "many": f"1,{number},x,y,z",
                "few": "1",
                "label": f"{number},2,x",
                "number": f"0,two,{number}",
            }[kind]
            + ("\n\n" if draw.random() < 0.1 else "\n")
        )
        if kind == "good":
            good.append((1, float(number), value))
        else:
            bad.append(
                (
                    number,
                    {
                        "many": "the row has 5 cells, the header 3",
                        "few": "the row has 1 cells, the header 3",
                        "label": f"column 'y': '{number}' is not a valid label (expected 0 or 1)",
                        "number": "column 'n': 'two' is not a number",
                    }[kind],
                )
            )
    path = text_file(tmp_path / "t.csv", "y,n,c\n" + "".join(lines))
    for piece_rows in (7, 64, 1000):
        [source] = open_tables(str(path), SMALL, piece_rows=piece_rows)
        pieces = list(source.pieces(skip_bad=True))
        assert [row for piece in pieces for row in piece.frame.rows()] == good
        assert [(one.line, one.reason) for piece in pieces for one in piece.skipped] == bad
        assert [piece.end for piece in pieces] == [*range(piece_rows, 898, piece_rows), 898]
        for before, piece in itertools.pairwise(pieces):
            again = next(iter(source.pieces(start=before.end, skip_bad=True)))
            assert (again.frame.rows(), again.skipped, again.end) == (piece.frame.rows(), piece.skipped, piece.end)
    number, reason = bad[0]
    assert message(path) == f"{path}: row {number}, {reason}; repair or remove the row"


def test_a_csv_that_ends_in_broken_rows(tmp_path):
    path = text_file(tmp_path / "t.csv", "y,n,c\n1,2,a\n1,2\n1\n")
    [source] = open_tables(str(path), SMALL)
    [piece] = source.pieces(skip_bad=True)
    assert piece.frame.rows() == [(1, 2.0, "a")]
    assert [one.line for one in piece.skipped] == [3, 4]
    assert (piece.end, piece.line) == (3, 4)
    assert list(source.pieces(start=3, skip_bad=True)) == []


def test_delimiter_of_the_schema(tmp_path):
    schema = Schema(label="y", numeric=("n",), categorical=("c",), layout="table", delimiter=";")
    assert rows_of(text_file(tmp_path / "t.csv", "y;n;c\n1;1.5;a,b\n"), schema) == [(1, 1.5, "a,b")]

"""Every mistake gets one line that names the place and the remedy, and leaves nothing behind."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.data.raw_oracle import SMALL, parse, random_text
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.raw import criteo_text
from torchrec_deepfm.data.schema import CRITEO_KAGGLE, TRANSFORMS
from torchrec_deepfm.errors import UserError

GOOD = b"1\t5\t-2\tab\t\t0F\n"
REPAIR = "; repair or remove the line, or skip such lines (--on-bad-row skip)"


def refused(tmp_path: Path, *args, **options) -> str:
    """The message; checks that it is one line and that only the inputs are left."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(*args, **options)
    assert sorted(tmp_path.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "day.tsv"


BAD_LINES = {
    "five columns": (b"1\t5\t-2\tab\t", " has 5 columns, expected 6 (label, 2 numbers, 3 categories, tab separated)"),
    "seven columns": (b"1\t5\t-2\tab\t\t0F\t1", " has 7 columns, expected 6"),
    "seven columns, the last empty": (b"1\t5\t-2\tab\t\t0F\t", " has 7 columns, expected 6"),
    "spaces": (b"1 5 -2 ab cd 0F", " has 1 columns, expected 6"),
    "label 2": (b"2\t5\t-2\tab\t\t0F", ", column y: '2' is not a valid label (expected 0 or 1)"),
    "label text": (b"yes\t5\t-2\tab\t\t0F", ", column y: 'yes' is not a valid label"),
    "no label": (b"\t5\t-2\tab\t\t0F", ", column y: the label is missing (expected 0 or 1)"),
    "decimal": (b"1\t5\t1.5\tab\t\t0F", ", column n2: '1.5' is not an integer"),
    "exponent": (b"1\t1e3\t5\tab\t\t0F", ", column n1: '1e3' is not an integer"),
    "underscore": (b"1\t1_0\t5\tab\t\t0F", ", column n1: '1_0' is not an integer"),
    "blank number": (b"1\t 5\t5\tab\t\t0F", ", column n1: ' 5' is not an integer"),
    "400 digits": (b"1\t5\t" + b"9" * 400 + b"\tab\t\t0F", f", column n2: '{'9' * 40}...' is too large for a number"),
    "no hex": (b"1\t5\t-2\txyz\t\t0F", ", column c1: 'xyz' is not a hexadecimal number of at most 8 digits"),
    "9 hex digits": (b"1\t5\t-2\tab\t123456789\t0F", ", column c2: '123456789' is not a hexadecimal number"),
    "hex with underscore": (b"1\t5\t-2\ta_b\t\t0F", ", column c1: 'a_b' is not a hexadecimal number"),
    "quoted": (b'1\t5\t-2\t"ab"\t\t0F', ", column c1: '\"ab\"' is not a hexadecimal number"),
    "utf-8": ("1\t5\t-2\té\t\t0F".encode(), ", column c1: 'é' is not a hexadecimal number"),
    "latin-1": (b"1\t5\t-2\t\xe9\t\t0F", ", column c1: '\\udce9' is not a hexadecimal number"),
    "latin-1 number": (b"1\t\xe9\t-2\tab\t\t0F", ", column n1: '\\udce9' is not an integer"),
    "zero byte": (b"1\t5\t-2\ta\x00\t\t0F", ", column c1: 'a\\x00' is not a hexadecimal number"),
    "a header": (b"y\tn1\tn2\tc1\tc2\tc3", ", column y: 'y' is not a valid label"),
    "3 MB in one field": (b"1\t5\t-2\t" + b"a" * 3_000_000 + b"\t\t", f", column c1: '{'a' * 40}...' is not a hexadec"),
}


@pytest.mark.parametrize(("line", "fault"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_bad_line(tmp_path, path, line, fault, newline):
    good = GOOD.replace(b"\n", newline)
    # A blank line counts as a line, not as a row; a second bad line comes later.
    path.write_bytes(good * 3 + newline + line + newline + good + b"x\n")
    message = refused(tmp_path, [path], tmp_path / "out", schema=SMALL)
    assert message.startswith(f"{path}: line 5{fault}"), message
    assert message.endswith(REPAIR)


def test_the_first_bad_line_of_a_long_file(tmp_path, path):
    lines = random_text(30_000, 0).splitlines(keepends=True)
    lines[20_000] = lines[20_000].replace(b"\t", b"\tx", 1)
    lines[29_000] = b"1\n"
    path.write_bytes(b"".join(lines))
    assert refused(tmp_path, [path], tmp_path / "out").startswith(f"{path}: line 20001, column I1: 'x")


def test_rows_of_39_and_41_columns(tmp_path, path):
    text = random_text(20, 0)
    for line, count in ((b"0" + b"\t" * 38, 39), (b"0" + b"\t" * 40, 41)):
        path.write_bytes(text + line + b"\n")
        assert refused(tmp_path, [path], tmp_path / "out") == (
            f"{path}: line 21 has {count} columns, expected 40 (label, 13 numbers, 26 categories, tab separated)"
            + REPAIR
        )


def test_bad_line_in_the_test_file_names_that_file(tmp_path):
    train, bad = tmp_path / "a.tsv", tmp_path / "t.tsv"
    train.write_bytes(GOOD)
    bad.write_bytes(b"3" + GOOD[1:])
    valid = tmp_path / "v.tsv"
    valid.write_bytes(GOOD)
    message = refused(tmp_path, [train], tmp_path / "out", validation=[valid], test=[bad], schema=SMALL)
    assert message == f"{bad}: line 1, column y: '3' is not a valid label (expected 0 or 1)" + REPAIR


TOLERATED = {
    "CRLF": GOOD.replace(b"\n", b"\r\n") * 2,
    "CR": GOOD.replace(b"\n", b"\r") * 2,
    "both newlines": GOOD + GOOD.replace(b"\n", b"\r\n") + GOOD,
    "no final newline": (GOOD * 2)[:-1],
    "blank lines at the end": GOOD * 2 + b"\n\n",
    "byte order mark": b"\xef\xbb\xbf" + GOOD * 2,
    "upper case, short and negative": b"0\t-7\t" + b"9" * 30 + b"\tFFFFFFFF\tA\t00000000\n",
}


@pytest.mark.parametrize("text", TOLERATED.values(), ids=TOLERATED)
def test_tolerated(tmp_path, path, text):
    path.write_bytes(text)
    for name in ("v.tsv", "t.tsv"):
        (tmp_path / name).write_bytes(GOOD)
    data = prepare(
        [path],
        tmp_path / "out",
        validation=[tmp_path / "v.tsv"],
        test=[tmp_path / "t.tsv"],
        schema=SMALL,
        hash=True,
        num_embeddings=100,
    )
    arrays = data.arrays(data.days("train")[0])
    dense, sparse, labels = arrays.dense[:], arrays.sparse[:], arrays.labels[:]
    rows = parse(text.removeprefix(b"\xef\xbb\xbf"), SMALL)
    assert labels[:, 0].tolist() == [row[0] for row in rows]
    assert sparse.tolist() == [[0 if value is None else 1 + value % 99 for value in row[2]] for row in rows]
    assert dense.tolist() == [pytest.approx(row[1], rel=1e-6) for row in rows]


@pytest.mark.parametrize("text", [b"", b"\n\n"], ids=["empty", "blank"])
def test_no_rows(tmp_path, path, text):
    # Nothing to estimate the disk by, either.
    path.write_bytes(text)
    assert refused(tmp_path, [path], tmp_path / "out") == (
        f"{path}: the file has no rows; give a file with data or leave it out"
    )


def test_missing_file_and_folder(tmp_path, path):
    assert refused(tmp_path, [path], tmp_path / "out") == f"{path}: no such file; check the path"
    assert (
        refused(tmp_path, [tmp_path], tmp_path.parent / "out")
        == f"{tmp_path}: this is a folder without day_0, day_1, ...; name the files"
    )


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", pa.Codec("zstd").compress)])
def test_damaged_compressed_data(tmp_path, monkeypatch, ending, pack):
    monkeypatch.setattr(criteo_text, "_READ_BYTES", 10_000)
    path = tmp_path / f"day.tsv.{ending}"
    text = random_text(5000, 0)
    whole = bytes(pack(text))
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in a gzip's checksum; the last bytes of a frame
    for damaged in (whole[: len(whole) // 2], whole[:-3], bytes(flipped)):
        path.write_bytes(damaged)
        message = refused(tmp_path, [path], tmp_path / "out")
        assert message.startswith(f"{path}: after line "), message
        assert f", the .{ending} data are damaged or cut off (" in message
        assert message.endswith("; download or compress the file again")
    path.write_bytes(whole[: len(whole) // 2])
    assert int(refused(tmp_path, [path], tmp_path / "out").split("after line ")[1].split(",")[0]) > 1000
    # A bad line before the damage is reported first.
    path.write_bytes(bytes(pack(b"x\n" + text))[: len(whole) // 2])
    assert refused(tmp_path, [path], tmp_path / "out").startswith(f"{path}: line 1 has 1 columns")


def test_options(tmp_path, path):
    path.write_bytes(GOOD)
    out, other = tmp_path / "out", tmp_path / "other.tsv"
    other.write_bytes(GOOD)
    assert refused(tmp_path, [], out) == "--input: no file is named; name at least one"
    assert refused(tmp_path, [path], out, min_count=0) == "--min-count 0: must be at least 1"
    assert refused(tmp_path, [path], out, hash=True, num_embeddings=1) == (
        "--num-embeddings: 1 is out of range; give 2 to 2147483647"
    )
    assert refused(tmp_path, [path], out, seed=-1) == "--seed -1: must not be negative"
    twice = tmp_path / "." / "day.tsv"
    assert refused(tmp_path, [path, twice], out) == f"{twice}: the same file is named twice; name each file once"
    again = f"{path}: the same file is named twice; name each file once"
    assert refused(tmp_path, [path], out, validation=[other], test=[path]) == again


def test_more_options(tmp_path, path):
    path.write_bytes(GOOD)
    out = tmp_path / "out"
    tests = {
        "--memory 512MiB: too little; give 1GiB or more": {"memory": "512MiB"},
        "--threads 0: must be at least 1": {"threads": 0},
        "--split 7:3: choose one of 8:1:1, 9:1, last-day, time, leave-last-out, column, none": {"split": "7:3"},
        "--split last-day: one file is named; name two or more, or choose --split 8:1:1": {"split": "last-day"},
        f"--numeric cube: not a transform; choose one of {', '.join(TRANSFORMS)}": {"numeric_transform": "cube"},
        "--num-embeddings: 2 numbers for 3 categorical columns; give one for all, or one each": {
            "hash": True,
            "num_embeddings": [5, 6],
        },
        "--vocabulary: hashing has none; leave --hash or --vocabulary out": {"hash": True, "vocabulary": out},
        "--min-count: hashing counts nothing; leave --hash or --min-count out": {"hash": True, "min_count": 10},
        "--num-embeddings: a vocabulary has as many ids as it counts; add --hash, or leave it out": {
            "num_embeddings": 9
        },
        "--on-bad-row ignore: choose one of error, skip": {"on_bad_row": "ignore"},
    }
    for message, options in tests.items():
        assert refused(tmp_path, [path], out, schema=SMALL, **options) == message
    assert refused(tmp_path, [path], out, schema=SMALL, split="9:1", test=[path]) == (
        "--split 9:1: --validation and --test already define the split; leave --split or these out"
    )


def test_days(tmp_path):
    def days(*names):
        for name in names:
            (tmp_path / name).write_bytes(GOOD)
        return [tmp_path / name for name in names]

    out = tmp_path / "out"
    assert refused(tmp_path, days("day_0", "day_1.gz", "day_3"), out) == (
        "--input: day_2 is missing between day_1.gz and day_3; name all days, or rename the files if they are not days"
    )
    assert refused(tmp_path, days("day_0", "day_1"), out, test=days("day_3.gz")).startswith("--input: day_2 is missing")
    held_out = tmp_path / "v.tsv"
    held_out.write_bytes(GOOD)
    assert refused(tmp_path, days("day_0", "day_2"), out, validation=[held_out]).startswith("--input: day_1 is missing")
    twice = days("day_4", "day_4.gz")
    assert refused(tmp_path, twice, out) == (f"{twice[1]}: day 4 appears twice, also as {twice[0]}; name each day once")


def test_too_few_rows_to_split(tmp_path, path):
    path.write_bytes(GOOD)
    message = refused(tmp_path, [path], tmp_path / "out", schema=SMALL)
    assert "1 rows are too few to split 8:1:1, the " in message
    assert message.endswith(" part is empty; give more rows, or --validation and --test")


def test_output_that_is_taken(tmp_path, path):
    path.write_bytes(random_text(100, 0, SMALL))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    message = refused(tmp_path, [path], out, schema=SMALL)
    assert message == f"{out}: the output folder is not empty; name another one or remove it"
    assert (out / "mine").read_text() == "keep"
    message = refused(tmp_path, [path], path, schema=SMALL)
    assert message == f"{path}: the output exists and is not a folder; name another one"
    (out / "mine").unlink()
    assert prepare([path], out, schema=SMALL).rows("train") > 0  # an empty folder is free
    message = refused(tmp_path, [path], path / "out", schema=SMALL)
    assert message.startswith(f"{path / 'out'}: the folder can't be written (")


def test_damaged_truth(tmp_path):
    names = [tmp_path / f"{name}.tsv" for name in "avt"]
    for name in names:
        name.write_bytes(GOOD)
    for text in ("{", "[]", '{"files": {"v.tsv": {"auc": 0.5}}}'):
        (tmp_path / "truth.json").write_text(text)
        message = refused(tmp_path, names[:1], tmp_path / "out", validation=names[1:2], test=names[2:], schema=SMALL)
        assert message.startswith(f"{tmp_path / 'truth.json'}: the file is damaged (")


def test_criteo_is_the_default_schema():
    assert prepare.__kwdefaults__["schema"] is CRITEO_KAGGLE

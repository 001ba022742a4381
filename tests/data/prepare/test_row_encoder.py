"""New rows are encoded as prepare encoded the same rows."""

import polars as pl
import pytest

from tests.data.prepare.test_prepare import write
from tests.data.prepare.test_tables import SCHEMA, rows
from tests.data.prepare.test_tables import write as write_table
from tests.support.raw_oracle import SMALL, random_text
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import Encoder
from torchrec_deepfm.errors import UserError


def raw_frame(text: bytes) -> pl.DataFrame:
    fields = [line.split("\t") for line in text.decode().splitlines()]
    columns = list(zip(*fields, strict=True))[1:]
    numbers = {n: [int(v) if v else None for v in c] for n, c in zip(SMALL.numeric, columns, strict=False)}
    return pl.DataFrame(numbers | dict(zip(SMALL.categorical, columns[2:], strict=True)))


@pytest.mark.parametrize("numbers", ["log1p", "bucketize", "fuxictr", "none"])
@pytest.mark.parametrize("hashed", [False, True], ids=["vocabulary", "hash"])
def test_criteo(tmp_path, numbers, hashed):
    text = random_text(300, 1, SMALL)
    options = {"hash": True, "num_embeddings": 50} if hashed else {"min_count": 3}
    paths = write(tmp_path, a=text)
    data = prepare(paths, tmp_path / "out", schema=SMALL, split="none", numeric_transform=numbers, **options)
    arrays = data.arrays(data.days("train")[0])
    encoded = Encoder(data).encode(raw_frame(text))
    assert encoded.dense.tobytes() == arrays.dense[:].tobytes()
    assert encoded.sparse.tolist() == arrays.sparse[:].tolist()


@pytest.mark.parametrize("hashed", [False, True], ids=["vocabulary", "hash"])
def test_a_table(tmp_path, hashed):
    found = rows(200, 3)
    options = {"hash": True, "num_embeddings": 50} if hashed else {"min_count": 2}
    path = write_table(tmp_path / "a.parquet", found)
    data = prepare([path], tmp_path / "out", schema=SCHEMA, split="none", **options)
    arrays = data.arrays(data.days("train")[0])
    encoded = Encoder(data).encode(pl.read_parquet(path).drop("click"))
    assert encoded.dense.tobytes() == arrays.dense[:].tobytes()
    assert encoded.sparse.tolist() == arrays.sparse[:].tolist()
    for name in ("tags", "shops"):
        ids, lengths = encoded.bags[name]
        assert ids.tolist() == arrays.bags[name].ids[:].tolist()
        assert [0, *lengths.cumsum().tolist()] == arrays.bags[name].offsets[:].tolist()


def test_rows_that_do_not_fit(tmp_path):
    paths = write(tmp_path, a=random_text(50, 1, SMALL))
    data = prepare(paths, tmp_path / "out", schema=SMALL, split="none", min_count=1)
    good = raw_frame(random_text(5, 2, SMALL))
    with pytest.raises(UserError, match=r"column 'c2' is absent; the rows have n1, n2, c1, c3"):
        Encoder(data).encode(good.drop("c2"))
    with pytest.raises(UserError, match=r"column 'c1': not all values are hexadecimal numbers"):
        Encoder(data).encode(good.with_columns(c1=pl.lit("xyz")))
    logs = prepare(paths, tmp_path / "log", schema=SMALL, split="none", numeric_transform="log")
    with pytest.raises(UserError, match=r"prepare it with another --numeric"):
        Encoder(logs)

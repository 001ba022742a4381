"""Lists of numbers through ``prepare`` and the encoder; numpy has the expected arrays."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from tests.support.ranks import run_ranks
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.distributed import process_group
from torchrec_deepfm.errors import UserError

ROWS, WIDTH = 300, 5
SCHEMA = Schema(
    label="y", numeric=("x", "e", "plain", "z"), categorical=("u",), layout="table",
    columns={
        "x": Column(transform="standard"), "e": Column(width=WIDTH, transform="standard"), "plain": Column(width=2),
        "z": Column(missing_indicator=True),
    },
)  # fmt: skip


def rows(seed: int = 0, count: int = ROWS) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    constant = np.full(count, 3.5)
    e = np.column_stack([random.normal(i, 1 + i, count) for i in range(WIDTH - 1)] + [constant])
    return pl.DataFrame(
        {
            "y": random.integers(0, 2, count),
            "x": random.normal(5, 2, count),
            "e": e.tolist(),
            "plain": random.normal(size=(count, 2)).tolist(),
            "z": [None if i % 4 == 0 else float(i) for i in range(count)],
            "u": [f"u{i % 7}" for i in range(count)],
        }
    )


def expected(frame: pl.DataFrame, training: pl.DataFrame) -> NDArray[np.float64]:
    """[n, 1 + 5 + 2 + 1 + 1]: in the order of the schema, the indicator last."""

    def scaled(values: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
        std = known.std(axis=0)
        return (values - known.mean(axis=0)) / np.where(std > 0, std, 1.0)

    def column(part: pl.DataFrame, name: str) -> NDArray[np.float64]:
        return np.array(part[name].to_list(), np.float32).astype(np.float64).reshape(len(part), -1)

    z = frame["z"].to_numpy()
    e = scaled(column(frame, "e"), column(training, "e"))
    x = scaled(frame["x"].to_numpy(), training["x"].to_numpy())
    return np.column_stack([x, e, column(frame, "plain"), np.nan_to_num(z), np.isnan(z)])


def test_the_dense_array_has_a_column_per_number(tmp_path: Path) -> None:
    data = prepare(rows(), tmp_path / "data", validation=rows(1, 50), schema=SCHEMA, min_count=1)
    assert data.schema.numeric == ("x", "e", "plain", "z", "z_missing")
    assert data.schema.widths == (1, 5, 2, 1, 1)
    for split, frame in (("train", rows()), ("validation", rows(1, 50))):
        [day] = data.days(split)
        found = np.asarray(data.arrays(day).dense.array)
        assert found.dtype == np.float32
        assert found == pytest.approx(expected(frame, rows()), rel=2e-6, abs=2e-6)
    batch = next(iter(Loader(data, "validation", batch_size=50)))
    assert batch.dense_features.shape == (50, 10)


def test_new_rows_become_what_prepare_made_of_them(tmp_path: Path) -> None:
    data = prepare(rows(), tmp_path / "data", validation=rows(1, 50), schema=SCHEMA, min_count=1)
    RowEncoder.save(data, tmp_path / "encoder")
    encoder = RowEncoder.open(tmp_path / "encoder")
    [day] = data.days("validation")
    there = np.asarray(data.arrays(day).dense.array)
    for frame in (rows(1, 50), rows(1, 50).to_pandas(), rows(1, 50).to_dicts()):
        assert encoder.encode(frame).dense.tobytes() == there.tobytes()
    assert encoder.encode([encoder.example()]).dense.shape == (1, 10)
    texts = encoder.texts(encoder.read(rows(1, 1)))
    assert len(texts[0]) == len(data.schema.numeric) + len(data.schema.categorical)
    with pytest.raises(UserError, match=r"row 2, column 'e': the list has 4 numbers \(expected 5"):
        encoder.encode([rows(1, 1).to_dicts()[0], {**rows(1, 1).to_dicts()[0], "e": [1.0] * 4}])


def on_ranks(folder: str) -> None:
    home = Path(folder)
    ranks = Workers(rank=process_group.rank(), count=process_group.count(), gather=process_group.gather)
    paths = sorted(home.glob("part-*.parquet"))
    prepare(paths, home / "two", schema=SCHEMA, min_count=1, split="none", workers=ranks)


def test_two_ranks_write_the_same_bytes(tmp_path: Path) -> None:
    for part in range(3):
        rows(part, 100).write_parquet(tmp_path / f"part-{part}.parquet")
    paths = sorted(tmp_path.glob("part-*.parquet"))
    one = prepare(paths, tmp_path / "one", schema=SCHEMA, min_count=1, split="none")
    run_ranks(on_ranks, 2, str(tmp_path))
    two = PreparedData.open(tmp_path / "two")
    for name in (f"{day.stem}_dense.npy" for day in one.days("train")):
        assert (two.folder / name).read_bytes() == (one.folder / name).read_bytes()


def test_rows_of_other_statistics_are_refused(tmp_path: Path) -> None:
    one = prepare(rows(), tmp_path / "one", schema=SCHEMA, min_count=1, split="none")
    again = prepare([_file(tmp_path, rows(1))], tmp_path / "again", schema=SCHEMA, vocabulary=one.folder, split="none")
    [day] = again.days("train")
    assert np.asarray(again.arrays(day).dense.array) == pytest.approx(expected(rows(1), rows()), rel=2e-6, abs=2e-6)
    wider = Schema(label="y", numeric=("e",), categorical=("u",), layout="table", columns={"e": Column(width=4)})
    with pytest.raises(UserError, match=r"its numeric columns are x, e\[0\], e\[1\]"):
        prepare([_file(tmp_path, rows(1))], tmp_path / "wrong", schema=wider, vocabulary=one.folder, split="none")


def _file(folder: Path, frame: pl.DataFrame) -> Path:
    frame.write_parquet(folder / "new.parquet")
    return folder / "new.parquet"

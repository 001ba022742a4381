"""``load(run)``: raw rows in, probabilities out."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_deepfm
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError

COLUMNS = ("label", "row", "noise", "user", "item", "shop")


def read_raw(path: Path) -> pl.DataFrame:
    text = dict.fromkeys(("user", "item", "shop"), pl.String)
    return pl.read_csv(path, separator="\t", has_header=False, new_columns=COLUMNS, schema_overrides=text)


def by_hand(run: Path, data: PreparedData, split: str) -> NDArray[np.float64]:
    """The unsharded model over the loader's batches: what the probabilities of a split have to be."""
    model = torchrec_deepfm.load_model(run)
    batches = Loader(data, split, batch_size=128, rank=0, world_size=1, shuffle=False, drop_last=False)
    found = [torch.sigmoid(model(each.dense_features, each.sparse_features).double()).flatten() for each in batches]
    return torch.cat(found).numpy()[: data.rows(split)]


def test_the_probabilities_are_those_of_the_model(run: Path, run_data: PreparedData, frame: pl.DataFrame) -> None:
    predictor = torchrec_deepfm.load(str(run))
    found = predictor.predict(frame)
    assert found.dtype == np.float32
    assert np.abs(found - by_hand(run, run_data, "test")).max() <= 1e-6
    for same in (frame.to_arrow(), frame.rows(named=True), frame.with_columns(label=pl.lit("?"))):
        assert predictor.predict(same).tolist() == found.tolist()
    one = [predictor.predict(frame[row : row + 1])[0] for row in range(20)]
    assert np.abs(one - found[:20]).max() <= 1e-6
    assert predictor.predict(frame[:0]).shape == (0,)
    ids = frame.with_columns(pl.col(name).str.to_integer(base=16) for name in ("user", "item", "shop"))
    assert predictor.predict(ids).tolist() == found.tolist()


def test_the_prepared_folder_may_go(run: Path, run_data: PreparedData, frame: pl.DataFrame, tmp_path: Path) -> None:
    expected = torchrec_deepfm.load(run).predict(frame)
    moved = run_data.folder.with_name("gone")
    run_data.folder.rename(moved)
    try:
        assert torchrec_deepfm.load(run).predict(frame).tolist() == expected.tolist()
    finally:
        moved.rename(run_data.folder)


def test_a_checkpoint(run: Path, frame: pl.DataFrame) -> None:
    predictor, model = torchrec_deepfm.load(run, "28"), torchrec_deepfm.load_model(run, 28)
    rows = predictor.encoder.encode(frame)
    ids = torch.from_numpy(np.ascontiguousarray(rows.sparse.T)).flatten()
    features = KeyedJaggedTensor.from_lengths_sync(["user", "item", "shop"], ids, torch.ones(len(ids), dtype=torch.int))
    expected = torch.sigmoid(model(torch.from_numpy(rows.dense), features)).flatten().numpy()
    assert np.abs(predictor.predict(frame) - expected).max() <= 1e-6
    assert np.abs(predictor.predict(frame) - torchrec_deepfm.load(run).predict(frame)).max() > 1e-5


def test_one_row_reads_no_file(run: Path, frame: pl.DataFrame, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    predictor = torchrec_deepfm.load(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert 0 < predictor.predict(frame[:1])[0] < 1


def test_a_bad_row(run: Path, frame: pl.DataFrame) -> None:
    predictor = torchrec_deepfm.load(run)
    bad = frame.with_columns(user=pl.Series(["zz", *frame["user"][1:]]))
    with pytest.raises(UserError, match=r"^row 1, column 'user': 'zz' is not a hexadecimal number"):
        predictor.predict(bad)
    found = predictor.predict(bad, on_bad_row="skip")
    assert np.isnan(found[0])
    assert np.abs(found[1:] - predictor.predict(frame)[1:]).max() <= 1e-6


def config(run: Path, **changes: object) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_folders(run: Path, run_data: PreparedData, frame: pl.DataFrame, tmp_path: Path) -> None:
    def refused(match: str, path: Path | str, **options: Path) -> None:
        with pytest.raises(UserError, match=match) as error:
            torchrec_deepfm.load(path, **options)
        assert "\n" not in str(error.value)

    refused("not a run folder", tmp_path / "missing")
    refused("not a run folder", tmp_path)
    own = tmp_path / "run"
    shutil.copytree(run, own)
    config(own, encoder_sha256="0" * 64)
    refused(r"encoder: the encoder is of another run; restore the folder", own)
    shutil.rmtree(own / "encoder")
    refused(r"encoder: the folder is missing", own)
    config(own, encoder_sha256=None)  # as an earlier version wrote it
    refused(f"keeps no encoder of raw rows .* name its prepared data: --data {run_data.folder}$", own)
    expected = torchrec_deepfm.load(run).predict(frame).tolist()
    assert torchrec_deepfm.load(own, data=run_data.folder).predict(frame).tolist() == expected
    config(own, encoder_sha256=None, data="gone")
    refused("prepare and train again", own)
    config(own, data_sha256="0" * 64)
    refused(r"--data .*prepared: .*run was trained on other data", own, data=run_data.folder)


def test_arguments_as_a_person_gives_them(run: Path, frame: pl.DataFrame) -> None:
    assert torchrec_deepfm.load(run, np.int64(28)).sha256 == torchrec_deepfm.load(str(run), "28").sha256  # type: ignore[arg-type]
    predictor = torchrec_deepfm.load(run)
    for call, match in (
        (lambda: torchrec_deepfm.load(5), "^5: not a path; name the folder of a run or a package$"),
        (lambda: torchrec_deepfm.load(None), "^None: not a path"),
        (lambda: torchrec_deepfm.load(b"run"), "^b'run': not a path"),
        (lambda: torchrec_deepfm.load_model(None), "^None: not a path; name the folder of a run$"),
        (lambda: torchrec_deepfm.load(run, data=5), "^5: not a path; name the folder of prepared data$"),
        (lambda: torchrec_deepfm.load(run, True), "^checkpoint True: give best, last or the number of a step$"),
        (lambda: torchrec_deepfm.load(run, 2.5), "^checkpoint 2.5: give best"),
        (lambda: torchrec_deepfm.load(run, threads=0), "^threads 0: must be a whole number, at least 1$"),
        (lambda: predictor.predict(frame, on_bad_row="skipp"), r"did you mean 'skip'\?"),
    ):
        with pytest.raises(UserError, match=match):
            call()  # type: ignore[no-untyped-call]


def test_wrong_rows(run: Path, frame: pl.DataFrame) -> None:
    predictor = torchrec_deepfm.load(run)
    for rows, match in [
        (frame.drop("user"), "^column 'user' is absent; the rows have row, noise, item, shop$"),
        (frame.with_columns(row=pl.lit("1")), "^column 'row': it holds text, not numbers"),
        (frame.with_columns(user=pl.lit(-1)), "^row 1, column 'user': -1 is not an integer of 32 bits"),
        (pa.table({"user": [1]}), "^column 'row' is absent"),
        ({"user": 1}, "^rows of type dict can't be read; give a pandas"),
    ]:
        with pytest.raises(UserError, match=match):
            predictor.predict(rows)

"""Which fields matter, for the report: the rows, and the figures that ``explain`` has of the same rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from tests.inference.conftest import run, run_data  # noqa: F401
from torchrec_deepfm import load
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData


@pytest.mark.usefixtures("run_data")
def test_fields_are_measured_on_the_validation_rows(
    run: Path,  # noqa: F811
    run_data: PreparedData,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    main(["report", str(folder)])
    assert "report --run" in (folder / "report.html").read_text()  # how to measure them
    main(["report", "--run", str(folder), "--importance"])
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n" * 2
    found = json.loads((folder / "importance.json").read_text())
    assert (found["split"], found["rows"]) == ("validation", 300)
    names = ["label", "row", "noise", "user", "item", "shop"]
    text = run_data.folder.parent / "validation.tsv"
    frame = pl.read_csv(text, separator="\t", has_header=False, new_columns=names, infer_schema=False)
    frame = frame.with_columns(pl.col("row", "noise", "label").cast(pl.Int64))
    predictor, order = load(folder), np.random.default_rng(0).permutation(300)
    auc = roc_auc_score(frame["label"], predictor.predict(frame))
    measured = {one["field"]: one["auc_loss"] for one in found["fields"]}
    assert measured.keys() == {"row", "noise", "user", "item", "shop"}
    for name in ("row", "user"):
        moved = frame.with_columns(frame[name].gather(order))
        assert measured[name] == pytest.approx(auc - roc_auc_score(frame["label"], predictor.predict(moved)), abs=1e-4)
    page = (folder / "report.html").read_text()
    assert "Measured on 300 rows of the validation split." in page

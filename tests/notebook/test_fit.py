"""``fit``: from rows in memory to predictions in one process, and nothing of it stays behind."""

import gc
import html
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score

import torchrec_deepfm
from torchrec_deepfm import fit, load
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.notebook.fit import TrainedRun
from torchrec_deepfm.training.loop import Loop
from torchrec_deepfm.training.recipes import small_table

pytestmark = pytest.mark.pictures

QUICK: dict[str, Any] = {"show": False, "epochs": 2, "batch_size": 100, "over_arch_layer_sizes": (8,), "sparse_lr": 0.1}


def table(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    user, item, price = rng.integers(0, 40, rows), rng.integers(0, 20, rows), rng.normal(size=rows)
    logit = (user % 5 - 2.0) + (item % 3 - 1.0) + 0.5 * price
    click = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    frame = pl.DataFrame({"user": user, "item": item, "price": price, "click": click})
    return frame.with_columns("u" + pl.col("user").cast(pl.String))


def around() -> tuple[Any, ...]:
    """What a process could be left changed in."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    torch_state = torch.get_float32_matmul_precision(), torch.random.get_rng_state().tolist()
    return dict(os.environ), list(warnings.filters), handlers, torch_state, dist.is_initialized(), sys.excepthook


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    return fit(table(3000), "click", validation=table(500, 1), test=table(400, 2), **QUICK)


def test_the_metrics_are_those_of_the_predictions(run: TrainedRun) -> None:
    for split, frame in (("validation", table(500, 1)), ("test", table(400, 2))):
        predicted = run.predict(frame.drop("click")).astype(float)
        assert run.metrics[split]["auc"] == pytest.approx(roc_auc_score(frame["click"], predicted), abs=1e-6)
        assert run.metrics[split]["logloss"] == pytest.approx(log_loss(frame["click"], predicted), abs=1e-6)
        assert run.metrics[split]["rows"] == len(frame)
        assert f"{run.metrics[split]['auc']:.5f}" in repr(run)
    assert run.metrics["validation"]["auc"] > 0.75
    assert 'numeric = [\n    "price"' in run.schema
    explained = run.explain(table(2))
    assert explained.probabilities.tolist() == pytest.approx(run.predict(table(2)).tolist(), abs=1e-6)


def test_the_report_of_a_notebook(run: TrainedRun) -> None:
    found = run.report()
    assert found.path == run.folder / "report.html"
    shown = found._repr_html_()
    assert html.unescape(shown.partition('srcdoc="')[2].partition('"')[0]) == found.path.read_text(encoding="utf-8")
    assert "Measured on 500 rows of the validation split" in found.path.read_text(encoding="utf-8")


def test_twice_in_one_process(run: TrainedRun, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same rows as a list of dicts, into a folder of one's own: the same model."""
    before, threads = around(), torch.get_num_threads()
    again = fit(
        table(3000).to_dicts(), "click", validation=table(500, 1).to_arrow(), test=table(400, 2).lazy(),
        output=tmp_path / "run", **{**QUICK, "show": True},
    )  # fmt: skip
    assert around() == before
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    assert shown.startswith("# The columns of the frame, guessed from its first 3,000 rows: read and correct.\n")
    assert "train: 3,000 rows" in shown
    assert "step 30  validation:" in shown
    assert "trained 2 epoch(s), 60 steps of 1 x 100 samples" in shown
    assert again.predict(table(50)).tobytes() == run.predict(table(50)).tobytes()
    assert load(tmp_path / "run").predict(table(50)).tobytes() == run.predict(table(50)).tobytes()
    del again
    gc.collect()
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_temporary_run_ends_with_its_object() -> None:
    schema = Schema(label="click", numeric=(), categorical=("user", "item"), layout="table")
    run = fit(table(1000), schema=schema, **{**QUICK, "epochs": 1}, min_count=1, terms=("linear",))
    assert set(run.metrics) == {"validation", "test"}
    folder = run.folder
    assert folder.exists()
    del run
    gc.collect()
    assert not folder.parent.exists()


def test_a_notebook_stops_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = Loop._step

    def stop(self: Loop, batches: Any) -> None:
        original(self, batches)
        if self.position.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = around()
    monkeypatch.setattr(Loop, "_step", stop)
    with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT after step [78], saved in "):
        fit(table(3000), "click", output=tmp_path / "run", **QUICK)
    assert around() == before
    assert len(list(tmp_path.glob("run/checkpoints/step_0000000[78]/checkpoint.json"))) == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (table(100), {"label": "clicks"}, "no column 'clicks'|'clicks' is"),
        (table(100), {"epoch": 3}, r"^fit: unknown option 'epoch' \(did you mean 'epochs'\?\)$"),
        (table(100), {"epochs": 0}, r"^--epochs 0: must be at least 1$"),
        (table(100), {"recipe": "best"}, "^--recipe best: unknown recipe"),
        (table(0), {}, "^fit: the train rows are empty; give rows with data$"),
        ([{"user": "a", "click": 1}, {"user": "b"}], {}, "^row 2: column 'click' is absent"),
        (17, {}, "^rows of type int can't be read"),
        (table(100), {"schema": "nowhere.toml"}, "^nowhere.toml: "),
        (table(100), {"output": "."}, "^--output .: "),
    ],
)
def test_bad_input(
    rows: Any, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    before = around()
    with pytest.raises(UserError, match=message) as refused:
        fit(rows, **{"label": "click", **QUICK, **options})
    assert "\n" not in str(refused.value)
    assert around() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_not_as_a_rank(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    with pytest.raises(UserError, match="this process has a process group already"):
        fit(table(200), "click", **QUICK)
    assert dist.is_initialized()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="this is one of several ranks; use the command train there"):
        fit(table(200), "click", **QUICK)


def test_small_tables_take_many_steps() -> None:
    for rows in (10, 5000, 50_000, 1_000_000):
        config = small_table(rows)
        assert 1 <= config.batch_size <= rows
        assert rows // config.batch_size >= min(64, rows // 64) or rows < 64
    assert small_table(100, validation=False).patience == 0
    assert torchrec_deepfm.fit is fit

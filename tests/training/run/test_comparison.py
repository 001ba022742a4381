"""``report A B``: the differences are those of the files, and bad inputs get one line."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import Cells, embedded_data
from tests.training.run.written_run import CONFIG, CURVES, RECORDS, SUMMARY, evaluation, make_run
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.report.page import NOTHING
from torchrec_deepfm.training.run.comparison import write_comparison

pytestmark = pytest.mark.pictures


def compare(*folders: Path) -> tuple[Cells, dict[str, Any]]:
    html = write_comparison(folders).read_text(encoding="utf-8")
    return Cells(html), embedded_data(html)


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {"format_version": 1, "splits": {"test": CURVES}}
    first = make_run(tmp_path / "first", curves=curves)
    config = {**CONFIG, "config": {**CONFIG["config"], "dropout": 0.5}, "versions": {"torch": "2.14.0"}}
    validation = {**SUMMARY["validation"], "auc": 0.8225, "logloss": 0.375}
    summary = {**SUMMARY, "validation": validation, "steps": 50}
    records = [*RECORDS, evaluation(80, auc=0.8225)]
    second = make_run(tmp_path / "second", config=config, summary=summary, metrics=records, curves=curves)
    cli.main(["report", str(first), str(second)])
    assert capsys.readouterr().out == f"wrote {first / 'compare_second.html'}\n"
    shown, data = compare(first, second)
    assert ["validation AUC", "0.81250", "0.82250", "+0.01000"] in shown.rows
    assert ["validation log loss", "0.40000", "0.37500", "-0.02500"] in shown.rows
    assert ["test AUC", NOTHING, NOTHING, NOTHING] not in shown.rows
    assert ["steps", "60", "50", "-10"] in shown.rows
    assert ["--dropout", "0.0", "0.5"] in shown.rows
    assert ["torch", "2.13.0", "2.14.0"] in shown.rows
    assert not [row for row in shown.rows if row[0] in ("--factor-dim", "data")]
    assert data["curves"]["validation AUC"] == {
        "first": [[20, 0.75], [40, 0.8], [60, 0.8]],
        "second": [[20, 0.75], [40, 0.8], [60, 0.8], [80, 0.8225]],
    }
    assert [image["alt"] for image in shown.images][-2:] == [
        "ROC on test of first, second.",
        "Precision by recall on test of first, second.",
    ]


def test_many_runs_and_unfinished_ones(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = make_run(tmp_path / "a" / "seed_0"), make_run(tmp_path / "b" / "seed_0", summary=None)
    third = make_run(tmp_path / "c", config={**CONFIG, "data_sha256": "0" * 64}, metrics=None)
    shown, _ = compare(one, other, third)
    names = [f"a{one.anchor}seed_0", f"b{one.anchor}seed_0"]
    [head] = [row for row in shown.rows if row[1:3] == names][:1]
    assert head[1:3] == names
    assert f"Not finished: {names[1]}." in shown.text
    assert "trained on different data" in shown.text
    assert ["validation AUC", "0.81250", NOTHING, "0.81250"] in shown.rows


def test_the_same_options(tmp_path: Path) -> None:
    shown, _ = compare(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert "Options, data and versions are the same." in shown.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "nowhere"], "--run nowhere: not a run folder"),
        (["a", "a"], "report: a is named twice; name different runs"),
        (["a", "b", "a", "b", "a", "b"], "report: 6 runs; a page compares at most 5"),
        (["a", "b", "--importance"], "--importance, --data: these are for the report of one run"),
        (["a", "--output", "x.html"], "--output: a comparison of several runs is written there; name two runs"),
        ([], "report: name one run folder"),
        (["a", "--run", "b"], "report: name one run folder"),
        (["a", "b", "--output", "a"], "--output a: this is a folder; name a file"),
    ],
)
def test_what_can_not_be_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"))
    make_run(Path("b"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert not list(tmp_path.rglob("*.html"))


def test_damaged_files(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", curves="{")
    with pytest.raises(UserError, match=r"b/curves.json: the file is damaged"):
        write_comparison([first, second])

"""docs/quickstart.ipynb: every cell runs, in order, in one process; it is committed without outputs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec("".join(cell["source"]), names)
    shown = capsys.readouterr().out
    found = re.search(r"test AUC ([0-9.]+), with the true chances ([0-9.]+)", shown)
    assert found is not None
    assert -0.05 < float(found[1]) - float(found[2]) < 0.03
    assert "row 1: probability" in shown
    assert names["same"].shape == (2,)
    assert 0.0 < names["same"].min() <= names["same"].max() < 1.0
    assert list(tmp_path.iterdir()) == []  # nothing is left in the reader's folder

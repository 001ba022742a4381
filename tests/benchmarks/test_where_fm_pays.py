"""The picture of where the FM pays."""

from pathlib import Path

import pytest

from benchmarks.quality import where_fm_pays

pytestmark = pytest.mark.pictures


def test_where_the_fm_pays_is_drawn(tmp_path: Path) -> None:
    """A panel per number of values, a line per model through its mean, its rows per pair below."""
    aucs = {
        (10, rows): {
            name: [auc, auc + 0.02] for name, auc in zip(("LR", "FM", "DNN", "DeepFM", "truth"), found, strict=True)
        }
        for rows, found in {1000: (0.6, 0.65, 0.61, 0.64, 0.9), 4000: (0.61, 0.8, 0.7, 0.79, 0.9)}.items()
    }
    where_fm_pays.draw(aucs, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert drawn.count('<g id="axes_') == 1
    assert all(f"<!-- {text} -->" in drawn for text in ("10 values per field", "DeepFM", "truth", "40 per pair"))
    assert "prefers-color-scheme:dark" in drawn

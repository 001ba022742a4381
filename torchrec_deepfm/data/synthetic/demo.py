"""The default data of ``train``: a synthetic set, generated and prepared once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.synthetic.generate import generate

ROWS: Final = 1_200_000
SEED: Final = 0


def sample_data(root: Path, report: Callable[[str], None]) -> PreparedData:
    """Open the sample in ``raw/`` and ``prepared/`` below ``root``, generating it first if it is missing."""
    raw, prepared = root / "raw", root / "prepared"
    if prepared.exists():
        return PreparedData.open(prepared)
    if raw.exists():  # left by a start that was interrupted between the two
        shutil.rmtree(raw)
    report(f"No --data given: generating {ROWS:,} rows of synthetic click logs in {root}")
    generate(raw, rows=ROWS, seed=SEED)
    return prepare(
        [raw / "day_0.tsv"], prepared, validation=[raw / "validation.tsv"], test=[raw / "test.tsv"], report=report
    )

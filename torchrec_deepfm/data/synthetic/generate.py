"""Raw click logs in Criteo's format whose best reachable AUC is known, because the clicks come from a known model.

The folder holds ``day_0.tsv`` ... (training), ``validation.tsv``, ``test.tsv`` and ``truth.json``. A line is a label,
13 integers and 26 categories of 8 hexadecimal digits, separated by tabs, empty where missing. ``truth.json`` holds, per
file, the AUC and the logloss that the true click probabilities reach on the drawn labels. No model can be expected to
beat them.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.publish import check_free, new_folder
from torchrec_deepfm.data.prepare.work_folder import check_room
from torchrec_deepfm.data.schema import CRITEO_KAGGLE
from torchrec_deepfm.data.synthetic.columns import MISSING_NUMBER, category_values, draw_rows
from torchrec_deepfm.data.synthetic.ground_truth import Truth, draw_truth, probability
from torchrec_deepfm.errors import UserError

TRUTH_VERSION: Final = 1
DEFAULT_ROWS: Final = 1_200_000
# Rows drawn and written at a time. A part of the format: another number gives other files for the same seed.
_CHUNK_ROWS: Final = 131_072
# With fewer validation or test rows the AUC is too noisy.
_LEAST_EVALUATION_ROWS: Final = 1000
# A row has about 243 bytes.
_ROW_BYTES: Final = 243
_LARGEST_SEED: Final = 2**63 - 1
# Keys of the random streams; day i has the key _FIRST_DAY + i. draw_truth has 0 and 1.
_VALIDATION, _TEST, _FIRST_DAY = 2, 3, 4
_DIGITS: Final = 6


@dataclass(frozen=True, kw_only=True)
class SyntheticFile:
    """What is known about one written file.

    ``auc``: AUC of the true click probabilities on the drawn labels; None when the labels are all equal. ``logloss``:
    their mean logloss, in nats.
    """

    rows: int
    positives: int
    auc: float | None
    logloss: float


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """What ``generate`` wrote, and what is known about each file, by its name, training days first."""

    folder: Path
    seed: int
    rows: int
    click_rate: float
    files: dict[str, SyntheticFile]

    @property
    def train(self) -> tuple[Path, ...]:
        """The training files, day by day."""
        return tuple(self.folder / name for name in self.files if name.startswith("day_"))

    @property
    def validation(self) -> Path:
        """The validation file."""
        return self.folder / "validation.tsv"

    @property
    def test(self) -> Path:
        """The test file."""
        return self.folder / "test.tsv"

    def summary(self) -> str:
        """Return the lines that the command prints."""
        lines = [f"synthetic click logs in {self.folder} (seed {self.seed})"]
        width = max(len(name) for name in self.files)
        for name, file in self.files.items():
            auc = "-" if file.auc is None else f"{file.auc:.4f}"
            rate = file.positives / file.rows
            lines.append(
                f"  {name:<{width}}  {file.rows:>11,} rows  {rate:7.2%} clicks  best AUC {auc}  "
                f"best logloss {file.logloss:.4f}"
            )
        lines.append(f"best reachable AUC on test.tsv: {self.files['test.tsv'].auc:.4f}")
        return "\n".join(lines)


def generate(
    output: Path,
    *,
    rows: int = DEFAULT_ROWS,
    days: int = 1,
    seed: int = 0,
    click_rate: float = 0.25,
) -> SyntheticData:
    """Write synthetic click logs; the same options give the same bytes.

    The folder appears at the end, complete, or not at all. Validation and test get a tenth of ``rows`` each, at least
    1000 rows. A ``click_rate`` of 0.03 is like Criteo Terabyte, 0.26 like Kaggle. Memory grows with the rows of the
    largest file only by what its exact AUC needs, about 90 bytes per row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = generate(Path(folder) / "raw", rows=2000, days=2)
        ...     sorted(path.name for path in data.folder.iterdir())
        ['day_0.tsv', 'day_1.tsv', 'test.tsv', 'truth.json', 'validation.tsv']
    """
    _check_options(rows=rows, days=days, seed=seed, click_rate=click_rate)
    check_free(output)
    evaluation_rows = max(rows // 10, _LEAST_EVALUATION_ROWS)
    check_room(output, (rows + 2 * evaluation_rows) * _ROW_BYTES, output)
    plan = {f"day_{day}.tsv": (rows // days + (day < rows % days), _FIRST_DAY + day) for day in range(days)}
    plan["validation.tsv"] = (evaluation_rows, _VALIDATION)
    plan["test.tsv"] = (evaluation_rows, _TEST)

    truth = draw_truth(seed=seed, click_rate=click_rate)
    files = {}
    with new_folder(output) as folder:
        for name, (file_rows, stream) in plan.items():
            files[name] = _write_file(folder / name, truth, rows=file_rows, seed=seed, stream=stream)
            if files[name].auc is None and not name.startswith("day_"):
                raise UserError(
                    f"all {file_rows} rows of {name} have the same label",
                    where=f"--click-rate {click_rate}",
                    remedy="raise --rows or choose a click rate nearer to 0.5",
                )
        known = {
            "format_version": TRUTH_VERSION,
            "seed": seed,
            "rows": rows,
            "click_rate": click_rate,
            "files": {name: vars(file) for name, file in files.items()},
        }
        (folder / "truth.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return SyntheticData(folder=output, seed=seed, rows=rows, click_rate=click_rate, files=files)


def _check_options(*, rows: int, days: int, seed: int, click_rate: float) -> None:
    if rows < 1:
        raise UserError("too small", where=f"--rows {rows}", remedy="give 1 or more")
    if days < 1:
        raise UserError("too small", where=f"--days {days}", remedy="give 1 or more")
    if rows < days:
        raise UserError(
            f"fewer rows than the {days} days", where=f"--rows {rows}", remedy="give more --rows or fewer --days"
        )
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError("out of range", where=f"--seed {seed}", remedy="give a number from 0 to 2**63 - 1")
    if not 0 < click_rate < 1:  # also refuses NaN
        raise UserError("out of range", where=f"--click-rate {click_rate}", remedy="give a number between 0 and 1")


def _write_file(path: Path, truth: Truth, *, rows: int, seed: int, stream: int) -> SyntheticFile:
    """Write one file chunk by chunk; every chunk has its own random stream."""
    labels = np.empty(rows, dtype=np.uint8)
    logits = np.empty(rows, dtype=np.float64)
    with path.open("wb") as file:
        for chunk, start in enumerate(range(0, rows, _CHUNK_ROWS)):
            part = slice(start, min(start + _CHUNK_ROWS, rows))
            generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, chunk)))
            numbers, ids = draw_rows(generator, part.stop - part.start)
            logits[part] = truth.logit(numbers, ids)
            labels[part] = generator.random(len(ids)) < probability(logits[part])
            _write_text(file, labels[part], numbers, ids)
    from sklearn.metrics import roc_auc_score  # slow to import, and train loads this module for its sample

    positives = int(labels.sum())
    auc = round(float(roc_auc_score(labels, logits)), _DIGITS) if 0 < positives < rows else None
    # -log p(label) = log(1 + exp(-logit)) for a click and log(1 + exp(logit)) for none
    logloss = float(np.logaddexp(0.0, np.where(labels == 1, -logits, logits)).mean())
    return SyntheticFile(rows=rows, positives=positives, auc=auc, logloss=round(logloss, _DIGITS))


def _write_text(file: BinaryIO, labels: NDArray[np.uint8], numbers: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
    """Write rows as text, in their order."""
    columns = [pl.Series(CRITEO_KAGGLE.label, labels)]
    for i, name in enumerate(CRITEO_KAGGLE.numeric):
        column = pl.Series(name, numbers[:, i])
        columns.append(column.set(column == MISSING_NUMBER, None))
    columns += [_texts(i).gather(ids[:, i]).alias(name) for i, name in enumerate(CRITEO_KAGGLE.categorical)]
    pl.DataFrame(columns).write_csv(file, include_header=False, separator="\t", quote_style="never", null_value="")


@functools.cache
def _texts(column: int) -> pl.Series:
    """The text of each value of a categorical column; the first is missing."""
    return pl.Series([None, *(f"{value:08x}" for value in category_values(column)[1:].tolist())], dtype=pl.String)

"""Whether a training makes sense: the scale of its inputs, its batch on a GPU, its first losses, its final NE."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import WorseThanConstantError
from torchrec_deepfm.training.scoring.row_sample import sample_rows

_SPLITS: Final = ("validation", "test")
_BLOCKS: Final = 64  # of the sample of training rows
# Root mean squares within this range train well; the FM multiplies two inputs, so 10 times as large is 100 times.
_SMALL, _LARGE = 0.01, 10.0
_LARGEST: Final = 1000.0
# An untrained model predicts 0.5 and has the loss log(2) whatever the click rate; losses well above that come from
# inputs or learning rates.
_FIRST_LOSS: Final = 2.0 * math.log(2.0)
# A column most of whose held-out values were rarely or never trained on: the model knows nothing of them.
_UNKNOWN, _TIMES = 0.5, 4.0
_NAMED: Final = 3  # columns that a warning lists
# A GPU computes fewer samples sooner than the step's kernels are launched (docs/gpu.md).
_LAUNCH_BOUND: Final = 8192
_FEW_STEPS: Final = 100


def binary_entropy(rate: float) -> float:
    """Entropy in nats of labels with this click rate: the loss of the best constant prediction.

    Example:
        >>> round(binary_entropy(0.25), 4), binary_entropy(0.0)
        (0.5623, 0.0)
    """
    return sum(p * math.log(1.0 / p) for p in (rate, 1.0 - rate) if p > 0.0)


def click_rate(data: PreparedData) -> float | None:
    """Click rate of the training split; None in a folder that does not record it."""
    days = data.days("train")
    positives = [day.positives for day in days if day.positives is not None]
    rows = data.rows("train")
    return sum(positives) / rows if rows and len(positives) == len(days) else None


def input_warnings(data: PreparedData) -> list[str]:
    """Name the columns far from unit scale in a sample of the training rows, in at most one line."""
    names = data.schema.dense_names
    if not names:
        return []
    blocks = [rows.dense for rows in sample_rows(data, "train", _BLOCKS)]
    return scale_warnings(names, np.concatenate(blocks))


def scale_warnings(names: Sequence[str], dense: NDArray[Any]) -> list[str]:
    """Name the columns of dense [n, I] that are far from unit scale, in at most one line.

    A column is far if its root mean square is above 10 or below 0.01, or its largest value above 1,000. Columns of
    zeros and values that are not finite are left to others.

    Example:
        >>> scale_warnings(["age", "timestamp"], np.array([[0.5, 8e8], [-1.0, 9e8]]))[0][:86]
        "numeric column 'timestamp' is far from unit scale (root mean square 8.5e+08, largest 9"
    """
    values = np.abs(dense.astype(np.float64))
    values[~np.isfinite(values)] = 0.0
    square, largest = np.sqrt(np.mean(values**2, axis=0)), values.max(axis=0)
    far = (largest > 0.0) & ((square > _LARGE) | (square < _SMALL) | (largest > _LARGEST))
    found = [
        f"{names[i]!r} is far from unit scale (root mean square {square[i]:.2g}, largest {largest[i]:.2g})"
        for i in np.flatnonzero(far)[np.argsort(-largest[far])].tolist()
    ]
    if not found:
        return []
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    remedy = "set a transform for it in the schema, such as log1p, and prepare again"
    return [f"numeric column {', '.join(found[:_NAMED])}{more}; {remedy}"]


def unknown_warnings(data_summary: Mapping[str, Any]) -> list[str]:
    """Name columns whose held-out values are mostly unknown, though the training values are not; at most one line.

    ``data_summary`` is the content of ``data.json``.

    Example:
        >>> splits = {"train": {"zero": {"user": 0.01, "item": 0.02}}, "test": {"zero": {"user": 0.85, "item": 0.03}}}
        >>> unknown_warnings({"mode": "vocabulary", "splits": splits})[0][:76]
        "column 'user' is unknown or rare in 85% of the test rows, but in 1% of the t"
    """
    if data_summary["mode"] != "vocabulary":
        return []
    known = data_summary["splits"].get("train", {}).get("zero", {})
    for split in _SPLITS:
        shares = data_summary["splits"].get(split, {}).get("zero", {})
        found = [
            f"{name!r} is unknown or rare in {share:.0%} of the {split} rows, but in {known[name]:.0%} of the training "
            "rows"
            for name, share in sorted(shares.items(), key=lambda one: -one[1])
            if name in known and share >= _UNKNOWN and share >= _TIMES * known[name]
        ]
        if found:
            more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            remedy = "raise its min_count in the schema, so that training has such rows too, or leave it out"
            return [f"column {', '.join(found[:_NAMED])}{more}; {remedy}"]
    return []


def batch_warnings(batch_size: int, rows: int) -> list[str]:
    """Check that a GPU has enough to compute per step of so many samples; ``rows`` are training rows per rank.

    At most one line; none where larger batches would leave less than 100 steps per epoch.

    Example:
        >>> batch_warnings(2048, 45_840_617)[0][:71]
        '--batch-size 2048: a step takes a GPU as long as one of 8192, since it '
        >>> batch_warnings(2048, 100_000), batch_warnings(8192, 45_840_617)
        ([], [])
    """
    if batch_size >= _LAUNCH_BOUND or rows < _FEW_STEPS * _LAUNCH_BOUND:
        return []
    remedy = f"take {_LAUNCH_BOUND} to {8 * _LAUNCH_BOUND} per rank, with learning rates to match"
    why = "since it waits for kernels to be launched"
    return [f"--batch-size {batch_size}: a step takes a GPU as long as one of {_LAUNCH_BOUND}, {why}; {remedy}"]


def first_loss_warnings(step: int, loss: float, rate: float | None) -> list[str]:
    """Check the mean loss of the first ``step`` steps; ``rate`` is the click rate of the training split.

    At most one line: if the loss is above 2 log(2), twice that of a model that always predicts 0.5.

    Example:
        >>> first_loss_warnings(20, 0.7, 0.03)
        []
        >>> first_loss_warnings(20, 4290.0, 0.17)[0][:81]
        'the mean loss of the first 20 steps is 4.29e+03, 9.41e+03 times the entropy of th'
    """
    if loss <= _FIRST_LOSS:
        return []
    entropy = binary_entropy(rate) if rate else 0.0
    against = f", {loss / entropy:,.3g} times the entropy of the click rate ({entropy:.3g})" if entropy else ""
    remedy = "scale the inputs, or lower --sparse-lr and --dense-lr"
    return [f"the mean loss of the first {step} steps is {loss:.3g}{against}; {remedy}"]


def result_warnings(summary: Mapping[str, Any], max_ne: float = 1.0) -> list[str]:
    """Check the final normalised entropies of a run: a line per split whose NE is above ``max_ne``.

    The best constant prediction has 1.

    Example:
        >>> result_warnings({"test": {"ne": 1.25, "auc": 0.5}})
        ['test: ne 1.25000 is above 1: the model is worse than a constant prediction of the click rate']
    """
    found = []
    for split in _SPLITS:
        ne = summary.get(split, {}).get("ne")
        if ne is not None and ne > max_ne:
            what = ": the model is worse than a constant prediction of the click rate" if max_ne == 1.0 else ""
            found.append(f"{split}: ne {ne:.5f} is above {max_ne:g}{what}")
    return found


def refuse_worse(summary: Mapping[str, Any], run: str, max_ne: float) -> None:
    """Raise WorseThanConstantError if the final NE of a split, of any seed, is above ``max_ne``."""
    for name, result in {"": summary, **summary.get("runs", {})}.items():
        for line in result_warnings(result, max_ne):
            raise WorseThanConstantError(
                f"{line}; the run is kept. Check the label and the numeric columns' transforms, or train longer",
                where=f"{run}{'/' if name else ''}{name}",
                remedy="--max-ne inf accepts any model",
            )

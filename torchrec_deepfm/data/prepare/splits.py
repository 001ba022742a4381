"""The rows of each split, once all rows are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_deepfm.data.dataset.prepared import LABELS, SPLITS
from torchrec_deepfm.data.prepare.inputs import SPLITS_BY_LOT, Inputs
from torchrec_deepfm.data.prepare.npy_appender import read_rows
from torchrec_deepfm.errors import UserError


def days_of_splits(
    inputs: Inputs, records: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """List the days of each split, as in the manifest.

    Returns ``stem``, ``start``, ``rows`` and ``positives`` of each day, by split.
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for unit, record in zip(inputs.units, records, strict=True):
        for part in unit.parts:
            counts = record["stems"][part.stem]
            day = {"stem": part.stem, "start": 0, "rows": counts["rows"], "positives": counts["positives"]}
            if part.stem == inputs.halved:
                splits["validation"], splits["test"] = ([half] for half in _halves(day, folder))
            elif counts["rows"]:
                splits[part.split].append(day)
    wanted = SPLITS_BY_LOT.get(inputs.split, {})
    for split in wanted:
        if not splits[split]:
            total = sum(record["rows"] for record in records)
            raise UserError(
                f"--input: {total} rows are too few to split {inputs.split}, the {split} part is empty; "
                "give more rows, or --validation and --test"
            )
    return splits


def _halves(day: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """As TorchRec and MLPerf halve the last day: the first half, the longer one, for validation."""
    if day["rows"] < 2:
        raise UserError(f"--split last-day: {day['stem']} has one row and can't be halved; name a longer file")
    middle = -(-day["rows"] // 2)
    first, seen = 0, 0
    for labels in read_rows(folder / f"{day['stem']}{LABELS}", (1,), np.int32):
        first += int(labels[: max(middle - seen, 0)].sum())
        seen += len(labels)
    return [
        {"stem": day["stem"], "start": 0, "rows": middle, "positives": first},
        {"stem": day["stem"], "start": middle, "rows": day["rows"] - middle, "positives": day["positives"] - first},
    ]

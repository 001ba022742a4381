"""What the manifest of a prepared folder records, besides its files, of how it was made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_deepfm.data.dataset.prepared import LABELS, SPLITS
from torchrec_deepfm.data.prepare.options import SPLITS_BY_ROW
from torchrec_deepfm.data.prepare.passes.npy_appender import read_rows
from torchrec_deepfm.data.prepare.passes.stage_record import Staged
from torchrec_deepfm.data.prepare.sources.inputs import SPLITS_BY_LOT, Inputs
from torchrec_deepfm.data.prepare.sources.provenance import source_name
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.raw.table_source import TableSource
from torchrec_deepfm.data.values.numeric import NumericColumn
from torchrec_deepfm.errors import UserError


def days_of_splits(inputs: Inputs, units: Staged, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """List the days of each split as in the manifest: ``stem``, ``start``, ``rows`` and ``positives``."""
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for unit, record in units:
        for part in unit.parts:
            counts = record.stems[part.stem]
            day = {"stem": part.stem, "start": 0, "rows": counts.rows, "positives": counts.positives}
            if part.stem == inputs.halved:
                splits["validation"], splits["test"] = ([half] for half in _halves(day, folder))
            elif counts.rows:
                splits[part.split].append(day)
    wanted: Iterable[str] = SPLITS_BY_LOT.get(inputs.split, {})
    if inputs.split in SPLITS_BY_ROW:
        wanted = ("train",) if inputs.split == "column" else SPLITS
    for split in wanted:
        if not splits[split]:
            total = sum(record.rows for _, record in units)
            raise UserError(
                f"{total} rows are too few to split {inputs.split}, the {split} part is empty",
                where="--input",
                remedy="give more rows, or --validation and --test",
            )
    return splits


def _halves(day: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """As TorchRec and MLPerf halve the last day: the first half, the longer one, for validation."""
    if day["rows"] < 2:
        raise UserError(
            f"{day['stem']} has one row and can't be halved", where="--split last-day", remedy="name a longer file"
        )
    middle = -(-day["rows"] // 2)
    first, seen = 0, 0
    for labels in read_rows(folder / f"{day['stem']}{LABELS}", (1,), np.int32):
        first += int(labels[: max(middle - seen, 0)].sum())
        seen += len(labels)
    return [
        {"stem": day["stem"], "start": 0, "rows": middle, "positives": first},
        {"stem": day["stem"], "start": middle, "rows": day["rows"] - middle, "positives": day["positives"] - first},
    ]


def recorded_sources(inputs: Inputs, work: WorkFolder) -> dict[str, list[dict[str, Any]]]:
    """List name and state of every source, as it was read, by split."""
    states: dict[int, dict[str, Any]] = {}
    for unit in inputs.units:
        record = work.record(f"source_{unit.name}")
        assert record is not None
        states |= {id(source): state for source, state in zip(unit.sources, record["sources"], strict=True)}
    return {part: [states[id(one)] for one in sources] for part, sources in inputs.sources.items()}


def encoding(inputs: Inputs, units: Staged, numbers: Sequence[NumericColumn]) -> dict[str, Any]:
    """Return what new rows need beside schema and vocabularies.

    ``types`` of the categories, ``minimum`` for the shift of the logarithm, and, where transforms learned any, the
    ``statistics`` of numbers.
    """
    tables = [one for part in inputs.sources.values() for one in part if isinstance(one, TableSource)]
    training = [record.minimum for unit, record in units if any(inputs.trains(part) for part in unit.parts)]
    found: dict[str, Any] = {
        "types": dict(zip(tables[0].schema.categorical, tables[0].types, strict=True)) if tables else None,
        "minimum": min((least for least in training if least is not None), default=None),
    }
    learned = {
        key: asdict(one)
        for column in numbers
        if column.learned
        for key, one in zip(column.keys, column.learned, strict=True)
    }
    return found | ({"statistics": learned} if learned else {})


def skipped(units: Staged) -> list[dict[str, Any]]:
    """List the bad rows that were left out, by source."""
    return [
        {"name": source_name(unit.sources[int(place)]), **asdict(rows)}
        for unit, record in units
        for place, rows in record.skipped.items()
    ]

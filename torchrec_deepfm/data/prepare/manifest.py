"""What the manifest of a prepared folder records, besides its files, of how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torchrec_deepfm.data.prepare.passes.stage import Unit
from torchrec_deepfm.data.prepare.sources.inputs import Inputs
from torchrec_deepfm.data.prepare.sources.provenance import source_name
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.raw.table_source import TableSource
from torchrec_deepfm.data.values.numeric import NumericColumn

Staged = Sequence[tuple[Unit, Mapping[str, Any]]]


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
    training = [record["minimum"] for unit, record in units if any(inputs.trains(part) for part in unit.parts)]
    found: dict[str, Any] = {
        "types": dict(zip(tables[0].schema.categorical, tables[0].types, strict=True)) if tables else None,
        "minimum": min((least for least in training if least is not None), default=None),
    }
    learned = {column.name: asdict(column.learned) for column in numbers if column.learned is not None}
    return found | ({"statistics": learned} if learned else {})


def skipped(units: Staged) -> list[dict[str, Any]]:
    """List the bad rows that were left out, by source."""
    return [
        {"name": source_name(unit.sources[int(place)]), **rows}
        for unit, record in units
        for place, rows in record["skipped"].items()
    ]

"""What the first pass has recorded of a unit: how far it is, and what its rows hold."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from torchrec_deepfm.data.prepare.sources.units import Unit
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.raw.bad_rows import Skipped
from torchrec_deepfm.strict_json import as_type

# Listed skipped rows per source; all are counted.
LISTED: Final = 1000


@dataclass(kw_only=True)
class SkippedRows:
    """Bad rows of one source that were left out; ``first``: line and reason of the first ones."""

    rows: int = 0
    first: list[dict[str, int | str]] = field(default_factory=list)


@dataclass(kw_only=True)
class StemRows:
    """What the arrays of a stem hold.

    ``pieces``: rows of each staged file, and the bytes that its values take in memory. ``values``: how many values each
    list column has, by its number.
    """

    rows: int = 0
    positives: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class StageRecord:
    """How far a unit is staged, and where the next piece starts; ``skipped`` is by the place of the source."""

    finished: bool = False
    pieces: int = 0
    rows: int = 0
    start: tuple[int, int, int] = (0, 0, 0)
    minimum: int | None = None
    stems: dict[str, StemRows]
    skipped: dict[str, SkippedRows] = field(default_factory=dict)

    @property
    def skipped_rows(self) -> int:
        """How many bad rows were left out."""
        return sum(skipped.rows for skipped in self.skipped.values())

    def skip(self, place: int, bad: Skipped) -> None:
        """Record a bad row of the source at a place of the unit."""
        skipped = self.skipped.setdefault(str(place), SkippedRows())
        skipped.rows += 1
        if len(skipped.first) < LISTED:
            skipped.first.append({"line": bad.line, "reason": bad.reason})

    def write(self, work: WorkFolder, unit: Unit) -> None:
        """Write the record of a unit."""
        work.write_record(unit.name, asdict(self))


# Units and how they were staged.
Staged = Sequence[tuple[Unit, StageRecord]]


def read_record(work: WorkFolder, unit: Unit) -> StageRecord | None:
    """Read the record of a unit; ``None``: nothing is staged."""
    record = work.record(unit.name)
    if record is None:
        return None
    remedy = f"remove {work.path} to start again"
    return as_type(record, StageRecord, where=f"{work.path}: record of {unit.name}", remedy=remedy)


def staged_record(work: WorkFolder, unit: Unit) -> StageRecord:
    """Read the record of a unit that was staged."""
    record = read_record(work, unit)
    assert record is not None
    return record

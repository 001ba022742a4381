"""A pass before the others, where transforms depend on the training rows: it learns what ``numeric.py`` needs.

Each unit with training rows is read by itself and leaves a file with what was collected; from these, joined in the
order of the units, follow the statistics. So they are the same for any number of ranks, and a restart reads only the
units that have no file yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_deepfm.data.dataset.publish import sync
from torchrec_deepfm.data.prepare.sources.inputs import Inputs
from torchrec_deepfm.data.prepare.sources.units import OnPiece, Unit, deal
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.values.numeric import NumericColumn, learned_numbers
from torchrec_deepfm.data.values.statistics import ColumnStatistics, Survey, merged
from torchrec_deepfm.errors import UserError

_RECORD = "statistics"


def surveyed_units(inputs: Inputs, columns: Sequence[NumericColumn]) -> list[Unit]:
    """List the units to read: those with training rows, if any column is learned."""
    learned = [column for column in columns if column.is_learned]
    if not learned:
        return []
    units = [unit for unit in inputs.units if any(inputs.trains(part) for part in unit.parts)]
    if not units:
        raise UserError(
            f"column {learned[0].name!r} has the transform {learned[0].transform}, which is learned from training rows",
            where="--input",
            remedy="name some",
        )
    return units


def survey(
    unit: Unit,
    inputs: Inputs,
    columns: Sequence[NumericColumn],
    work: WorkFolder,
    *,
    skip_bad: bool,
    on_piece: OnPiece,
) -> None:
    """Read the training rows of a unit and write what was collected, unless an earlier call did."""
    path, row = _file(work, unit), 0
    if work.record(f"survey_{unit.name}") is not None:
        return
    collected = Survey(sum(len(column.keys) for column in columns if column.is_learned), key=inputs.units.index(unit))
    for piece in unit.pieces((0, 0, 0), skip_bad=skip_bad):
        values = learned_numbers(piece.frame, columns)
        for part, chosen in deal(unit, row, len(piece.frame)):
            if inputs.trains(part):
                collected.add(values if chosen is None else values[chosen])
        row += len(piece.frame)
        on_piece(len(piece.frame), piece.done)
    collected.finish()
    np.savez(path, **collected.content())  # type: ignore[arg-type]
    sync(path)
    work.write_record(f"survey_{unit.name}", {"rows": row})


def statistics(
    units: Sequence[Unit], columns: Sequence[NumericColumn], work: WorkFolder, on_change: Callable[[], None]
) -> dict[str, ColumnStatistics]:
    """Join what was collected; ``on_change`` is called where rows were prepared with other statistics."""
    learned = [column for column in columns if column.is_learned]
    sources: list[dict[str, Any]] = []
    for unit in units:
        with np.load(_file(work, unit), allow_pickle=False) as arrays:
            sources.append(dict(arrays))
    keys = {key: column.shares for column in learned for key in column.keys}
    named = dict(zip(keys, merged(sources, list(keys.values())), strict=True))
    record = {name: {**asdict(one), "quantiles": list(one.quantiles)} for name, one in named.items()}
    if work.record(_RECORD) != record:
        on_change()
        work.write_record(_RECORD, record)
    return named


def summary(columns: Sequence[NumericColumn]) -> str:
    """Say in a line what was learned; empty where nothing was."""
    learned = [column for column in columns if column.is_learned]
    rows = [column.learned[0].rows for column in learned if column.learned]
    if not rows:
        return ""
    chosen = ", ".join(dict.fromkeys(column.transform for column in learned))
    count = f"{len(learned)} columns" if len(learned) > 1 else "1 column"
    return f"learned the scale of {count} ({chosen}) from {rows[0]:,} training rows"


def _file(work: WorkFolder, unit: Unit) -> Path:
    return work.staged / f"survey_{unit.name}.npz"

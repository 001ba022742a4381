"""What an earlier call of ``prepare`` left: finished outputs, records of sources that have changed since."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrec_deepfm.data.dataset.prepared import MANIFEST, PreparedData
from torchrec_deepfm.data.prepare.passes.stage_record import read_record
from torchrec_deepfm.data.prepare.sources.inputs import Inputs
from torchrec_deepfm.data.prepare.sources.provenance import difference, source_state, unit_state, what_changed
from torchrec_deepfm.data.prepare.sources.units import Unit
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.errors import UserError


def finished_output(output: Path, made: Mapping[str, Any], inputs: Inputs) -> PreparedData | None:
    """Open the output if the same call, as the manifest records it, made it; UserError: a source has changed since."""
    if not (output / MANIFEST).exists():
        return None
    try:
        data = PreparedData.open(output)
    except UserError:
        return None
    before, sources = dict(data.made), data.made.get("sources", {})
    before["sources"] = {part: [one["name"] for one in listed] for part, listed in sources.items()}
    if before != json.loads(json.dumps(made)):
        return None
    for part, opened in inputs.sources.items():
        for source, state in zip(opened, sources[part], strict=True):
            what = difference(state, source_state(source))
            if what:
                raise UserError(
                    f"it was made from other content of {source.path} ({what})",
                    where=output,
                    remedy="name another output, or remove this one to prepare again",
                )
    return data


def drop_changed(inputs: Inputs, work: WorkFolder, *, skip_bad: bool, report: Callable[[str], None]) -> None:
    """Forget what was read from sources that have changed since, and before that all that followed from it.

    The new state is written last: a kill on the way finds the change again.

    ``skip_bad``: whether bad rows are left out now; what was read without any of them is good for both.
    """
    states = {unit.name: unit_state(unit) for unit in inputs.units}
    changed = []
    for unit in inputs.units:
        before, record = work.record(f"source_{unit.name}"), read_record(work, unit)
        what = "" if before is None else what_changed(before, states[unit.name], unit)
        if what:
            changed.append(unit)
            report(f"{what}: reading it anew")
        elif record is not None and record.skipped_rows and not skip_bad:
            changed.append(unit)
    if changed:
        _forget_ids(work)
        for unit in changed:
            for name in (unit.name, f"survey_{unit.name}", f"survey_split_{unit.name}"):
                work.forget(name)
    for name, state in states.items():
        if work.record(f"source_{name}") != json.loads(json.dumps(state)):
            work.write_record(f"source_{name}", state)


def forget_rows(work: WorkFolder) -> None:
    """Forget all rows that were prepared."""
    _forget_ids(work)
    for pattern in ("stage_*", "survey_stage_*"):
        work.forget(pattern)


def _forget_ids(work: WorkFolder) -> None:
    for pattern in ("sum_*", "encode_*"):
        work.forget(pattern)
    for path in work.out.glob("vocabulary_*"):
        path.unlink()


@contextmanager
def unchanged(unit: Unit, work: WorkFolder) -> Iterator[None]:
    """Check that nobody wrote to the sources of a unit while they were read."""
    try:
        yield
    except UserError:
        _check_unchanged(unit, work)  # then that is why
        raise
    _check_unchanged(unit, work)


def _check_unchanged(unit: Unit, work: WorkFolder) -> None:
    before = work.record(f"source_{unit.name}")
    assert before is not None
    what = what_changed(before, unit_state(unit), unit)
    if what:
        raise UserError(f"{what} while it was read", remedy="run the same command again when nothing writes to it")

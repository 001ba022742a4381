"""Whether two runs are the same: the one to resume, and the one that has saved some weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError, flag
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.folder import RunDescription

# Options that may change when a run resumes: they do not change what is learnt, except the batch size, which changes
# with the number of ranks anyway.
_FREE = ("batch_size", "checkpoint_every", "keep_last")
# Options that may be lowered once a loss was not finite: the same rates would lead to the same loss.
_RATES = ("sparse_lr", "dense_lr")


def check_same(folder: Path, run: RunDescription, data: PreparedData) -> None:
    """Check that the run in a folder has the options and data asked for, so that it can resume."""
    there = run_folder.read(folder, "name another --output, or remove the folder")
    check_same_run(f"--output {folder}", there, run, data, may_lower=run_folder.was_not_finite(folder))


def holds_run_of(folder: Path, config: TrainConfig) -> bool:
    """Whether a folder holds a run, or runs of several seeds, with these options, except those that may change."""
    for one in (folder, *run_folder.seed_folders(folder).values()):
        if (one / run_folder.CONFIG).is_file():
            there = run_folder.read(one).config
            names = {option.name for option in fields(TrainConfig)} - {*_FREE, *_RATES, "seed"}
            return all(getattr(there, name) == getattr(config, name) for name in names)
    return False


def lowered_rates(there: RunDescription, run: RunDescription) -> str:
    """List the learning rates that differ between two runs that ``check_same_run`` accepts; empty if none does."""
    changes = [
        f"{flag(name)} {getattr(run.config, name)} instead of {getattr(there.config, name)}"
        for name in _RATES
        if getattr(run.config, name) != getattr(there.config, name)
    ]
    return ", ".join(changes)


def check_same_run(
    where: str,
    there: RunDescription,
    run: RunDescription,
    data: PreparedData,
    *,
    may_lower: bool = False,
) -> None:
    """Check that two runs are the same, see ``check_same``; with ``may_lower`` learning rates may be lower now."""
    for option in fields(TrainConfig):
        old, new = getattr(there.config, option.name), getattr(run.config, option.name)
        if old == new or option.name in _FREE or (may_lower and option.name in _RATES and new < old):
            continue
        raise UserError(
            f"holds a run with {flag(option.name)} {_as_typed(old)}, not {_as_typed(new)}",
            where=where,
            remedy="give the same options to resume it, or name another folder",
        )
    same_data = there.data_sha256 in (None, run.data_sha256)
    if not same_data or there.columns_json() != run.columns_json():
        raise UserError(
            f"{where} holds a run on other data",
            where=f"--data {data.named}",
            remedy="name the data that it was trained on, or another folder",
        )


def check_saved_by(folder: Path, where: str, record: Mapping[str, Any]) -> None:
    """Check that a run has saved these weights, as far as their manifest records it; earlier versions' do not.

    The UserError names what differs.
    """
    run, theirs = run_folder.read(folder), record.get("config")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    ours = json.loads(json.dumps(asdict(run.config)))  # as a file has it
    other = [name for name in ours if name not in (*_FREE, *_RATES) and theirs.get(name, ours[name]) != ours[name]]
    wrong = f"with {flag(other[0])} {_as_typed(theirs[other[0]])}" if other else ""
    if record.get("data_sha256", run.data_sha256) not in (None, run.data_sha256):
        wrong = "on other data"
    if wrong:
        raise UserError(
            f"these are weights of another run, {wrong}", where=where, remedy="restore the folder, or train again"
        )


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

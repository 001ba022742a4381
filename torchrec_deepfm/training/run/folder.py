"""The folder of a run: its place, and the JSON files in it."""

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from torchrec_deepfm.data.dataset.prepared import PreparedData, read_manifest
from torchrec_deepfm.distributed import run_lock
from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import is_partial, write_bytes
from torchrec_deepfm.sharding.plan.io import plan_json
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import formats, metrics_log
from torchrec_deepfm.training.run.formats import RunFile, SavedFile, SummaryFile

CHECKPOINT = "checkpoint"
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
PLAN = "plan.json"
SAVED = "saved.json"
SUMMARY = "summary.json"
T = TypeVar("T")
_SEED = re.compile("0|[1-9][0-9]*", re.ASCII)

# What a run may be gone on with otherwise than it was begun: none of these changes what is learnt, but for the size of
# the batches, which changes with the number of ranks anyhow.
_FREE = ("batch_size", "checkpoint_every", "keep_last")
# What may be lowered besides, once the loss of a run was not finite: the same rates would meet the same loss again.
_RATES = ("sparse_lr", "dense_lr")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What ``config.json`` says of a run: all that it takes to build its model again.

    Attributes:
        config: the options.
        num_embeddings: rows of each categorical feature's table, in the order of the fields.
        numeric: names of the numeric features.
        data_sha256: digest of what the data are; None in runs of versions that did not keep it.
    """

    config: TrainConfig
    num_embeddings: Mapping[str, int]
    numeric: tuple[str, ...]
    data_sha256: str | None = None


def describe(config: TrainConfig, data: PreparedData) -> Run:
    """Return what ``config.json`` is to say of a run on these data."""
    return Run(
        config=config,
        num_embeddings={name: data.num_embeddings[name] for name in data.schema.categorical},
        numeric=data.schema.numeric,
        data_sha256=digest_of_data(data),
    )


def check_free(folder: Path) -> None:
    """Check that a run may be written to ``folder``.

    Raises:
        UserError: something is there already.
    """
    if folder.is_dir() and any(path.name != run_lock.NAME for path in folder.iterdir()):
        if seed_folders(folder):
            raise UserError(
                f"--output {folder}: the folder holds runs of several seeds; go on with them by --seeds, or name "
                "another one"
            )
        what = "already holds a run" if (folder / "config.json").exists() else "is not empty"
        raise UserError(f"--output {folder}: the folder {what}; name another one, or remove it first")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: there is a file of that name; name a folder")


def is_empty(folder: Path) -> bool:
    """Whether a folder is absent, or has nothing in it except a lock."""
    return not folder.exists() or all(path.name == run_lock.NAME for path in folder.iterdir())


def seed_folders(folder: Path) -> dict[int, Path]:
    """Return the folders of runs that ``train --seeds`` has made in a folder, by seed in their order."""
    if not folder.is_dir():
        return {}
    found = {path.name.removeprefix("seed_"): path for path in folder.glob("seed_*") if path.is_dir()}
    return {int(seed): found[seed] for seed in sorted(filter(_SEED.fullmatch, found), key=int)}


def check_there(folder: Path) -> None:
    """Check that a folder holds one run.

    Raises:
        UserError: it holds none, or those of several seeds.
    """
    if (folder / "config.json").is_file():
        return
    runs = [path for path in seed_folders(folder).values() if (path / "config.json").is_file()]
    if runs:
        raise UserError(f"--run {folder}: the folder holds runs of several seeds; name one of them, such as {runs[0]}")
    raise UserError(f"--run {folder}: there is no run here (no config.json); name the folder that train wrote")


def check_same(folder: Path, run: Run, data: PreparedData) -> None:
    """Check that the run in ``folder`` is the one that is asked for, so that it can be gone on with.

    Args:
        folder: the run's folder, with a ``config.json``.
        run: what is asked for.
        data: the data named.

    Raises:
        UserError: the run has other options or other data.
    """
    there = read(folder, "name another --output, or remove the folder")
    check_same_run(f"--output {folder}", there, run, data, may_lower=was_not_finite(folder))


def was_not_finite(folder: Path) -> bool:
    """Whether a loss or a weight of the run was not finite."""
    return any(folder.glob("nonfinite_step_*"))


def lowered_rates(there: Run, run: Run) -> str:
    """List the learning rates that differ between two runs that ``check_same_run`` lets pass; empty if none does."""
    changes = [
        f"--{name.replace('_', '-')} {getattr(run.config, name)} instead of {getattr(there.config, name)}"
        for name in _RATES
        if getattr(run.config, name) != getattr(there.config, name)
    ]
    return ", ".join(changes)


def check_same_run(where: str, there: Run, run: Run, data: PreparedData, *, may_lower: bool = False) -> None:
    """Check that two runs are the same; see ``check_same``.

    Args:
        where: where the first one is, for messages.
        there: the run that exists.
        run: the run that is asked for.
        data: the data named.
        may_lower: learning rates lower than those of the first run are allowed.

    Raises:
        UserError: they differ in an option or their data.
    """
    for option in fields(TrainConfig):
        old, new = getattr(there.config, option.name), getattr(run.config, option.name)
        if old == new or option.name in _FREE or (may_lower and option.name in _RATES and new < old):
            continue
        name = f"--{option.name.replace('_', '-')}"
        raise UserError(
            f"{where}: holds a run with {name} {_typed(old)}, not {_typed(new)}; give the same options to go on "
            "with it, or name another folder"
        )
    same_data = there.data_sha256 in (None, run.data_sha256)
    if not same_data or there.numeric != run.numeric or dict(there.num_embeddings) != dict(run.num_embeddings):
        raise UserError(
            f"--data {data.folder}: {where.removeprefix('--output ')} holds a run on other data; name the data that it "
            "was trained on, or another folder"
        )


def create(folder: Path, run: Run, plan: PlanFile, *, data: Path, world_size: int) -> None:
    """Make the folder, or continue in it, and write ``config.json`` and ``plan.json``.

    Raises:
        UserError: the folder cannot be made or written.
    """
    config = {
        "format_version": 1,
        "config": asdict(run.config),
        "num_embeddings": dict(run.num_embeddings),
        "numeric": list(run.numeric),
        "data": str(data),
        "data_sha256": run.data_sha256,
        "world_size": world_size,
        "versions": versions(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: the folder can't be made ({error.strerror}); name another one") from error
    for path in folder.iterdir():
        if is_partial(path.name):  # this training holds the lock, so whoever wrote it was killed
            path.unlink(missing_ok=True)
    write_json(folder / CONFIG, config)
    _write(folder / PLAN, plan_json(plan))


def write_saved(folder: Path, target: str, step: int | None) -> None:
    """Record where the newest checkpoint of a run is, so that its loss is noticed.

    Args:
        folder: the run's folder.
        target: folder or URL of the checkpoints.
        step: of the newest one; None while there is none.

    Raises:
        UserError: the disk refuses.
    """
    write_json(folder / SAVED, {"format_version": 1, "checkpoints": target, "step": step})


def check_nothing_lost(folder: Path, target: str) -> str | None:
    """Check that a run without any checkpoint in sight never had one, before it starts from step 0.

    What ``metrics.jsonl`` has of the steps before is set aside.

    Args:
        folder: the run's folder; may be absent or empty.
        target: folder or URL where its checkpoints should be.

    Returns:
        A line for the user about what was set aside; None if nothing was.

    Raises:
        UserError: the run has saved checkpoints or has ended, and these are gone.
    """
    anew = "name another --output to train from the start"
    saved = read_file(folder / SAVED, SavedFile, f"restore it, or {anew}")
    if saved is not None and saved[1].step is not None:
        where = saved[1].checkpoints
        raise UserError(
            f"--output {folder}: the checkpoint of step {saved[1].step} was saved in {where}, and "
            f"{'it' if target == where else target} holds none now; restore or mount it, or {anew}"
        )
    if (folder / CHECKPOINT).exists():
        raise UserError(
            f"--output {folder}: holds the weights of a finished training ({CHECKPOINT}), but {SUMMARY} and the "
            f"checkpoints are gone; evaluate --run {folder} still reads them, or {anew}"
        )
    path = folder / metrics_log.NAME
    log = metrics_log.read(path)
    if log is None or not (log.records or log.damaged):
        return None
    if saved is None:  # of a version that did not write it
        raise UserError(
            f"--output {folder}: {path.name} has records of steps, but there is no checkpoint in {target}; restore or "
            f"mount it, or {anew}"
        )
    aside = metrics_log.set_aside(path)
    return f"no checkpoint was saved yet: starting from step 0; the records so far are kept in {aside.name}"


def remove_new(folder: Path, *, made: bool) -> None:
    """Remove what a start wrote into a folder that was absent or empty before it, and nothing else.

    Args:
        folder: the run's folder.
        made: this start made the folder itself.
    """
    names = (CONFIG, PLAN, SAVED, metrics_log.NAME, run_lock.NAME)
    for path in [*(folder / name for name in names), *folder.glob("tensorboard/events.out.tfevents.*")]:
        with contextlib.suppress(OSError):
            path.unlink()
    for empty in (folder / "tensorboard", folder / CHECKPOINTS, *([folder] if made else [])):
        with contextlib.suppress(OSError):
            empty.rmdir()


def read(folder: Path, remedy: str = "train again") -> Run:
    """Read ``config.json`` of a run.

    Args:
        folder: the run's folder.
        remedy: what to do if it is damaged, for messages.

    Raises:
        UserError: it is missing, damaged or of another version.
    """
    return from_file(read_config(folder, remedy))


def read_config(folder: Path, remedy: str) -> RunFile:
    """Read ``config.json`` as it is; see ``read``."""
    path = folder / CONFIG
    found = read_file(path, RunFile, remedy)
    if found is None:
        check_there(folder)
        raise UserError(f"{path}: the file is missing; {remedy}")
    try:
        found[1].train_config()
    except ValueError as error:
        raise UserError(f"{path}: the file does not fit this version ({error}); {remedy}") from error
    return found[1]


def read_summary(
    folder: Path,
    remedy: str = "restore it, or remove it and run the same command, which needs the checkpoints to finish again",
) -> dict[str, Any] | None:
    """Read ``summary.json`` of a run; None where it is not finished.

    Raises:
        UserError: it is damaged.
    """
    found = read_file(folder / SUMMARY, SummaryFile, remedy)
    return None if found is None else found[0]


def from_file(raw: RunFile) -> Run:
    """Take a run out of ``config.json`` or a checkpoint's manifest.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    return Run(
        config=raw.train_config(),
        num_embeddings=raw.num_embeddings,
        numeric=tuple(raw.numeric),
        data_sha256=raw.data_sha256,
    )


def read_file(path: Path, kind: type[T], remedy: str) -> tuple[dict[str, Any], T] | None:
    """Read a JSON file of a run.

    Args:
        path: the file.
        kind: the type of its content.
        remedy: what to do if it is damaged, for messages.

    Returns:
        The content as it is, and typed; None where the file is missing.

    Raises:
        UserError: it can't be read, or a value has another type or is out of its range.
    """
    try:
        return formats.read_json(path, kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: the file can't be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: the file is damaged ({error}); {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all.

    Raises:
        UserError: the disk refuses.
    """
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise refused(path, error, "run the same command again") from error


def digest_of_data(data: PreparedData) -> str:
    """Return a digest of what a prepared folder holds, wherever it lies and whenever it was made."""
    if data.external is None:
        manifest = read_manifest(data.folder)
        held = {key: manifest.get(key) for key in ("schema", "num_embeddings", "splits", "files")}
    else:  # a folder of other tools has no checksums
        held = {
            "num_embeddings": dict(data.num_embeddings),
            "splits": {split: [asdict(day) for day in days] for split, days in data.splits.items()},
            "files": {path.name: path.stat().st_size for path in sorted(data.folder.glob("*.np[yz]"))},
        }
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def digest_of_schema(data: PreparedData) -> str:
    """Return a digest of the columns."""
    return hashlib.sha256(json.dumps(data.schema.to_json(), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on, and a word about the machine."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "torchrec_deepfm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

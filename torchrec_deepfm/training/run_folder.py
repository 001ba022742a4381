"""The folder of a run: its place, and the JSON files in it."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torchrec_deepfm.data.prepared import PreparedData, read_manifest
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.plan_file import PlanFile, plan_text
from torchrec_deepfm.small_file import read_bytes, write_bytes
from torchrec_deepfm.training import lock
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.disk import refused

CHECKPOINT = "checkpoint"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
JSON_LIMIT = 64 * 2**20  # bytes
_SEED = re.compile("0|[1-9][0-9]*", re.ASCII)

# What a run may be gone on with otherwise than it was begun: none of these changes what is learnt, but for the size of
# the batches, which changes with the number of ranks anyhow.
_FREE = ("batch_size", "checkpoint_every", "keep_last")


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
    if folder.is_dir() and any(path.name != lock.NAME for path in folder.iterdir()):
        if seed_folders(folder):
            raise UserError(
                f"--output {folder}: the folder holds runs of several seeds; go on with them by --seeds, or name "
                "another one"
            )
        what = "already holds a run" if (folder / "config.json").exists() else "is not empty"
        raise UserError(f"--output {folder}: the folder {what}; name another one, or remove it first")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: there is a file of that name; name a folder")


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
    try:
        there = read(folder)
    except UserError as error:
        raise UserError(str(error).replace("train again", "name another --output, or remove the folder")) from error
    check_same_run(f"--output {folder}", there, run, data)


def check_same_run(where: str, there: Run, run: Run, data: PreparedData) -> None:
    """Check that two runs are the same; see ``check_same``.

    Raises:
        UserError: they differ in an option or their data.
    """
    for option in fields(TrainConfig):
        old, new = getattr(there.config, option.name), getattr(run.config, option.name)
        if old != new and option.name not in _FREE:
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
    """Make the folder, or go on in it, and write ``config.json`` and ``plan.json``.

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
    write_json(folder / "config.json", config)
    _write(folder / "plan.json", plan_text(plan))


def read(folder: Path) -> Run:
    """Read ``config.json`` of a run.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    check_there(folder)
    path = folder / "config.json"
    try:
        return from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the file is damaged ({type(error).__name__}: {error}); train again") from error


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read ``summary.json`` of a run; None where it is not finished.

    Raises:
        UserError: it is damaged.
    """
    path = folder / SUMMARY
    try:
        return dict(read_json(path)) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: the file is damaged ({error}); remove it to finish the run again") from error


def from_json(raw: Mapping[str, Any]) -> Run:
    """Take a run out of what ``config.json`` or a checkpoint's manifest says.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it lacks something, or something has another type.
        UserError: an option is out of its range.
    """
    known = {field.name for field in fields(TrainConfig)}
    options: dict[str, Any] = {name: value for name, value in raw["config"].items() if name in known}
    digest = raw.get("data_sha256")
    return Run(
        config=TrainConfig(**options),
        num_embeddings={str(name): int(rows) for name, rows in raw["num_embeddings"].items()},
        numeric=tuple(str(name) for name in raw["numeric"]),
        data_sha256=None if digest is None else str(digest),
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is no JSON, or larger than any of ours.
    """
    content = read_bytes(path, most=JSON_LIMIT)
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
    if data.foreign is None:
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

"""The folder of a run: whether it may be used, and the JSON files in it."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, TypeVar

from torchrec_deepfm.data.dataset.prepared import PreparedData, read_manifest
from torchrec_deepfm.data.schema import Schema, dense_names
from torchrec_deepfm.distributed import run_lock
from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import is_partial, write_bytes
from torchrec_deepfm.sharding.plan.io import plan_json
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import formats
from torchrec_deepfm.training.run.formats import RunFile, SavedFile, SummaryFile
from torchrec_deepfm.training.run.tracking import metrics_log

CHECKPOINT = "checkpoint"
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
DATA = "data.json"
ENCODER = "encoder"
PLAN = "plan.json"
SAVED = "saved.json"
SUMMARY = "summary.json"
T = TypeVar("T")
_SEED = re.compile("0|[1-9][0-9]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """The content of ``config.json``: everything needed to build the model of a run again.

    Attributes:
        config: the options.
        num_embeddings: rows of each categorical feature's table, in the order of the fields.
        numeric: names of the numeric features.
        widths: of the numeric features, in the dense array; empty where all are 1.
        weighted: whether the ids carry weights; False in runs of versions that did not record it.
        data_sha256: digest of the data; None in runs of versions that did not record it.
    """

    config: TrainConfig
    num_embeddings: Mapping[str, int]
    numeric: tuple[str, ...]
    widths: tuple[int, ...] = ()
    weighted: bool = False
    data_sha256: str | None = None

    @property
    def dense_in_features(self) -> int:
        """I, the columns of the dense array."""
        return sum(self.widths) or len(self.numeric)

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of these columns."""
        return dense_names(self.numeric, self.widths or (1,) * len(self.numeric))

    def columns_json(self) -> dict[str, Any]:
        """Return the columns as in ``config.json`` and manifests."""
        widths = {"widths": list(self.widths)} if self.widths else {}
        return {"num_embeddings": dict(self.num_embeddings), "numeric": list(self.numeric), **widths}

    def differs(self, schema: Schema) -> bool:
        """Whether the numeric columns of data are others."""
        return (self.numeric, self.widths) != (schema.numeric, _widths(schema))


def describe(config: TrainConfig, data: PreparedData) -> RunDescription:
    """Describe a run on these data for ``config.json``."""
    return RunDescription(
        config=config,
        num_embeddings={name: data.num_embeddings[name] for name in data.schema.categorical},
        numeric=data.schema.numeric,
        widths=_widths(data.schema),
        weighted=bool(data.schema.weighted),
        data_sha256=digest_of_data(data),
    )


def _widths(schema: Schema) -> tuple[int, ...]:
    return schema.widths if max(schema.widths, default=1) > 1 else ()


def check_no_run(folder: Path) -> None:
    """Check that a run may be written to ``folder``."""
    if folder.is_dir() and any(path.name != run_lock.NAME for path in folder.iterdir()):
        if seed_folders(folder):
            raise UserError(
                "the folder holds runs of several seeds",
                where=f"--output {folder}",
                remedy="resume them with --seeds, or name another one",
            )
        what = "already holds a run" if (folder / "config.json").exists() else "is not empty"
        raise UserError(f"the folder {what}", where=f"--output {folder}", remedy="name another one, or remove it first")
    if folder.exists() and not folder.is_dir():
        raise UserError("a file has this name", where=f"--output {folder}", remedy="name a folder")


def is_empty(folder: Path) -> bool:
    """Whether a folder is absent or holds nothing except a lock."""
    return not folder.exists() or all(path.name == run_lock.NAME for path in folder.iterdir())


def seed_folders(folder: Path) -> dict[int, Path]:
    """Return the folders of runs that ``train --seeds`` made in a folder, by ascending seed."""
    if not folder.is_dir():
        return {}
    found = {path.name.removeprefix("seed_"): path for path in folder.glob("seed_*") if path.is_dir()}
    return {int(seed): found[seed] for seed in sorted(filter(_SEED.fullmatch, found), key=int)}


def check_there(folder: Path) -> None:
    """Check that a folder holds one run."""
    if (folder / "config.json").is_file():
        return
    runs = [path for path in seed_folders(folder).values() if (path / "config.json").is_file()]
    if runs:
        raise UserError(
            "the folder holds runs of several seeds",
            where=f"--run {folder}",
            remedy=f"name one of them, such as {runs[0]}",
        )
    raise UserError(
        "not a run folder (no config.json)", where=f"--run {folder}", remedy="name the folder that train wrote"
    )


def was_not_finite(folder: Path) -> bool:
    """Whether a loss or a weight of the run was not finite."""
    return any(folder.glob("nonfinite_step_*"))


def create(folder: Path, run: RunDescription, plan: PlanFile, *, data: PreparedData, world_size: int) -> None:
    """Create the folder if missing, and write ``config.json``, ``plan.json`` and what encodes new rows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder can't be made ({error.strerror})", where=f"--output {folder}", remedy="name another one"
        ) from error
    for path in folder.iterdir():
        if is_partial(path.name):  # this training holds the lock, so its writer was killed
            path.unlink(missing_ok=True)
    config = {
        "format_version": 1,
        "config": asdict(run.config),
        **run.columns_json(),
        "weighted": run.weighted,
        "data": data.named,
        "data_sha256": run.data_sha256,
        "encoder_sha256": _keep_encoder(folder, data),
        "world_size": world_size,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(folder / CONFIG, config)
    _write(folder / PLAN, plan_json(plan))


def _keep_encoder(folder: Path, data: PreparedData) -> str | None:
    """Copy into a run what encodes new rows, unless another tool prepared the data; return its digest."""
    from torchrec_deepfm.data.prepare.row_encoder import RowEncoder  # loads DuckDB, which reading a run does not need

    for killed in folder.glob(f".{ENCODER}.*.partial"):
        shutil.rmtree(killed, ignore_errors=True)
    if "raw_schema" not in data.made:
        return None
    if not (folder / ENCODER).exists():
        RowEncoder.save(data, folder / ENCODER)
    return RowEncoder.sha256_of(folder / ENCODER)


def write_saved(folder: Path, target: str, step: int | None) -> None:
    """Record the place and the step (None before the first) of the newest checkpoint, so that its loss is noticed."""
    write_json(folder / SAVED, {"format_version": 1, "checkpoints": target, "step": step})


def check_nothing_lost(folder: Path, target: str) -> str | None:
    """Check that a run without checkpoints never had one, before it starts from step 0.

    Its ``metrics.jsonl`` is set aside.

    ``folder``: the run's folder; may be absent or empty. Returns a line for the user about what was set aside; None if
    nothing was.
    """
    from_start = "name another --output to train from the start"
    saved = read_file(folder / SAVED, SavedFile, f"restore it, or {from_start}")
    if saved is not None and saved[1].step is not None:
        where = saved[1].checkpoints
        raise UserError(
            f"the checkpoint of step {saved[1].step} was saved in {where}, and "
            f"{'it' if target == where else target} holds none now",
            where=f"--output {folder}",
            remedy=f"restore or mount it, or {from_start}",
        )
    if (folder / CHECKPOINT).exists():
        raise UserError(
            f"holds the weights of a finished training ({CHECKPOINT}), but {SUMMARY} and the checkpoints are gone",
            where=f"--output {folder}",
            remedy=f"evaluate --run {folder} still reads them, or {from_start}",
        )
    path = folder / metrics_log.NAME
    log = metrics_log.read_log(path)
    if log is None or not (log.records or log.damaged):
        return None
    if saved is None:  # a run of a version without saved.json
        raise UserError(
            f"{path.name} has records of steps, but there is no checkpoint in {target}",
            where=f"--output {folder}",
            remedy=f"restore or mount it, or {from_start}",
        )
    aside = metrics_log.set_aside(path)
    return f"no checkpoint was saved yet: starting from step 0; the records so far are kept in {aside.name}"


def remove_new(folder: Path, *, made: bool) -> None:
    """Remove only the files that a start wrote into a folder that was absent or empty before."""
    names = (CONFIG, DATA, PLAN, SAVED, metrics_log.NAME, run_lock.NAME)
    for path in [*(folder / name for name in names), *folder.glob("tensorboard/events.out.tfevents.*")]:
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(folder / ENCODER, ignore_errors=True)
    for empty in (folder / "tensorboard", folder / CHECKPOINTS, *([folder] if made else [])):
        with contextlib.suppress(OSError):
            empty.rmdir()


def read(folder: Path, remedy: str = "train again") -> RunDescription:
    """Read ``config.json`` of a run."""
    return from_file(read_config(folder, remedy))


def read_config(folder: Path, remedy: str) -> RunFile:
    """Read ``config.json`` as a file structure; see ``read``."""
    path = folder / CONFIG
    found = read_file(path, RunFile, remedy)
    if found is None:
        check_there(folder)
        raise UserError("the file is missing", where=path, remedy=remedy)
    try:
        found[1].train_config()
    except ValueError as error:
        raise UserError(f"the file does not fit this version ({error})", where=path, remedy=remedy) from error
    return found[1]


def read_summary(
    folder: Path,
    remedy: str = "restore it, or remove it and run the same command, which needs the checkpoints to finish again",
) -> dict[str, Any] | None:
    """Read ``summary.json`` of a run; None if the run is not finished."""
    found = read_file(folder / SUMMARY, SummaryFile, remedy)
    return None if found is None else found[0]


def from_file(raw: RunFile) -> RunDescription:
    """Convert ``config.json`` or a manifest; a ``ValueError`` where an option is unknown or out of its range."""
    return RunDescription(
        config=raw.train_config(),
        num_embeddings=raw.num_embeddings,
        numeric=tuple(raw.numeric),
        widths=tuple(raw.widths),
        weighted=raw.weighted,
        data_sha256=raw.data_sha256,
    )


def read_file(path: Path, kind: type[T], remedy: str) -> tuple[dict[str, Any], T] | None:
    """Read a JSON file of a run: the raw content and the typed one; None if it is missing."""
    try:
        return formats.read_json(path, kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"the file can't be read ({error.strerror})", where=path, remedy=remedy) from error
    except ValueError as error:
        raise UserError(f"the file is damaged ({error})", where=path, remedy=remedy) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise refused(path, error, "run the same command again") from error


def digest_of_data(data: PreparedData) -> str:
    """Return a digest of the content of a prepared folder, independent of its path and time."""
    if data.external is None:
        manifest = read_manifest(data.folder)
        held = {key: manifest.get(key) for key in ("schema", "num_embeddings", "splits", "files")}
    else:  # a folder written by other tools has no checksums
        held = {
            "num_embeddings": dict(data.num_embeddings),
            "splits": {split: [asdict(day) for day in days] for split, days in data.splits.items()},
            "files": {path.name: path.stat().st_size for path in sorted(data.folder.glob("*.np[yz]"))},
        }
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def digest_of_schema(data: PreparedData) -> str:
    """Return a digest of the columns."""
    return hashlib.sha256(json.dumps(data.schema.to_json(), sort_keys=True).encode()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that a run depends on, and the machine's CPU."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    if commit := _commit():
        found["commit"] = commit
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "torchrec_deepfm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Return the model of the CPU, how many of them are busy now, and the time of the start."""
    found = {"started": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        if model := next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""):
            found["cpu"] = model
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
        found["load"] = f"{os.getloadavg()[0]:.2f} of {os.cpu_count()} CPUs busy in the minute before the start"
    return found


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, or that pip installed it from; None if unknown."""
    source = Path(__file__).resolve().parents[3]
    if (source / ".git").exists() and (git := shutil.which("git")):
        ask = partial(subprocess.run, cwd=source, capture_output=True, text=True, check=False, timeout=10)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = ask([git, "rev-parse", "HEAD"]).stdout.strip()
            changed = ask([git, "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
            return f"{found}{', with changes' if changed else ''}" if found else None
    with contextlib.suppress(PackageNotFoundError, ValueError, KeyError):
        url = json.loads(distribution("torchrec_deepfm").read_text("direct_url.json") or "{}")
        return str(url["vcs_info"]["commit_id"])
    return None

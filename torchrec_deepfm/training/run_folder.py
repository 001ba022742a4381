"""The folder of a run: its place, and the JSON files in it."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torchrec.distributed.types import EnumerableShardingSpec, ShardingPlan

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig

CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What ``config.json`` says of a run: all that it takes to build its model again.

    Attributes:
        config: the options.
        num_embeddings: rows of each categorical feature's table, in the order of the fields.
        numeric: names of the numeric features.
    """

    config: TrainConfig
    num_embeddings: Mapping[str, int]
    numeric: tuple[str, ...]


def check_free(folder: Path) -> None:
    """Check that a run may be written to ``folder``.

    Raises:
        UserError: something is there already.
    """
    if folder.is_dir() and any(folder.iterdir()):
        what = "already holds a run" if (folder / "config.json").exists() else "is not empty"
        raise UserError(f"--output {folder}: the folder {what}; name another one, or remove it first")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: there is a file of that name; name a folder")


def create(folder: Path, run: Run, plan: ShardingPlan, *, data: Path, world_size: int) -> None:
    """Make the folder and write ``config.json`` and ``plan.json``.

    Raises:
        UserError: the folder cannot be made, or something is there already.
    """
    check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: the folder can't be made ({error.strerror}); name another one") from error
    config = {
        "format_version": 1,
        "config": asdict(run.config),
        "num_embeddings": dict(run.num_embeddings),
        "numeric": list(run.numeric),
        "data": str(data),
        "world_size": world_size,
        "versions": _versions(),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "plan.json", _plan_to_json(plan, world_size))


def read(folder: Path) -> Run:
    """Read ``config.json`` of a run.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"--run {folder}: there is no run here (no config.json); name the folder that train wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(TrainConfig)}
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in raw["config"].items()
            if name in known
        }
        return Run(
            config=TrainConfig(**options),
            num_embeddings={str(name): int(rows) for name, rows in raw["num_embeddings"].items()},
            numeric=tuple(str(name) for name in raw["numeric"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the file is damaged ({type(error).__name__}: {error}); train again") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _plan_to_json(plan: ShardingPlan, world_size: int) -> dict[str, Any]:
    tables = {}
    for module in plan.plan.values():
        for name, sharding in module.items():  # type: ignore[attr-defined]
            spec = sharding.sharding_spec
            shards = []
            if isinstance(spec, EnumerableShardingSpec):
                shards = [
                    {"rank": shard.placement.rank(), "offsets": shard.shard_offsets, "sizes": shard.shard_sizes}
                    for shard in spec.shards
                    if shard.placement is not None
                ]
            tables[name] = {
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": sharding.ranks,
                "shards": shards,
            }
    return {"format_version": 1, "world_size": world_size, "tables": tables}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "torchrec_deepfm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

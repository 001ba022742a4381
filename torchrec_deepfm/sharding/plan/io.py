"""A sharding plan as a file: readable, versioned JSON, never a pickle. Loads no torch.

    {"format": "torchrec_deepfm.plan", "format_version": 2,
     "world_size": 16, "local_world_size": 8, "batch_size": 8192, "search": "balanced",
     "hardware": {...} or null, "made_with": {"torchrec": "1.8.0", ...},
     "predicted": {"critical_path_ms": 8.4, "mean_ms": 8.1, "per_rank": [{"rank": 0, "total_ms": 8.4, ...}]} or null,
     "tables": [{"name": "t_C1", "num_embeddings": 1000, "embedding_dim": 16, "sharding_type": "column_wise",
                 "compute_kernel": "fused", "ranks": [0, 1],
                 "shards": [{"rank": 0, "offsets": [0, 0], "sizes": [1000, 8], "predicted": {...} or null}, ...]}]}

Offsets and sizes are [row, column] and [rows, columns]. A data_parallel table has one shard per rank, each the whole
table. ``plan.PlanFile`` declares types and ranges, ``validate.py`` checks that the shards cover the tables and fit the
ranks, and ``torchrec_plan.py`` converts to TorchRec's ``ShardingPlan`` and back.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError, shown
from torchrec_deepfm.files import read_text, write_text
from torchrec_deepfm.sharding.plan.plan import FORMAT, FORMAT_VERSION, OLD_SEARCHES, PlanFile
from torchrec_deepfm.sharding.plan.validate import check_sound
from torchrec_deepfm.strict_json import as_type, parse_json

_MAX_BYTES: Final = 256 * 2**20  # 1,024 ranks and 26 tables take 15 MiB
_REMEDY: Final = "make the plan again"


def load_plan(path: Path) -> PlanFile:
    """Read a plan and check it by itself, as ``check_sound`` does."""
    if path.is_dir():
        inside = path / "plan.json"
        raise UserError("a folder", where=path, remedy=f"name {inside if inside.is_file() else 'the file of a plan'}")
    text = read_text(path, most=_MAX_BYTES, what="plan", instead="make a plan with plan, or name a run's plan.json")
    raw = parse_json(text, where=str(path), remedy=_REMEDY)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        if isinstance(raw, dict) and raw.get("format_version") == 1 and "tables" in raw:
            raise UserError(
                "a plan of format version 1, which lacks the sizes of the tables",
                where=path,
                remedy="resume the training with this version, or make a plan with plan",
            )
        raise UserError(
            f'not a plan (it lacks "format": "{FORMAT}")',
            where=path,
            remedy="make one with plan, or name a run's plan.json",
        )
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"format version {shown(raw.get('format_version'))}, but this version of torchrec_deepfm "
            f"reads {FORMAT_VERSION}",
            where=path,
            remedy="use the version that wrote it, or make the plan again",
        )
    return parse_plan(raw, str(path))


def parse_plan(raw: Mapping[str, Any], where: str) -> PlanFile:
    """Check plain values of this format version, and make a plan of them; ``where`` they are from is for messages."""
    predicted = raw.get("predicted")
    order: list[Any] = []
    if isinstance(predicted, dict):
        costs, order = _split(predicted.get("per_rank"), "rank")
        predicted = {**predicted, "per_rank": costs}
    tables, ranks = _split(raw.get("tables"), "ranks")
    given = {key: raw[key] for key in raw if key not in ("format", "format_version")}
    plan = as_type({**given, "predicted": predicted, "tables": tables}, PlanFile, where=where, remedy=_REMEDY)
    for number, rank in enumerate(order):
        if rank != number:
            raise UserError(
                f"predicted.per_rank[{number}]: rank is {shown(rank)}, not {number}",
                where=where,
                remedy="list all ranks in order",
            )
    for number, (table, listed) in enumerate(zip(plan.tables, ranks, strict=True)):
        if listed != list(table.ranks):
            raise UserError(
                f"tables[{number}] ({table.name}): ranks is {shown(listed)}, but the shards are on "
                f"{shown(list(table.ranks))}",
                where=where,
                remedy="give the rank of each shard, in their order",
            )
    plan = replace(plan, search=OLD_SEARCHES.get(plan.search, plan.search))
    check_sound(plan, where)
    return plan


def _split(rows: Any, key: str) -> tuple[Any, list[Any]]:
    """Take out what the file repeats for its readers; what is not a list of objects is left to the check by type."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return rows, []
    return [{name: row[name] for name in row if name != key} for row in rows], [row.get(key) for row in rows]


def save_plan(plan: PlanFile, path: Path) -> None:
    """Write a plan, completely or not at all; an existing file is replaced."""
    write_text(path, plan_json(plan), what="plan")


def plan_json(plan: PlanFile) -> str:
    """Return the text of a plan's file: indented, with a line for each shard and each rank's cost."""
    return f"{_indented(plan.to_json(), '')}\n"


def _indented(value: Any, indent: str, key: str = "") -> str:
    """JSON with two spaces per level, but one line for each shard and each rank's cost."""
    inner = f"{indent}  "
    if isinstance(value, dict) and value:
        parts = [f"{_one_line(name)}: {_indented(each, inner, name)}" for name, each in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list) and value:
        parts = [_one_line(each) if key in ("shards", "per_rank") else _indented(each, inner) for each in value]
        opening, closing = "[]"
    else:
        return _one_line(value)
    lines = ",\n".join(f"{inner}{part}" for part in parts)
    return f"{opening}\n{lines}\n{indent}{closing}"


def _one_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)

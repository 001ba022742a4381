"""A sharding plan as a file: readable, versioned JSON, never a pickle. Standard library only.

    {"format": "torchrec_deepfm.plan", "format_version": 2,
     "world_size": 16, "local_world_size": 8, "batch_size": 8192, "search": "ours",
     "hardware": {...} or null, "made_with": {"torchrec": "1.8.0", ...},
     "predicted": {"critical_path_ms": 8.4, "mean_ms": 8.1, "per_rank": [{"rank": 0, "total_ms": 8.4, ...}]} or null,
     "tables": [{"name": "t_C1", "num_embeddings": 1000, "embedding_dim": 16, "sharding_type": "column_wise",
                 "compute_kernel": "fused", "ranks": [0, 1],
                 "shards": [{"rank": 0, "offsets": [0, 0], "sizes": [1000, 8], "predicted": {...} or null}, ...]}]}

Offsets and sizes are [row, column] and [rows, columns]. A data_parallel table has one shard a rank, each of them the
whole table. ``plan_check`` says what makes a plan sound and whether it fits tables and ranks; ``plan_sharding`` turns
it into TorchRec's ``ShardingPlan`` and back.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.hardware import Hardware
from torchrec_deepfm.sharding.plan import (
    FORMAT,
    FORMAT_VERSION,
    Cost,
    PlanFile,
    PlannedShard,
    PlannedTable,
    Predicted,
)
from torchrec_deepfm.sharding.plan_check import check_fits, check_sound
from torchrec_deepfm.small_file import regular_file, write_text

__all__ = [
    "Cost",
    "PlanFile",
    "PlannedShard",
    "PlannedTable",
    "Predicted",
    "check_fits",
    "load_plan",
    "plan_text",
    "save_plan",
]

_MAX_COUNT = 2**62
_MAX_MS = 1e300  # sums of it are still numbers
SIZE_LIMIT = 256 * 2**20  # bytes; 1,024 ranks times 26 tables take 15 MiB


def load_plan(path: Path) -> PlanFile:
    """Read a plan.

    Args:
        path: the file.

    Returns:
        The plan, checked for itself: every table is covered exactly, by ranks that there are, as its type asks for.

    Raises:
        UserError: there is no such file, it is damaged or no plan, of another version, or does not hold together.
    """
    raw = _object(_read(path), str(path))
    if raw.get("format_version") == 1 and "format" not in raw and "tables" in raw:
        raise UserError(
            f"{path}: a plan of format version 1, which lacks the sizes of the tables; write it anew: train on, or "
            "train again, with this version, or make one with plan"
        )
    if raw.get("format") != FORMAT:
        raise UserError(
            f'{path}: this is no plan (it lacks "format": "{FORMAT}"); make one with plan, or name a run\'s plan.json'
        )
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {raw.get('format_version')!r}, this version of torchrec_deepfm reads "
            f"{FORMAT_VERSION}; use the one that wrote it, or make the plan anew"
        )
    return parse_plan(raw, str(path))


def parse_plan(raw: Mapping[str, Any], where: str) -> PlanFile:
    """Take a plan of this format version out of JSON.

    Args:
        raw: the top object.
        where: where it is from, for messages.

    Returns:
        The plan, checked as by ``load_plan``.

    Raises:
        UserError: it is damaged, or does not hold together.
    """
    plan = _plan(raw, where)
    check_sound(plan, where)
    return plan


def _read(path: Path) -> Any:
    try:
        with open(path, "rb", opener=regular_file) as file:
            content = file.read(SIZE_LIMIT + 1)
    except IsADirectoryError as error:
        inside = path / "plan.json"
        remedy = f"name {inside}" if inside.is_file() else "name a plan's file"
        raise UserError(f"{path}: this is a folder; {remedy}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; make a plan with plan, or name a run's plan.json") from error
    except OSError as error:
        raise UserError(f"{path}: the plan can't be read ({error.strerror}); name a file that can") from error
    if len(content) > SIZE_LIMIT:
        raise UserError(f"{path}: larger than {SIZE_LIMIT // 2**20} MiB, so it is no plan; name a plan's file")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: the plan is damaged ({what}); make it anew") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _plan(raw: Mapping[str, Any], where: str) -> PlanFile:
    keys = ("world_size", "local_world_size", "batch_size", "search", "hardware", "made_with", "predicted", "tables")
    _keys(raw, ("format", "format_version", *keys), where)
    hardware, made_with = raw["hardware"], _object(raw["made_with"], f"{where}: made_with")
    return PlanFile(
        world_size=_integer(raw, "world_size", where, least=1),
        local_world_size=_integer(raw, "local_world_size", where, least=1),
        batch_size=None if raw["batch_size"] is None else _integer(raw, "batch_size", where, least=1),
        search=_text(raw, "search", where),
        hardware=None if hardware is None else _hardware(hardware, f"{where}: hardware"),
        made_with={name: _text(made_with, name, f"{where}: made_with") for name in made_with},
        predicted=None if raw["predicted"] is None else _predicted(raw["predicted"], f"{where}: predicted"),
        tables=tuple(
            _table(each, f"{where}: tables[{number}]") for number, each in enumerate(_list(raw, "tables", where))
        ),
    )


def _hardware(value: Any, where: str) -> Mapping[str, Any]:
    try:
        Hardware.from_json(_object(value, where))
    except UserError as error:
        told = str(error)
        raise error if told.startswith(where) else UserError(f"{where}: {told}") from error
    return value  # type: ignore[no-any-return]


def _predicted(value: Any, where: str) -> Predicted:
    raw = _object(value, where)
    _keys(raw, ("critical_path_ms", "mean_ms", "per_rank"), where)
    per_rank = []
    for number, each in enumerate(_list(raw, "per_rank", where)):
        place = f"{where}.per_rank[{number}]"
        cost = _object(each, place)
        if cost.get("rank") != number:
            raise UserError(f"{place}: rank {cost.get('rank')!r}, not {number}; list every rank once, in order")
        per_rank.append(_cost({key: one for key, one in cost.items() if key != "rank"}, place))
    return Predicted(
        critical_path_ms=_number(raw, "critical_path_ms", where),
        mean_ms=_number(raw, "mean_ms", where),
        per_rank=tuple(per_rank),
    )


def _cost(value: Any, where: str) -> Cost:
    raw = _object(value, where)
    times = [name for name in Cost.__dataclass_fields__ if name.endswith("_ms")]
    _keys(raw, tuple(Cost.__dataclass_fields__), where)
    return Cost(
        hbm_bytes=_integer(raw, "hbm_bytes", where),
        ddr_bytes=_integer(raw, "ddr_bytes", where),
        **{name: _number(raw, name, where) for name in times},
    )


def _table(value: Any, where: str) -> PlannedTable:
    raw = _object(value, where)
    name = _text(raw, "name", where)
    where = f"{where} ({name})"
    keys = ("name", "num_embeddings", "embedding_dim", "sharding_type", "compute_kernel", "ranks", "shards")
    _keys(raw, keys, where, optional=("kernel_options",))
    table = PlannedTable(
        name=name,
        num_embeddings=_integer(raw, "num_embeddings", where, least=1),
        embedding_dim=_integer(raw, "embedding_dim", where, least=1),
        sharding_type=_text(raw, "sharding_type", where),
        compute_kernel=_text(raw, "compute_kernel", where),
        kernel_options=_object(raw.get("kernel_options", {}), f"{where}.kernel_options"),
        shards=tuple(
            _shard(each, f"{where}.shards[{number}]") for number, each in enumerate(_list(raw, "shards", where))
        ),
    )
    if raw["ranks"] != list(table.ranks):
        raise UserError(
            f"{where}: 'ranks' is {_short(raw['ranks'])}, but the shards lie on {_short(list(table.ranks))}; give the "
            "rank of each shard, in their order"
        )
    return table


def _shard(value: Any, where: str) -> PlannedShard:
    raw = _object(value, where)
    _keys(raw, ("rank", "offsets", "sizes"), where, optional=("predicted",))
    predicted = raw.get("predicted")
    return PlannedShard(
        rank=_integer(raw, "rank", where),
        offsets=_pair(raw, "offsets", where),
        sizes=_pair(raw, "sizes", where),
        predicted=None if predicted is None else _cost(predicted, f"{where}.predicted"),
    )


def _keys(raw: Mapping[str, Any], needed: Sequence[str], where: str, optional: Sequence[str] = ()) -> None:
    for key in raw:
        if key not in needed and key not in optional:
            close = difflib.get_close_matches(key, [*needed, *optional], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise UserError(f"{where}: there is no key {key!r} in a plan; {hint}")
    for key in needed:
        if key not in raw:
            raise UserError(f"{where}: the key {key!r} is missing; add it, or make the plan anew")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_short(value)} is no JSON object; make the plan anew")
    return value


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} must be a list of at least one, not {_short(value)}; make the plan anew")
    return value


def _text(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value or not value.isprintable():
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else _short(value)
        raise UserError(f"{where}: {key!r} must be a text that can be printed, not {shown}; make the plan anew")
    return value


def _integer(raw: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    value = raw.get(key)
    if type(value) is not int or value < least:
        raise UserError(f"{where}: {key!r} must be a whole number of at least {least}, not {_short(value)}")
    if value > _MAX_COUNT:
        raise UserError(f"{where}: {key!r} must be at most {_MAX_COUNT}, not {_short(value)}")
    return value


def _pair(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    value = raw.get(key)
    if not isinstance(value, list) or len(value) != 2 or any(type(each) is not int or each < 0 for each in value):
        raise UserError(f"{where}: {key!r} must be two whole numbers, rows and columns, not {_short(value)}")
    return value[0], value[1]


def _number(raw: Mapping[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    if type(value) not in (int, float) or not 0 <= value <= _MAX_MS:  # type: ignore[operator]
        raise UserError(f"{where}: {key!r} must be a number of at least 0, not {_short(value)}, at most {_MAX_MS:g}")
    return float(value)  # type: ignore[arg-type]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def save_plan(plan: PlanFile, path: Path) -> None:
    """Write a plan that is there whole or not at all.

    Args:
        plan: the plan.
        path: the file; one that is there is replaced.

    Raises:
        UserError: the file can't be written.
    """
    write_text(path, plan_text(plan), what="plan")


def plan_text(plan: PlanFile) -> str:
    """Return the text of a plan's file: indented, with a line for each shard and each rank's cost."""
    return "".join(_pieces(plan.to_json(), "", one_line=False)) + "\n"


def _pieces(value: Any, indent: str, *, one_line: bool) -> list[str]:
    plain = not isinstance(value, dict | list) or not value
    flat = isinstance(value, list) and not any(isinstance(each, dict | list) for each in value)
    if plain or flat or one_line:
        return [json.dumps(value, ensure_ascii=False, allow_nan=False)]
    inner = indent + "  "
    pieces: list[str] = []
    if isinstance(value, dict):
        for key, each in value.items():
            pieces += [",\n" if pieces else "{\n", inner, json.dumps(key, ensure_ascii=False), ": "]
            if key in ("shards", "per_rank"):
                pieces += ["[\n", ",\n".join(f"{inner}  {json.dumps(line, allow_nan=False)}" for line in each)]
                pieces += [f"\n{inner}]"]
            else:
                pieces += _pieces(each, inner, one_line=False)
        return [*pieces, f"\n{indent}}}"]
    for each in value:
        pieces += [",\n" if pieces else "[\n", inner, *_pieces(each, inner, one_line=False)]
    return [*pieces, f"\n{indent}]"]

"""What a user requires of single tables: ``C1=row_wise``, ``t_C*=column_wise:min_partition=16``, ``>1e6=grid_shard``.

    rule     = which "=" types (":" option "=" value)*
    which    = the name of a table or of one of its features
             | a glob over both: "C1*", "t_C[12]"
             | a size in rows: ">1e6", ">=1e6", "<1e5", "<=1e5", "1e5..1e6" (above the first, at most the second)
    types    = sharding types, "," between them: the planner chooses; or "any"
    option   = "min_partition", the least width of a column shard; "kernel"; "cache_load_factor"; "pooling_factor"

Only the most specific rule that matches a table applies: a name overrides a glob, a glob overrides a size. Two
different rules of the same rank contradict each other.
"""

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams

from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.sharding.inputs.sharding_types import (
    COLUMN_ALIGNMENT,
    COLUMN_TYPES,
    CUDA_KERNELS,
    IN_MEMORY_KERNELS,
    KERNELS,
    MAX_POOLING_FACTOR,
    SHARDING_TYPES,
    TableSize,
    kernels_of,
    why_impossible,
    why_rows_impossible,
)

OPTIONS = ("min_partition", "kernel", "cache_load_factor", "pooling_factor")
ANY = "any"
MAX_MIN_PARTITION = 2**14
"""No table is wider."""

_SIZE = re.compile(r"(?P<sign><=|>=|<|>)(?P<bound>[^=]*)=(?P<rest>.*)")
_RANGE = re.compile(r"(?P<above>[0-9][^=]*?)\.\.(?P<most>[^=]*)=(?P<rest>.*)")


class NamedTable(TableSize, Protocol):
    """A table with its features: TorchRec's ``EmbeddingBagConfig`` is one."""

    @property
    def feature_names(self) -> Sequence[str]:
        """The features that look rows up in it."""


class _Rank(IntEnum):
    SIZE, GLOB, NAME = range(3)


@dataclass(frozen=True, kw_only=True)
class TableRule:
    """How the tables that a rule matches may be sharded."""

    sharding_types: tuple[str, ...]
    kernel: str | None = None
    min_partition: int | None = None
    cache_load_factor: float | None = None
    pooling_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Rule:
    text: str
    rank: _Rank
    matches: Callable[[NamedTable], bool]
    table_rule: TableRule


def parse_constraints(
    rules: Sequence[str],
    tables: Sequence[NamedTable],
    *,
    compute_device: str = "cpu",
    world_size: int | None = None,
    local_world_size: int | None = None,
) -> dict[str, ParameterConstraints]:
    """Turn rules, of the form above, into what TorchRec's planner takes, for each table that a rule matches.

    Of the types of a rule a table keeps those that it can have: some kernels need ``cuda``, on CPU no rank may be left
    without a row, and some types need several ranks per host; numbers that are not known are not checked.
    ``min_partition`` is None where the rule does not name it; see ``sharding_types.default_min_partition``. UserError:
    a rule is malformed, matches nothing, or cannot be met; or two rules contradict each other.

    Example:
        >>> from torchrec_deepfm.model.tables import embedding_tables
        >>> tables = embedding_tables({"C1": 10, "C2": 2_000_000}, factor_dim=15)
        >>> found = parse_constraints([">1e6=column_wise:min_partition=8", "C1=data_parallel"], tables)
        >>> found["t_C2"].sharding_types, found["t_C2"].min_partition, found["t_C1"].sharding_types
        (['column_wise'], 8, ['data_parallel'])
    """
    chosen: dict[str, _Rule] = {}
    for rule in [_parse(text, tables) for text in rules]:
        matched = [table for table in tables if rule.matches(table)]
        if not matched:
            raise UserError(_nothing(rule, tables), where=f"--constraint {rule.text}")
        for table in matched:
            before = chosen.get(table.name)
            if before is not None and before.rank == rule.rank and before.table_rule != rule.table_rule:
                raise UserError(
                    f"--constraint {before.text} and --constraint {rule.text} contradict each other over table "
                    f"{table.name}",
                    remedy="leave one of them, or name the table in a rule of its own",
                )
            if before is None or before.rank < rule.rank:
                chosen[table.name] = rule
    by_name = {table.name: table for table in tables}
    return {
        name: _constraints(chosen[name], by_name[name], compute_device, world_size, local_world_size)
        for name in by_name
        if name in chosen
    }


def in_device_memory(
    tables: Sequence[TableSize], constraints: Mapping[str, ParameterConstraints]
) -> dict[str, ParameterConstraints]:
    """Keep every table in the device's own memory, where ``train --ema`` can average its weights.

    Example:
        >>> from torchrec_deepfm.model.tables import embedding_tables
        >>> in_device_memory(embedding_tables({"C1": 10}), {})["t_C1"].compute_kernels
        ['dense', 'fused']
    """
    found = {}
    for table in tables:
        given = constraints.get(table.name, ParameterConstraints())
        for kernel in given.compute_kernels or ():
            if kernel not in IN_MEMORY_KERNELS:
                raise UserError(
                    f"table {table.name} has the kernel {kernel}, which keeps rows in host memory, where --ema "
                    "can't average them",
                    where="--constraint",
                    remedy="leave one of the two out",
                )
        found[table.name] = replace(given, compute_kernels=given.compute_kernels or list(IN_MEMORY_KERNELS))
    return found


def keep_to_possible(
    constraints: Mapping[str, ParameterConstraints],
    tables: Sequence[TableSize],
    *,
    compute_device: str,
    world_size: int,
    local_world_size: int,
) -> dict[str, ParameterConstraints]:
    """Add constraints for tables whose rows these ranks can't cut in every way, which TorchRec's planner does not know.

    Example:
        >>> from torchrec_deepfm.model.tables import embedding_tables
        >>> tables = embedding_tables({"C1": 2, "C2": 2_000_000}, factor_dim=15)
        >>> found = keep_to_possible({}, tables, compute_device="cpu", world_size=8, local_world_size=8)
        >>> {name: each.sharding_types for name, each in found.items()}
        {'t_C1': ['data_parallel', 'table_wise', 'column_wise', 'table_column_wise']}
    """
    found = dict(constraints)
    for table in tables:
        possible = [
            kind
            for kind in SHARDING_TYPES
            if why_rows_impossible(
                kind,
                table,
                world_size=world_size,
                local_world_size=local_world_size,
                compute_device=compute_device,
            )
            is None
        ]
        given = found.get(table.name, ParameterConstraints())
        if not given.sharding_types and len(possible) < len(SHARDING_TYPES):
            found[table.name] = replace(given, sharding_types=possible)
    return found


def _parse(text: str, tables: Sequence[NamedTable]) -> _Rule:
    if not text.isprintable():
        raise UserError("this can't be printed", where=f"--constraint {text!r}", remedy="write NAME=TYPE on one line")
    where = f"--constraint {text}"
    names = {name for table in tables for name in (table.name, *table.feature_names)}
    # A column may have "=" or a letter of a glob in its name.
    exact = max((name for name in names if text.startswith(f"{name}=")), key=len, default=None)
    if exact is not None:
        # A table's own name overrides a feature of another table with the same name.
        owns = {table.name for table in tables if table.name == exact} or None
        matches = lambda table: table.name in owns if owns else exact in table.feature_names  # noqa: E731
        return _Rule(text=text, rank=_Rank.NAME, matches=matches, table_rule=_table_rule(text[len(exact) + 1 :], where))
    if size := _SIZE.fullmatch(text):
        sign, bound = size["sign"], _rows(size["bound"], where)
        compare: dict[str, Callable[[int], bool]] = {
            "<": lambda rows: rows < bound,
            "<=": lambda rows: rows <= bound,
            ">": lambda rows: rows > bound,
            ">=": lambda rows: rows >= bound,
        }
        holds = compare[sign]
        return _Rule(
            text=text,
            rank=_Rank.SIZE,
            matches=lambda table: holds(table.num_embeddings),
            table_rule=_table_rule(size["rest"], where),
        )
    if span := _RANGE.fullmatch(text):
        above, most = _rows(span["above"], where), _rows(span["most"], where)
        if above >= most:
            raise UserError(
                f"no number is above {above:g} and at most {most:g}", where=where, remedy="write the smaller one first"
            )
        return _Rule(
            text=text,
            rank=_Rank.SIZE,
            matches=lambda table: above < table.num_embeddings <= most,
            table_rule=_table_rule(span["rest"], where),
        )
    which, equals, rest = text.partition("=")
    which = which.strip()
    if not equals or not which:
        raise UserError("write NAME=TYPE, such as C1=row_wise or '>1e6=column_wise'", where=where)
    return _Rule(
        text=text,
        rank=_Rank.GLOB if any(letter in which for letter in "*?[") else _Rank.NAME,
        matches=lambda table: any(fnmatch.fnmatchcase(name, which) for name in (table.name, *table.feature_names)),
        table_rule=_table_rule(rest, where),
    )


def _rows(text: str, where: str) -> float:
    try:
        rows = float(text)
    except ValueError:
        rows = math.nan
    if not 0 <= rows < math.inf:
        raise UserError(f"{text!r} is not a number of rows", where=where, remedy="write one such as 100000 or 1e5")
    return rows


def _table_rule(text: str, where: str) -> TableRule:
    listed, *options = (part.strip() for part in text.split(":"))
    types = SHARDING_TYPES if listed == ANY else tuple(dict.fromkeys(kind.strip() for kind in listed.split(",")))
    for kind in types:
        if kind not in SHARDING_TYPES:
            raise UserError(
                f"unknown sharding type {kind!r}", where=where, remedy=f"choose {one_of((*SHARDING_TYPES, ANY), kind)}"
            )
    found: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in OPTIONS:
            raise UserError(f"unknown option {name!r}", where=where, remedy=f"choose {one_of(OPTIONS, name)}")
        if not equals or not value or name in found:
            raise UserError(f"option {name} needs one value, {name}=...", where=where)
        found[name] = value
    kernel = found.get("kernel")
    if kernel is not None:
        types = _of_kernel(kernel, types, where)
    min_partition = _number(found, "min_partition", where, whole=True)
    load_factor = _number(found, "cache_load_factor", where)
    if min_partition is not None and min_partition > MAX_MIN_PARTITION:
        raise UserError(
            f"min_partition is a number of columns, at most {MAX_MIN_PARTITION:,}", where=where, remedy="take fewer"
        )
    if min_partition is not None and (min_partition % COLUMN_ALIGNMENT or min_partition < COLUMN_ALIGNMENT):
        raise UserError(
            f"min_partition {min_partition:g} is not a multiple of {COLUMN_ALIGNMENT}, which FBGEMM's kernels need",
            where=where,
            remedy=f"take {max(COLUMN_ALIGNMENT, round(min_partition / COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT)}",
        )
    if min_partition is not None and not any(kind in COLUMN_TYPES for kind in types):
        raise UserError(
            f"min_partition is for {', '.join(COLUMN_TYPES)}, which cut columns", where=where, remedy="leave it out"
        )
    if load_factor is not None and kernel != "fused_uvm_caching":
        raise UserError(
            "cache_load_factor is for kernel=fused_uvm_caching", where=where, remedy="add that, or leave it out"
        )
    if load_factor is not None and not 0.0 < load_factor < 1.0:
        raise UserError(
            f"cache_load_factor {load_factor:g} is the share of rows in the cache, between 0 and 1", where=where
        )
    pooling_factor = _number(found, "pooling_factor", where)
    if pooling_factor is not None and pooling_factor <= 0.0:
        raise UserError(f"pooling_factor {pooling_factor:g} is the mean number of ids, greater than 0", where=where)
    if pooling_factor is not None and pooling_factor > MAX_POOLING_FACTOR:
        raise UserError(
            f"pooling_factor {pooling_factor:g} is the mean number of ids, at most {MAX_POOLING_FACTOR:,}", where=where
        )
    return TableRule(
        sharding_types=tuple(kind for kind in SHARDING_TYPES if kind in types),
        kernel=kernel,
        min_partition=None if min_partition is None else int(min_partition),
        cache_load_factor=load_factor,
        pooling_factor=pooling_factor,
    )


def _of_kernel(kernel: str, types: Sequence[str], where: str) -> tuple[str, ...]:
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}", where=where, remedy=f"choose {one_of(KERNELS, kernel)}")
    kept = tuple(kind for kind in types if kernel in kernels_of(kind))
    if not kept:
        instead = ", ".join(kernels_of(types[0]))
        raise UserError(f"{types[0]} has no kernel {kernel}", where=where, remedy=f"choose one of {instead}")
    return kept


def _number(found: Mapping[str, str], name: str, where: str, *, whole: bool = False) -> float | None:
    if name not in found:
        return None
    try:
        value = int(found[name]) if whole else float(found[name])
    except ValueError:
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} {found[name]!r} is not a {'whole ' if whole else ''}number", where=where)
    return value


def _nothing(rule: _Rule, tables: Sequence[NamedTable]) -> str:
    if rule.rank == _Rank.SIZE:
        largest = max(tables, key=lambda table: table.num_embeddings)
        smallest = min(tables, key=lambda table: table.num_embeddings)
        return (
            f"no table has that many rows: they have {smallest.num_embeddings:,} ({smallest.name}) to "
            f"{largest.num_embeddings:,} ({largest.name})"
        )
    which = rule.text.partition("=")[0].strip()
    names = list(dict.fromkeys(name for table in tables for name in (*table.feature_names, table.name)))
    close = difflib.get_close_matches(which, names, n=3, cutoff=0.4) or names[:3]
    return f"no table or feature has this name; did you mean one of {', '.join(close)}?"


def _constraints(
    rule: _Rule, table: NamedTable, compute_device: str, world_size: int | None, local_world_size: int | None
) -> ParameterConstraints:
    table_rule, where = rule.table_rule, f"--constraint {rule.text}: table {table.name}"
    reasons: dict[str, str] = {}
    for kind in table_rule.sharding_types:
        reason = why_impossible(
            kind,
            table,
            min_partition=table_rule.min_partition,
            world_size=world_size,
            local_world_size=local_world_size,
            compute_device=compute_device,
        )
        if reason is not None:
            reasons[kind] = reason
    possible = [kind for kind in table_rule.sharding_types if kind not in reasons]
    if not possible:
        raise UserError(next(iter(reasons.values())), where=where)
    if table_rule.kernel in CUDA_KERNELS and compute_device != "cuda":
        raise UserError(
            f"kernel {table_rule.kernel} needs GPUs, not {compute_device} ranks", where=where, remedy="leave it out"
        )
    kernels = None if table_rule.kernel is None else [table_rule.kernel]
    cache = None if table_rule.cache_load_factor is None else CacheParams(load_factor=table_rule.cache_load_factor)
    constraints = ParameterConstraints(
        sharding_types=possible, compute_kernels=kernels, min_partition=table_rule.min_partition, cache_params=cache
    )
    if table_rule.pooling_factor is not None:
        constraints.pooling_factors = [table_rule.pooling_factor] * max(len(table.feature_names), 1)
    return constraints

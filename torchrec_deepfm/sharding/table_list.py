"""The tables to plan for: Criteo Terabyte's, a prepared folder's, or those of a file. Loads no torch.

A file is TOML, JSON or CSV. ``embedding_dim``, ``pooling_factor`` and ``weighted`` may be left out of a table:

    embedding_dim = 64            # of all tables that do not say otherwise

    [[tables]]
    name = "user"
    num_embeddings = 5000000
    pooling_factor = 20.0         # ids a sample, on average

JSON has the same keys; CSV has one line per table below a line of their names.
"""

import csv
import difflib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.data.prepared import PreparedData
from torchrec_deepfm.data.presets import MLPERF_NUM_EMBEDDINGS
from torchrec_deepfm.data.schema import CRITEO_TERABYTE
from torchrec_deepfm.errors import UserError, shown
from torchrec_deepfm.model.table_name import feature_of, table_name
from torchrec_deepfm.sharding.sharding_types import MAX_POOLING_FACTOR
from torchrec_deepfm.small_file import parse_toml, read_text

CRITEO: Final = "criteo-terabyte"
CRITEO_DIM: Final = 128  # MLPerf's DLRM
PREPARED_DIM: Final = 12  # ceil4(10 + 1): what a DeepFM with the paper's k = 10 packs into a row

_MAX_BYTES: Final = 64 << 20
_MAX_NUM_EMBEDDINGS: Final = 2**40
_MAX_DIM: Final = 2**14
_SUFFIXES: Final = (".toml", ".json", ".csv")


@dataclass(frozen=True, kw_only=True)
class Table:
    """One embedding table, as a planner sees it.

    Args:
        name: Its name.
        num_embeddings: Its rows.
        embedding_dim: Its columns.
        pooling_factor: Ids that a sample looks up in it, on average.
        weighted: Whether each id comes with a weight.

    Raises:
        UserError: A value is of the wrong kind or out of its range; the message begins with the key.

    Example:
        >>> Table(name="t_C1", num_embeddings=1000, embedding_dim=16).gib
        5.9604644775390625e-05
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    pooling_factor: float = 1.0
    weighted: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise UserError(f"name: {shown(self.name)} is no name of a table; give a non-empty text")
        if "." in self.name:
            raise UserError(f"name: {self.name!r} has a dot, which torch keeps from names of modules; take it out")
        _check_count("num_embeddings", self.num_embeddings, 1, _MAX_NUM_EMBEDDINGS)
        _check_count("embedding_dim", self.embedding_dim, 4, _MAX_DIM)
        if self.embedding_dim % 4:
            raise UserError(
                f"embedding_dim: {self.embedding_dim} is no multiple of 4, which FBGEMM's kernels want; take "
                f"{self.embedding_dim + -self.embedding_dim % 4} (DeepFM packs its rows to that)"
            )
        pooling = self.pooling_factor
        if isinstance(pooling, bool) or not isinstance(pooling, int | float) or not 0 < pooling <= MAX_POOLING_FACTOR:
            raise UserError(
                f"pooling_factor: {shown(pooling)} is no number of ids; give one greater than 0, at most "
                f"{MAX_POOLING_FACTOR:,}"
            )
        object.__setattr__(self, "pooling_factor", float(pooling))
        if not isinstance(self.weighted, bool):
            raise UserError(f"weighted: {shown(self.weighted)} is neither true nor false; give one of them")

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The feature that looks rows up in it; a constraint may name the table by it."""
        return (feature_of(self.name),)

    @property
    def gib(self) -> float:
        """Size of the float32 weights in GiB."""
        return self.num_embeddings * self.embedding_dim * 4 / 2**30


def criteo_tables(dim: int | None = None) -> tuple[Table, ...]:
    """Return the 26 tables of MLPerf's DLRM on Criteo Terabyte.

    Args:
        dim: Width of every table; by default 128, as MLPerf has it.

    Returns:
        Tables ``t_C1`` to ``t_C26``.

    Example:
        >>> round(sum(table.gib for table in criteo_tables()))
        97
    """
    return tuple(
        Table(name=table_name(column), num_embeddings=rows, embedding_dim=CRITEO_DIM if dim is None else dim)
        for column, rows in zip(CRITEO_TERABYTE.categorical, MLPERF_NUM_EMBEDDINGS, strict=True)
    )


def read_tables(source: str, dim: int | None = None) -> tuple[Table, ...]:
    """Find the tables to plan for.

    Args:
        source: ``criteo-terabyte``; a TOML, JSON or CSV file; or a prepared folder.
        dim: Width of every table, instead of what the file says. Default: 128 for ``criteo-terabyte``, 12 for a
            prepared folder.

    Returns:
        The tables, in the order of the source.

    Raises:
        UserError: There is no such source, or it lists no sound tables.
    """
    path = Path(source)
    if source == CRITEO:
        _check_dim(dim)
        return criteo_tables(dim)
    if path.is_dir():
        _check_dim(dim)
        return _prepared_tables(path, PREPARED_DIM if dim is None else dim)
    if path.suffix not in _SUFFIXES and not path.is_file():
        hint = difflib.get_close_matches(source, [CRITEO], n=1)
        raise UserError(
            f"tables {source!r}: neither {CRITEO} nor a file nor a prepared folder; name one of them"
            + (f" (did you mean {hint[0]!r}?)" if hint else "")
        )
    return _file_tables(path, dim)


def _check_dim(dim: int | None) -> None:
    try:
        Table(name="any", num_embeddings=1, embedding_dim=CRITEO_DIM if dim is None else dim)
    except UserError as error:
        raise UserError(f"--dim: {str(error).removeprefix('embedding_dim: ')}") from error


def _prepared_tables(folder: Path, dim: int) -> tuple[Table, ...]:
    data = PreparedData.open(folder)
    pooling = {}
    for column in data.schema.multi_hot:
        # The borders of the bags count the ids, whatever the padding of a folder of H ids a row.
        bags = [data.arrays(day).bags[column] for day in data.splits["train"]]
        rows = sum(len(each.ids) if each.offsets is None else len(each.offsets) - 1 for each in bags)
        ids = sum(math.prod(each.ids.shape) for each in bags)
        pooling[column] = ids / rows if rows and ids else 1.0
    return tuple(
        Table(
            name=table_name(column),
            num_embeddings=rows,
            embedding_dim=dim,
            pooling_factor=pooling.get(column, 1.0),
            weighted=column in data.schema.weighted,
        )
        for column, rows in data.num_embeddings.items()
    )


def _file_tables(path: Path, dim: int | None) -> tuple[Table, ...]:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: a list of tables is a .toml, .json or .csv file; give it its ending")
    text = read_text(path, most=_MAX_BYTES, what="list of tables", instead=f"name another one, or {CRITEO}")
    _check_dim(dim)
    try:
        value = _PARSERS[path.suffix](text) if path.suffix != ".toml" else parse_toml(path, text)
    except UserError:
        raise
    except (json.JSONDecodeError, csv.Error, RecursionError, ValueError) as error:
        raise UserError(f"{path}: this is no {path.suffix[1:].upper()}: {error}; correct it") from error
    if isinstance(value, list):
        value = {"tables": value}
    if not isinstance(value, Mapping):
        raise UserError(f'{path}: this is no list of tables; give {{"tables": [...]}}')
    for key in value:
        if key not in ("tables", "embedding_dim"):
            raise UserError(f"{path}: {key}: there is no such key; give embedding_dim and tables")
    listed = value.get("tables")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: no table in it; give at least one, with name, num_embeddings and embedding_dim")
    default = {"embedding_dim": value["embedding_dim"]} if "embedding_dim" in value else {}
    tables: dict[str, Table] = {}
    for number, each in enumerate(listed, start=1):
        table = _table(path, number, each, default, dim)
        if table.name in tables:
            raise UserError(f"{path}: table {table.name} stands twice (the second time at {number}); rename one")
        tables[table.name] = table
    return tuple(tables.values())


def _csv(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    tables = []
    for line in reader:
        if None in line or None in line.values():
            raise ValueError(f"line {reader.line_num} has more or fewer cells than the head")
        tables.append({key: _cell(key, cell) for key, cell in line.items() if cell != ""})
    return tables


def _cell(key: str, cell: str) -> Any:
    """What a cell says; one that can't be read stays a text, which Table then refuses by name."""
    try:
        if key in ("num_embeddings", "embedding_dim"):
            return int(cell)
        if key == "pooling_factor":
            return float(cell)
    except ValueError:
        return cell
    return {"true": True, "false": False}.get(cell.lower(), cell) if key == "weighted" else cell


def _table(path: Path, number: int, value: object, default: Mapping[str, Any], dim: int | None) -> Table:
    where = f"{path}: table {number}"
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {shown(value)} is no table; give name, num_embeddings and embedding_dim")
    known = [each.name for each in fields(Table)]
    name = value.get("name")
    where += f" ({name})" if isinstance(name, str) else ""
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"{where}: {key}: there is no such key; choose from {', '.join(known)}{hint}")
    given = {**default, **value, **({} if dim is None else {"embedding_dim": dim})}
    for key in ("name", "num_embeddings", "embedding_dim"):
        if key not in given:
            remedy = "add it, or give --dim" if key == "embedding_dim" else "add it"
            raise UserError(f"{where}: {key} is missing; {remedy}")
    try:
        return Table(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


_PARSERS: Final[Mapping[str, Any]] = {".json": json.loads, ".csv": _csv}


def _check_count(key: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{key}: {shown(value)} is no count; give a whole number from {least} to {most}")

"""The tables to plan for: those of MLPerf's models, of a prepared folder, or of a file. Loads no torch.

A file is TOML, JSON or CSV. ``embedding_dim``, ``pooling_factor`` and ``weighted`` may be left out of a table:

    embedding_dim = 64            # of all tables without their own

    [[tables]]
    name = "user"
    num_embeddings = 5000000
    pooling_factor = 20.0         # ids per sample, on average

JSON has the same keys; CSV has a line of their names, then one line per table. ``.pt`` and JSON files of the DLRM data
sets are read too (``dlrm_datasets``); where they give no width it is 128.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from msgspec import Meta

from torchrec_deepfm.data.criteo_defaults import MLPERF_NUM_EMBEDDINGS
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.schema import CRITEO_TERABYTE
from torchrec_deepfm.errors import UserError, did_you_mean
from torchrec_deepfm.files import parse_toml, read_text
from torchrec_deepfm.model.table_name import feature_of, table_name
from torchrec_deepfm.sharding.inputs.dlrm_datasets import from_table_config, is_table_config, read_dlrm_tensors
from torchrec_deepfm.sharding.inputs.sharding_types import MAX_POOLING_FACTOR
from torchrec_deepfm.strict_json import as_type, parse_json

CRITEO_DIM: Final = 128  # MLPerf's DLRM and DLRM-DCNv2
# Ids per sample of MLPerf's DLRM-DCNv2, whose data set adds made-up ids to those of Criteo Terabyte.
# Source: mlcommons/training, recommendation_v2/torchrec_dlrm/README.MD, --multi_hot_sizes.
DCNV2_POOLING_FACTORS: Final = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
PREPARED_DIM: Final = 12  # ceil4(10 + 1): what a DeepFM with the paper's k = 10 packs into a row

_MAX_BYTES: Final = 64 << 20
_SUFFIXES: Final = (".toml", ".json", ".csv", ".pt")
_REMEDY: Final = "correct it (every table has name, num_embeddings and embedding_dim; --dim sets one width for all)"
_BOOL: Final = {"true": True, "false": False}

Rows = Annotated[int, Meta(ge=1, le=2**40)]
Width = Annotated[int, Meta(ge=4, le=2**14)]
PoolingFactor = Annotated[float, Meta(gt=0, le=MAX_POOLING_FACTOR)]


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
        ValueError: The name or the width can't be a table's.

    Example:
        >>> Table(name="t_C1", num_embeddings=1000, embedding_dim=16).gib
        5.9604644775390625e-05
    """

    name: str
    num_embeddings: Rows
    embedding_dim: Width
    pooling_factor: PoolingFactor = 1.0
    weighted: bool = False

    def __post_init__(self) -> None:
        """Check what no type declares."""
        if not self.name or not self.name.isprintable():
            raise ValueError(f"name: {self.name!r} is not a valid name of a table (empty, or not printable)")
        if "." in self.name:
            raise ValueError(f"name: {self.name!r} has a dot, which torch does not allow in names of modules")
        if self.embedding_dim % 4:
            raise ValueError(
                f"embedding_dim: {self.embedding_dim} is not a multiple of 4, which FBGEMM's kernels need (DeepFM "
                f"packs such rows into {self.embedding_dim + -self.embedding_dim % 4} columns)"
            )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The feature that looks rows up in it; a constraint may name the table by it."""
        return (feature_of(self.name),)

    @property
    def gib(self) -> float:
        """Size of the float32 weights in GiB."""
        return self.num_embeddings * self.embedding_dim * 4 / 2**30


@dataclass(frozen=True, kw_only=True)
class _TableFile:
    tables: Annotated[tuple[Table, ...], Meta(min_length=1)]


def criteo_tables(dim: int | None = None) -> tuple[Table, ...]:
    """Return the 26 tables of MLPerf's DLRM on Criteo Terabyte, by default 128 wide.

    Example:
        >>> round(sum(table.gib for table in criteo_tables()))
        97
    """
    return _mlperf_tables((1,) * len(MLPERF_NUM_EMBEDDINGS), dim)


def criteo_dcnv2_tables(dim: int | None = None) -> tuple[Table, ...]:
    """Return the 26 tables of MLPerf's DLRM-DCNv2: Criteo Terabyte's, with 1 to 100 ids per sample.

    Example:
        >>> sum(table.pooling_factor for table in criteo_dcnv2_tables())
        214.0
    """
    return _mlperf_tables(DCNV2_POOLING_FACTORS, dim)


def _mlperf_tables(pooling_factors: Sequence[int], dim: int | None) -> tuple[Table, ...]:
    columns = zip(CRITEO_TERABYTE.categorical, MLPERF_NUM_EMBEDDINGS, pooling_factors, strict=True)
    return tuple(
        Table(
            name=table_name(column),
            num_embeddings=rows,
            embedding_dim=CRITEO_DIM if dim is None else dim,
            pooling_factor=float(ids),
        )
        for column, rows, ids in columns
    )


NAMED_TABLES: Final[Mapping[str, Callable[[int | None], tuple[Table, ...]]]] = {
    "criteo-terabyte": criteo_tables,
    "criteo-dcnv2": criteo_dcnv2_tables,
}
"""What ``--tables`` knows by name."""


def read_tables(source: str, dim: int | None = None) -> tuple[Table, ...]:
    """Find the tables to plan for: a key of ``NAMED_TABLES``; a TOML, JSON or CSV file; or a prepared folder.

    ``dim`` overrides the file's widths. Default: 128 for named tables, 12 for a prepared folder.
    """
    path = Path(source)
    if dim is not None:
        as_type({"name": "any", "num_embeddings": 1, "embedding_dim": dim}, Table, where="--dim", remedy="take another")
    if source in NAMED_TABLES:
        return NAMED_TABLES[source](dim)
    if path.is_dir():
        return _prepared_tables(path, PREPARED_DIM if dim is None else dim)
    if path.suffix in _SUFFIXES:
        return _file_tables(path, dim)
    if path.is_file():
        raise UserError(
            "a list of tables is a .toml, .json, .csv or .pt file",
            where=path,
            remedy="add the right suffix to its name",
        )
    raise UserError(
        f"neither {' nor '.join(NAMED_TABLES)} nor a file nor a prepared folder",
        where=f"tables {source!r}",
        remedy="name one of them" + did_you_mean(source, NAMED_TABLES),
    )


def _prepared_tables(folder: Path, dim: int) -> tuple[Table, ...]:
    data = PreparedData.open(folder)
    pooling = {}
    for column in data.schema.multi_hot:
        # The offsets of the bags count the ids, whatever the padding of a folder of H ids per row.
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
    if path.suffix == ".pt":
        return _listed_tables(path, read_dlrm_tensors(path), CRITEO_DIM if dim is None else dim)
    text = read_text(path, most=_MAX_BYTES, what="list of tables", instead="name another one")
    if path.suffix == ".csv":
        raw: Any = _parse_csv(path, text)
    else:
        raw = parse_toml(path, text) if path.suffix == ".toml" else parse_json(text, where=str(path), remedy=_REMEDY)
    return _listed_tables(path, raw, dim)


def _listed_tables(path: Path, raw: Any, dim: int | None) -> tuple[Table, ...]:
    raw = {"tables": raw} if isinstance(raw, list) else raw
    if isinstance(raw, dict) and isinstance(listed := raw.get("tables"), list):
        width = {"embedding_dim": raw.pop("embedding_dim")} if "embedding_dim" in raw else {}
        if any(map(is_table_config, listed)):
            width = width or {"embedding_dim": CRITEO_DIM}
            listed = [from_table_config(n, one) if is_table_config(one) else one for n, one in enumerate(listed)]
        forced = {} if dim is None else {"embedding_dim": dim}
        raw["tables"] = [{**width, **each, **forced} if isinstance(each, dict) else each for each in listed]
    tables = as_type(raw, _TableFile, where=str(path), remedy=_REMEDY).tables
    counts = Counter(table.name for table in tables)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise UserError(f"table {twice} appears twice", where=path, remedy="rename one")
    return tables


def _parse_csv(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        tables = []
        for line in reader:
            if None in line or None in line.values():
                raise csv.Error(f"line {reader.line_num} has more or fewer cells than the head")
            tables.append({key: _cell(key, cell) for key, cell in line.items() if cell != ""})
    except csv.Error as error:
        raise UserError(f"not a CSV file ({error})", where=path, remedy=_REMEDY) from error
    return tables


def _cell(key: str, cell: str) -> Any:
    """Convert a cell; one that can't be converted stays text, which ``Table`` then refuses with its key."""
    parsers: dict[str, Callable[[str], Any]] = {
        "num_embeddings": int,
        "embedding_dim": int,
        "pooling_factor": float,
        "weighted": _BOOL.__getitem__,
    }
    try:
        return parsers.get(key, str)(cell.lower() if key == "weighted" else cell)
    except (KeyError, ValueError):
        return cell

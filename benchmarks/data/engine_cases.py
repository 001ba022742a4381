"""The cases of ``engines.py``: one job of ``prepare`` with one engine, in a process of its own.

    python -m benchmarks.data.engine_cases JOB CASE SETTINGS_AS_JSON

prints as JSON the seconds (without imports), the number of items and a check value of the result, equal for all
engines. Threads are limited by the environment (``commands.environment``), and for DuckDB by the settings. Every case
imports only its engine, so that its peak memory is its own.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import duckdb
    import polars as pl

# 13 numbers and 26 categories in hexadecimal digits.
NUMBERS = [f"n{j}" for j in range(13)]
CATEGORIES = [f"c{j}" for j in range(26)]
BATCH_ROWS = 1 << 18

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Paths of the data, and limits; ``memory`` is in MiB."""

    text: Path = Path()
    column: Path = Path()
    rows: Path = Path()
    vocabulary: Path = Path()
    work: Path = Path()
    threads: int = 2
    memory: int = 1024
    min_count: int = 3
    block_bytes: int = 64 << 20


# Parse: text -> typed columns in the order of the text, returned in pieces.


def parse_duckdb_columns(settings: Settings) -> Iterator["pl.DataFrame"]:
    """read_csv with a column per field, numbers typed by the reader, categories cast."""
    columns = {"label": "UTINYINT"} | dict.fromkeys(NUMBERS, "BIGINT") | dict.fromkeys(CATEGORIES, "VARCHAR")
    source = f"read_csv('{settings.text}', columns = {columns}, delim = '\t', header = false, quote = '', escape = '')"
    casts = [f"('0x' || {name})::UINTEGER AS {name}" for name in CATEGORIES]
    yield from _duckdb_pieces(settings, f"SELECT label, {', '.join([*NUMBERS, *casts])} FROM {source}")


def parse_duckdb_lines(settings: Settings) -> Iterator["pl.DataFrame"]:
    """One column, checked by one regular expression and then split: the first version of ``prepare``."""
    pattern = r"[01](?:\t(?:-?[0-9]+)?){13}(?:\t(?:[0-9a-fA-F]{1,8})?){26}"
    casts = ["f[1]::UTINYINT AS label"]
    casts += [f"nullif(f[{2 + j}], '')::BIGINT AS {name}" for j, name in enumerate(NUMBERS)]
    casts += [f"('0x' || nullif(f[{15 + j}], ''))::UINTEGER AS {name}" for j, name in enumerate(CATEGORIES)]
    source = (
        f"read_csv('{settings.text}', columns = {{'line': 'VARCHAR'}}, header = false, delim = '\x01\x02\x03\x04', "
        "auto_detect = false, quote = '', escape = '', nullstr = '', strict_mode = false)"
    )
    checked = f"CASE WHEN regexp_full_match(line, '{pattern}') THEN string_split(line, chr(9)) ELSE error('bad') END"
    yield from _duckdb_pieces(settings, f"SELECT {', '.join(casts)} FROM (SELECT {checked} AS f FROM {source})")


def parse_polars_blocks(settings: Settings) -> Iterator["pl.DataFrame"]:
    """read_csv of a block of text at a time (64 MiB by default), cut at a line's end."""
    import polars as pl

    with settings.text.open("rb") as file:
        rest = b""
        while block := file.read(settings.block_bytes):
            end = block.rfind(b"\n") + 1
            yield pl.read_csv(rest + block[:end], **_polars_csv()).with_columns(_polars_hex())
            rest = block[end:]
        assert not rest, "the last line has no end"


def parse_polars_scan(settings: Settings) -> Iterator["pl.DataFrame"]:
    """scan_csv on the streaming engine."""
    import polars as pl

    lazy = pl.scan_csv(settings.text, **_polars_csv()).with_columns(_polars_hex())
    yield from lazy.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True, engine="streaming")


def parse_pyarrow(settings: Settings) -> Iterator["pl.DataFrame"]:
    """open_csv; Arrow has no hexadecimal cast, so Polars does that on its buffers."""
    import polars as pl
    import pyarrow as pa
    from pyarrow import csv

    pa.set_cpu_count(settings.threads)
    types = {"label": pa.uint8()} | dict.fromkeys(NUMBERS, pa.int64()) | dict.fromkeys(CATEGORIES, pa.string())
    reader = csv.open_csv(
        settings.text,
        read_options=csv.ReadOptions(column_names=list(types), block_size=settings.block_bytes),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False),
        convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
    )
    for batch in reader:
        yield pl.DataFrame(pl.from_arrow(batch)).with_columns(_polars_hex())


def _duckdb_pieces(settings: Settings, query: str) -> Iterator["pl.DataFrame"]:
    import polars as pl

    for batch in _duckdb(settings).execute(query).to_arrow_reader(BATCH_ROWS):
        yield pl.DataFrame(pl.from_arrow(batch))


def _polars_csv() -> dict[str, Any]:
    import polars as pl

    schema = {"label": pl.UInt8} | dict.fromkeys(NUMBERS, pl.Int64) | dict.fromkeys(CATEGORIES, pl.String)
    return {"separator": "\t", "has_header": False, "quote_char": None, "schema": schema}


def _polars_hex() -> "pl.Expr":
    import polars as pl

    return pl.col(CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32, strict=True)


def parse(case: Callable[[Settings], Iterator["pl.DataFrame"]], settings: Settings) -> tuple[int, list[int]]:
    """Drain the pieces. The check: rows, clicks, sum of the numbers, of the categories, of both with their place."""
    import polars as pl

    rows = 0
    totals = [0] * 5
    for piece in case(settings):
        sums = piece.select(
            pl.col("label").cast(pl.Int64).sum().alias("label"),
            pl.sum_horizontal(pl.col(NUMBERS).sum()).alias("numbers"),
            pl.sum_horizontal(pl.col(CATEGORIES).cast(pl.Int64).sum()).alias("categories"),
            pl.sum_horizontal(pl.col(NUMBERS + CATEGORIES).null_count()).alias("missing"),
            # The row's number goes in too, so that a changed order shows.
            (pl.col("c0").cast(pl.Int64).fill_null(0) * ((pl.int_range(pl.len()) + rows) % 251)).sum().alias("order"),
        ).row(0)
        totals = [total + int(value) for total, value in zip(totals, sums, strict=True)]
        rows += len(piece)
    return rows, [rows, *totals]


# Group: a column -> its vocabulary (value, id, count) with a threshold, ids by falling count, ties by value.


def group_duckdb(settings: Settings) -> Path:
    """GROUP BY under DuckDB's memory limit."""
    target = settings.work / "vocabulary.parquet"
    _duckdb(settings).execute(f"""
        COPY (SELECT value, row_number() OVER (ORDER BY count DESC, value)::INTEGER AS id, count
              FROM (SELECT value, count(*) AS count FROM read_parquet('{settings.column}')
                    GROUP BY value HAVING count(*) >= {settings.min_count})
              ORDER BY id) TO '{target}' (FORMAT parquet)
    """)
    return target


def group_polars(settings: Settings) -> Path:
    """group_by on the streaming engine; ``engines.py`` runs it with and without a budget for spilling."""
    import polars as pl

    target = settings.work / "vocabulary.parquet"
    counts = pl.scan_parquet(settings.column).group_by("value").agg(pl.len().alias("count"))
    kept = counts.filter(pl.col("count") >= settings.min_count).sort(["count", "value"], descending=[True, False])
    kept.with_row_index("id", offset=1).sink_parquet(target, engine="streaming")
    return target


def group_pyarrow(settings: Settings) -> Path:
    """Table.group_by, all in memory."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    pa.set_cpu_count(settings.threads)
    target = settings.work / "vocabulary.parquet"
    counts = pq.read_table(settings.column).group_by("value").aggregate([([], "count_all")])
    counts = counts.filter(pc.field("count_all") >= settings.min_count)
    counts = counts.sort_by([("count_all", "descending"), ("value", "ascending")]).rename_columns(["value", "count"])
    pq.write_table(counts.append_column("id", pa.array(np.arange(1, len(counts) + 1, dtype=np.int32))), target)
    return target


def group_numpy(settings: Settings) -> Path:
    """numpy.unique, which sorts; all in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = settings.work / "vocabulary.parquet"
    values, counts = np.unique(pq.read_table(settings.column)["value"].to_numpy(), return_counts=True)
    kept = counts >= settings.min_count
    values, counts = values[kept], counts[kept]
    order = np.lexsort((values, -counts))
    ids = np.arange(1, len(order) + 1, dtype=np.int32)
    pq.write_table(pa.table({"value": values[order], "id": ids, "count": counts[order]}), target)
    return target


def group(case: Callable[[Settings], Path], settings: Settings) -> tuple[int, Callable[[], list[int]]]:
    """The check: values kept, their rows, and the values with their ids."""
    import pyarrow.parquet as pq

    target = case(settings)

    def check() -> list[int]:
        kept = pq.read_table(target)
        value, ids, count = (kept[name].to_numpy().astype(np.int64) for name in ("value", "id", "count"))
        return [len(kept), int(count.sum()), int((value * (ids % 251)).sum())]

    return pq.read_metadata(settings.column).num_rows, check


# Join: a column's values -> ids by a vocabulary, 0 where it has none, in the order of the rows.


def join_duckdb(settings: Settings) -> Ids:
    """LEFT JOIN of two Parquet files; a join keeps no order, so every id carries its row's number."""
    found = (
        _duckdb(settings)
        .execute(f"""
        SELECT r.file_row_number AS row, coalesce(v.id, 0) AS id
        FROM read_parquet('{settings.rows}', file_row_number = true) AS r
        LEFT JOIN read_parquet('{settings.vocabulary}') AS v ON r.value = v.value
    """)
        .fetchnumpy()
    )
    ids = np.empty(len(found["row"]), np.int32)
    ids[found["row"]] = found["id"]
    return ids


def join_polars(settings: Settings) -> Ids:
    """DataFrame.join in memory."""
    import polars as pl

    vocabulary = pl.read_parquet(settings.vocabulary, columns=["value", "id"])
    rows = pl.read_parquet(settings.rows)
    return rows.join(vocabulary, on="value", how="left", maintain_order="left")["id"].fill_null(0).to_numpy()


def join_polars_streaming(settings: Settings) -> Ids:
    """A lazy join of two Parquet files on the streaming engine."""
    import polars as pl

    vocabulary = pl.scan_parquet(settings.vocabulary).select("value", "id")
    joined = pl.scan_parquet(settings.rows).join(vocabulary, on="value", how="left", maintain_order="left")
    return joined.select(pl.col("id").fill_null(0)).collect(engine="streaming")["id"].to_numpy()


def join_pyarrow(settings: Settings) -> Ids:
    """index_in; the place in the vocabulary's order is the id, less one."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    pa.set_cpu_count(settings.threads)
    known = pq.read_table(settings.vocabulary, columns=["value"])["value"].combine_chunks()
    places = pc.index_in(pq.read_table(settings.rows)["value"], value_set=known)
    return pc.add(pc.fill_null(places, -1), 1).to_numpy().astype(np.int32)


def join_numpy(settings: Settings) -> Ids:
    """A binary search (searchsorted) in the values, which are sorted first."""
    import pyarrow.parquet as pq

    vocabulary = pq.read_table(settings.vocabulary, columns=["value", "id"])
    values, ids = vocabulary["value"].to_numpy(), vocabulary["id"].to_numpy()
    order = np.argsort(values)
    values, ids = values[order], ids[order]
    rows = pq.read_table(settings.rows)["value"].to_numpy()
    places = np.minimum(np.searchsorted(values, rows), len(values) - 1)
    return np.where(values[places] == rows, ids[places], 0).astype(np.int32)


def join(case: Callable[[Settings], Ids], settings: Settings) -> tuple[int, Callable[[], list[int]]]:
    """The check: how many are known, and the ids with their rows."""
    ids = case(settings)

    def check() -> list[int]:
        assert ids.dtype in (np.int32, np.uint32), ids.dtype
        return [int((ids > 0).sum()), int((ids.astype(np.int64) * (np.arange(len(ids)) % 251)).sum())]

    return len(ids), check


def _duckdb(settings: Settings) -> "duckdb.DuckDBPyConnection":
    import duckdb

    return duckdb.connect(
        config={
            "threads": settings.threads,
            "memory_limit": f"{settings.memory}MiB",
            "temp_directory": str(settings.work / "spill"),
        }
    )


CASES: dict[str, dict[str, Callable[[Settings], Any]]] = {
    "parse": {
        "duckdb-columns": parse_duckdb_columns,
        "duckdb-lines": parse_duckdb_lines,
        "polars-blocks": parse_polars_blocks,
        "polars-scan": parse_polars_scan,
        "pyarrow": parse_pyarrow,
    },
    "group": {
        "duckdb": group_duckdb,
        "polars": group_polars,
        "polars-spilling": group_polars,
        "pyarrow": group_pyarrow,
        "numpy": group_numpy,
    },
    "join": {
        "duckdb": join_duckdb,
        "polars": join_polars,
        "polars-streaming": join_polars_streaming,
        "pyarrow": join_pyarrow,
        "numpy": join_numpy,
    },
}
# What is imported before the clock starts.
ENGINES = {"duckdb": ("duckdb", "polars"), "polars": ("polars",), "pyarrow": ("pyarrow.csv", "polars"), "numpy": ()}


def main(job: str, case: str, settings: Settings) -> None:
    for module in (*ENGINES[case.partition("-")[0]], *(("pyarrow.parquet",) if job != "parse" else ())):
        __import__(module)
    started = time.perf_counter()
    check: Any
    items, check = {"parse": parse, "group": group, "join": join}[job](CASES[job][case], settings)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "items": items, "check": check() if callable(check) else check}))


if __name__ == "__main__":
    given = json.loads(sys.argv[3])
    main(
        sys.argv[1],
        sys.argv[2],
        Settings(**{key: Path(value) if isinstance(value, str) else value for key, value in given.items()}),
    )

"""DuckDB against Polars' streaming engine, Arrow and numpy on the three jobs of ``prepare``.

    python -m benchmarks.data.engines
    python -m benchmarks.data.engines --jobs join --vocabularies 5000 40000000

- **parse**: Criteo's text, plain, to typed columns, hexadecimal digits to uint32.
- **group**: a column with tens of millions of distinct values to its vocabulary with a threshold, under a memory limit.
- **join**: values to ids by vocabularies of growing size.

Every run is a process of its own (``engine_cases.py``), so that its peak memory is its own; the engines take turns, and
medians are printed. All must come to the same result. Reading their input and handing the result over counts as time,
imports don't. Only DuckDB and Polars with a budget are told of the memory limit; the last column is the peak of the
anonymous memory as a share of it, the interpreter's own included. A run that passes the ceiling is killed.
"""

import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks._lib.commands import module_command
from benchmarks._lib.formatting import MIB, size
from benchmarks._lib.resource_usage import measure, pick_cores
from benchmarks.data import big_log
from benchmarks.data.engine_cases import CASES

# An odd factor keeps distinct values distinct modulo 2^32, and spreads them.
SPREAD = np.uint32(2_654_435_761)
BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    jobs: tuple[Literal["parse", "group", "join"], ...] = ("parse", "group", "join")
    """Jobs to run."""
    engines: tuple[str, ...] = ()
    """Cases to run, by the names in the table; all by default."""
    threads: int = 2
    """Cores and threads of each case."""
    memory: int = 1024
    """MiB that DuckDB, and Polars where it spills, are told to keep to."""
    ceiling: int = 12 * 1024
    """MiB of anonymous memory at which a run is killed."""
    repeats: int = 3
    """Runs of each case."""
    text_rows: int = 2_000_000
    """parse: rows of text."""
    block_bytes: int = 64 << 20
    """parse: bytes of text at a time, where a case cuts it itself."""
    group_rows: int = 60_000_000
    """group: rows of the column."""
    group_range: int = 40_000_000
    """group: values that the column draws from."""
    min_count: int = 3
    """group: values seen less often are left out."""
    lookups: int = 4_000_000
    """join: rows."""
    vocabularies: tuple[int, ...] = (5_000, 1_000_000, 10_000_000, 40_000_000)
    """join: values of the vocabularies."""
    folder: Path | None = None
    """Folder for the data, which are kept and used again; by default a temporary one."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class Case:
    """One engine on one input, and what its runs took."""

    job: str
    name: str
    about: str
    settings: dict[str, object]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    rss: int = 0
    anonymous: int = 0
    spilled: int = 0
    items: int = 0
    check: list[int] | None = None
    failed: str | None = None


def main(options: Options) -> None:
    pick_cores(options.threads)
    given = nullcontext(str(options.folder)) if options.folder else tempfile.TemporaryDirectory(prefix="engines-")
    with given as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        # One input after another, so that those of the larger vocabularies don't lie about meanwhile.
        done: list[Case] = []
        for cases in inputs(options, folder):
            for repeat in range(options.repeats):
                for case in cases:
                    once(case, options, folder)
                    state = case.failed or f"{case.seconds[-1]:.2f} s"
                    print(f"{repeat + 1}/{options.repeats} {case.about} {case.name}: {state}", file=sys.stderr)
            done += cases
    report(options, done)
    if not agree(done):
        raise SystemExit("the engines came to different results")


def inputs(options: Options, folder: Path) -> Iterator[list[Case]]:
    """Make one input after another; the cases on it."""
    limits = {"threads": options.threads, "memory": options.memory, "min_count": options.min_count}
    limits["block_bytes"] = options.block_bytes
    for job in options.jobs:
        if job == "parse":
            text = folder / f"text_{options.text_rows}.tsv"
            if not text.exists():
                big_log.write_log(text, options.text_rows, processes=options.threads)
            about = f"parse {options.text_rows:,} rows"
            yield list(cases(options, job, about, {**limits, "text": str(text)}))
        elif job == "group":
            column = folder / f"column_{options.group_rows}_{options.group_range}.parquet"
            if not column.exists():
                write_column(column, options.group_rows, options.group_range)
            about = f"group {options.group_rows:,} rows of up to {options.group_range:,} values"
            yield list(cases(options, job, about, {**limits, "column": str(column)}))
        else:
            for values in options.vocabularies:
                rows = folder / f"rows_{options.lookups}_{values}.parquet"
                vocabulary = folder / f"vocabulary_{values}.parquet"
                if not rows.exists():
                    # A tenth of the range is unknown to the vocabulary.
                    write_column(rows, options.lookups, max(2, values + values // 10))
                if not vocabulary.exists():
                    write_vocabulary(vocabulary, values)
                about = f"join {options.lookups:,} rows, {values:,} values"
                files = {"rows": str(rows), "vocabulary": str(vocabulary)}
                yield list(cases(options, job, about, {**limits, **files}))


def cases(options: Options, job: str, about: str, settings: dict[str, object]) -> Iterator[Case]:
    for name in CASES[job]:
        if not options.engines or name in options.engines:
            environment = {}
            if name == "polars-spilling":
                environment = {"POLARS_OOC_MEMORY_BUDGET_MB": str(options.memory)}
            yield Case(job=job, name=name, about=about, settings=settings, environment=environment)


def once(case: Case, options: Options, folder: Path) -> None:
    """Run a case once in an empty working folder and keep what it took."""
    if case.failed:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as work:
        environment = dict(case.environment)
        if environment:
            environment["POLARS_OOC_SPILL_DIR"] = work
        settings = json.dumps({**case.settings, "work": work})
        measured = measure(
            module_command("benchmarks.data.engine_cases", case.job, case.name, settings),
            cores=pick_cores(options.threads),
            environment=environment,
            watch=Path(work),
            ceiling=options.ceiling * MIB,
        )
    case.rss, case.anonymous = max(case.rss, measured.peak), max(case.anonymous, measured.anonymous)
    case.spilled = max(case.spilled, measured.disk)
    if measured.over:
        case.failed = f"killed at {size(options.ceiling * MIB)} after {measured.seconds:.0f} s"
    elif measured.code:
        case.failed = measured.last_error
    else:
        found = json.loads(measured.output.splitlines()[-1])
        case.seconds.append(found["seconds"])
        case.items, case.check = found["items"], found["check"]


def write_column(path: Path, rows: int, values: int) -> None:
    """``rows`` draws from so many values as a column ``value``: 7 of 10 uniform, the others log-uniform."""
    draw = np.random.Generator(np.random.SFC64(values))
    with pq.ParquetWriter(path, pa.schema([("value", pa.uint32())])) as writer:
        for start in range(0, rows, BLOCK):
            lot = draw.random(min(BLOCK, rows - start))
            rank = np.where(lot < 0.7, 1 + lot * (values / 0.7), np.exp((lot - 0.7) * (np.log(values) / 0.3)))
            rank = np.minimum(rank.astype(np.uint32), np.uint32(values))
            writer.write_table(pa.table({"value": rank * SPREAD}), row_group_size=1 << 20)


def write_vocabulary(path: Path, values: int) -> None:
    """``values`` rows (value, id, count) in the order of the ids; the value of rank r has id r."""
    types = {"value": pa.uint32(), "id": pa.int32(), "count": pa.int64()}
    with pq.ParquetWriter(path, pa.schema(types.items())) as writer:
        for start in range(0, values, BLOCK):
            rank = np.arange(1 + start, 1 + min(start + BLOCK, values), dtype=np.uint32)
            columns = {"value": rank * SPREAD, "id": rank.astype(np.int32), "count": values - rank.astype(np.int64)}
            writer.write_table(pa.table(columns, schema=writer.schema), row_group_size=1 << 20)


def agree(done: list[Case]) -> bool:
    """Whether all engines on the same input came to the same result."""
    found: dict[str, list[list[int]]] = {}
    for case in done:
        if case.check is not None:
            found.setdefault(case.about, []).append(case.check)
    return all(check == checks[0] for checks in found.values() for check in checks)


def report(options: Options, done: list[Case]) -> None:
    versions = {name: metadata.version(name) for name in ("duckdb", "polars", "pyarrow", "numpy")}
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    print(
        f"{options.threads} threads, limit {options.memory} MiB, {options.repeats} runs of each; "
        "text and Parquet files in the page cache"
    )
    about = None
    for case in done:
        if case.about != about:
            about = case.about
            print(
                f"\n{about}\n| engine | seconds, median (range) | rows/s | peak RSS | on disk | anonymous | : limit |"
            )
            print("| --- | --- | --- | --- | --- | --- | --- |")
        share = case.anonymous / (options.memory * MIB)
        sizes = f"{size(case.rss)} | {size(case.spilled)} | {size(case.anonymous)} | {share:.2f}"
        if case.failed:
            print(f"| {case.name} | failed: {case.failed} | | {sizes} |")
            continue
        middle = statistics.median(case.seconds)
        times = f"{middle:.2f} ({min(case.seconds):.2f} to {max(case.seconds):.2f})"
        print(f"| {case.name} | {times} | {case.items / middle:,.0f} | {sizes} |")
    if options.output is not None:
        keys = ("job", "name", "about", "seconds", "rss", "anonymous", "spilled", "items", "check", "failed")
        runs = [{key: getattr(case, key) for key in keys} for case in done]
        found = {"threads": options.threads, "memory_mib": options.memory, "versions": versions, "runs": runs}
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

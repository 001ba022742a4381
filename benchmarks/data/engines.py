"""Compares DuckDB, Polars' streaming engine, Arrow and numpy on the three jobs of ``prepare``.

    python -m benchmarks.data.engines
    python -m benchmarks.data.engines --jobs join --vocabularies 5000 40000000

- **parse**: Criteo's plain text to typed columns, hexadecimal digits to uint32.
- **group**: a column with tens of millions of distinct values to its vocabulary with a threshold, under a memory limit.
- **join**: values to ids by vocabularies of growing size.

Every run is a process of its own (``engine_cases.py``), so that its peak memory is its own; the engines alternate, and
medians are printed. All must give the same result. Times include reading the input and returning the result, and
exclude imports. Only DuckDB, and Polars with a budget, get the memory limit; the last column is the peak of the
anonymous memory as a share of it, the interpreter's included. A run that exceeds the ceiling is killed.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks._lib.commands import module_command, working_folder
from benchmarks._lib.formatting import MIB, markdown, markdown_row, size, spread, versions, versions_line
from benchmarks._lib.resource_usage import measure, pick_cores
from benchmarks.data import big_log
from benchmarks.data.engine_cases import CASES

BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    jobs: tuple[Literal["parse", "group", "join"], ...] = ("parse", "group", "join")
    """Jobs to run."""
    engines: tuple[str, ...] = ()
    """Cases to run, by their names in the table. Default: all."""
    threads: int = 2
    """Cores and threads of each case."""
    memory: int = 1024
    """MiB that DuckDB, and Polars where it spills, may use."""
    ceiling: int = 12 * 1024
    """MiB of anonymous memory at which a run is killed."""
    repeats: int = 3
    """Runs of each case."""
    text_rows: int = 2_000_000
    """parse: rows of text."""
    block_bytes: int = 64 << 20
    """parse: bytes of text per block, for cases that split the text themselves."""
    group_rows: int = 60_000_000
    """group: rows of the column."""
    group_range: int = 40_000_000
    """group: distinct values that the column draws from."""
    min_count: int = 3
    """group: values seen less often are left out."""
    lookups: int = 4_000_000
    """join: rows."""
    vocabularies: tuple[int, ...] = (5_000, 1_000_000, 10_000_000, 40_000_000)
    """join: values of the vocabularies."""
    folder: Path | None = None
    """Folder for the data, which are kept and reused. Default: a temporary one."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class Case:
    """One engine on one input, and the usage of its runs."""

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
    with working_folder(options.folder, "engines-") as folder:
        # One input at a time: the larger vocabularies need disk space only when it is their turn.
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
        raise SystemExit("the engines gave different results")


def inputs(options: Options, folder: Path) -> Iterator[list[Case]]:
    """Make one input after another; yield the cases on it."""
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
    """Run a case once in an empty working folder and record its usage."""
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
    """Write ``rows`` draws from ``values`` values as a column ``value``: 7 of 10 uniform, the others log-uniform."""
    draw = np.random.Generator(np.random.SFC64(values))
    with pq.ParquetWriter(path, pa.schema([("value", pa.uint32())])) as writer:
        for start in range(0, rows, BLOCK):
            rank = big_log.skewed_ranks(draw, min(BLOCK, rows - start), values, 0.7)
            writer.write_table(pa.table({"value": rank * big_log.ODD_FACTOR}), row_group_size=1 << 20)


def write_vocabulary(path: Path, values: int) -> None:
    """Write ``values`` rows (value, id, count) in the order of the ids; the value of rank r has id r."""
    types = {"value": pa.uint32(), "id": pa.int32(), "count": pa.int64()}
    with pq.ParquetWriter(path, pa.schema(types.items())) as writer:
        for start in range(0, values, BLOCK):
            rank = np.arange(1 + start, 1 + min(start + BLOCK, values), dtype=np.uint32)
            columns = {
                "value": rank * big_log.ODD_FACTOR,
                "id": rank.astype(np.int32),
                "count": values - rank.astype(np.int64),
            }
            writer.write_table(pa.table(columns, schema=writer.schema), row_group_size=1 << 20)


def agree(done: list[Case]) -> bool:
    """Return whether all engines gave the same result on the same input."""
    found: dict[str, list[list[int]]] = {}
    for case in done:
        if case.check is not None:
            found.setdefault(case.about, []).append(case.check)
    return all(check == checks[0] for checks in found.values() for check in checks)


def report(options: Options, done: list[Case]) -> None:
    """Print a table per input, and write all figures as JSON."""
    found = versions("duckdb", "polars", "pyarrow", "numpy")
    print(versions_line(found))
    print(
        f"{options.threads} threads, limit {options.memory} MiB, {options.repeats} runs of each; "
        "text and Parquet files in the page cache"
    )
    about = None
    for case in done:
        if case.about != about:
            about = case.about
            head = ("engine", "seconds, median (range)", "rows/s", "peak RSS", "on disk", "anonymous", ": limit")
            print(f"\n{about}\n{markdown(head)}")
        share = case.anonymous / (options.memory * MIB)
        sizes = (size(case.rss), size(case.spilled), size(case.anonymous), f"{share:.2f}")
        times = (f"failed: {case.failed}", "")
        if not case.failed:
            times = (spread(case.seconds, ".2f"), f"{case.items / statistics.median(case.seconds):,.0f}")
        print(markdown_row((case.name, *times, *sizes)))
    if options.output is not None:
        keys = ("job", "name", "about", "seconds", "rss", "anonymous", "spilled", "items", "check", "failed")
        runs = [{key: getattr(case, key) for key in keys} for case in done]
        content = {"threads": options.threads, "memory_mib": options.memory, "versions": found, "runs": runs}
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

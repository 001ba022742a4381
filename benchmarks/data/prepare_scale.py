"""Peak memory, time per row and disk of ``prepare`` as the input grows, and a projection for Criteo Terabyte.

    python -m benchmarks.data.prepare_scale --folder scale
    python -m benchmarks.data.prepare_scale --sizes 200000 2000000 --modes hash

``big_log.py`` makes the text (5 GB for 20 million rows; kept in ``--folder`` for the next run), with columns of up to
40 million values. Each run is the whole command, start of Python included. Memory is that of the whole process tree,
sampled 20 times per second. RSS includes mapped files and counts shared pages once per process, so it is an upper
bound; its anonymous part was allocated; "largest process" is the kernel's record, which includes spikes between
samples. The peak is the higher of RSS and largest process. Disk is the peak of the output and the working files.

The projection uses the largest size, and prints its assumptions.
"""

import json
import math
import shlex
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from benchmarks._lib.commands import module_command, working_folder
from benchmarks._lib.formatting import GIB, markdown, markdown_row, size, versions, versions_line
from benchmarks._lib.resource_usage import ResourceUsage, measure, pick_cores
from benchmarks.data import big_log

MODES = ("hash", "vocabulary")
# Criteo Terabyte: rows and bytes of text of its 24 days.
TERABYTE_ROWS = 4_373_472_329
TERABYTE_BYTES = 1.0e12
TERABYTE_DAYS = 24
TERABYTE_CORES = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    sizes: tuple[int, ...] = (2_000_000, 20_000_000)
    """Rows of the inputs, growing."""
    modes: tuple[Literal["hash", "vocabulary"], ...] = MODES
    """Modes of prepare."""
    files: int = 1
    """Files that each input is split into."""
    repeats: int = 1
    """Runs of each size and mode, alternating."""
    cores: int = 2
    """Cores that prepare may use."""
    min_count: int = 10
    """Vocabulary: values that occur less often share one id."""
    num_embeddings: int = 40_000_000
    """Hashing: ids per column."""
    limit: float = 2.0
    """Target for the peak, in GiB."""
    prepare_options: str = ""
    """More options of prepare, such as "--memory 1GiB"."""
    folder: Path | None = None
    """Folder for the text, which is kept, and the output, which is removed. Default: a temporary one."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class Runs:
    """The runs of one mode on one size: maxima of sizes in bytes, all times in seconds."""

    mode: str
    rows: int
    text: int
    values: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rss: int = 0
    anonymous: int = 0
    pss: int = 0
    largest: int = 0
    disk: int = 0
    written: int = 0
    ids: int = 0

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return max(self.rss, self.largest)

    @property
    def microseconds(self) -> float:
        """Median time per row in us."""
        return 1e6 * statistics.median(self.seconds) / self.rows

    def add(self, measured: ResourceUsage, written: int, ids: int) -> None:
        """Add one run."""
        self.seconds.append(measured.seconds)
        self.cpu.append(measured.cpu)
        for name in ("rss", "anonymous", "pss", "largest", "disk"):
            setattr(self, name, max(getattr(self, name), getattr(measured, name)))
        self.written, self.ids = written, ids


def main(options: Options) -> None:
    pick_cores(options.cores)
    with working_folder(options.folder, "scale-") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        done: list[Runs] = []
        for rows in options.sizes:
            inputs = make_text(folder, rows, options)
            text, values = sum(path.stat().st_size for path in inputs), distinct(inputs, folder)
            done += [Runs(mode=mode, rows=rows, text=text, values=values) for mode in options.modes]
        for repeat in range(options.repeats):
            for runs in done:
                once(runs, make_text(folder, runs.rows, options), folder, options)
                state = f"{runs.seconds[-1]:.1f} s, {size(runs.peak)}"
                print(f"{repeat + 1}/{options.repeats} {runs.mode}, {runs.rows:,} rows: {state}", file=sys.stderr)
    report(options, done)


def make_text(folder: Path, rows: int, options: Options) -> list[Path]:
    """Return the text files of one size; write the missing ones."""
    paths = []
    for i in range(options.files):
        count = rows * (i + 1) // options.files - rows * i // options.files
        paths.append(folder / f"text_{rows}_{options.files}_{i}.tsv")
        if not paths[-1].exists():
            big_log.write_log(paths[-1], count, seed=i, processes=options.cores)
    return paths


def distinct(inputs: list[Path], folder: Path) -> int:
    """Return the sum of the distinct values of the large columns, as estimated by DuckDB."""
    import duckdb

    wide = [column for column, values in enumerate(big_log.RANGES) if values > big_log.MILLIONS]
    names = {f"c{column}": "VARCHAR" for column in range(1 + len(big_log.LARGEST) + len(big_log.RANGES))}
    first = 1 + len(big_log.LARGEST)
    counts = ", ".join(f"approx_count_distinct(c{first + column})" for column in wide)
    connection = duckdb.connect(config={"memory_limit": "1GiB", "temp_directory": str(folder / "spill")})
    query = (
        f"SELECT {counts} FROM read_csv({[str(path) for path in inputs]}, columns = {names}, delim = '\t', "
        "header = false, quote = '', escape = '')"
    )
    return sum(connection.execute(query).fetchall()[0])


def once(runs: Runs, inputs: list[Path], folder: Path, options: Options) -> None:
    # prepare keeps working files beside its output: a separate folder shows the disk space that it needs.
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    words = {
        "hash": ("--hash", "--num-embeddings", options.num_embeddings),
        "vocabulary": ("--min-count", options.min_count),
    }
    command = module_command("torchrec_deepfm", "prepare", "--input", *inputs, "--output", place / "prepared")
    measured = measure(
        (*command, *words[runs.mode], *shlex.split(options.prepare_options)),
        cores=pick_cores(options.cores),
        watch=place,
    )
    if measured.code:
        raise SystemExit(f"{runs.mode}, {runs.rows:,} rows: {measured.last_error}")
    manifest = json.loads((place / "prepared" / "manifest.json").read_text(encoding="utf-8"))
    rows = sum(day["rows"] for days in manifest["splits"].values() for day in days)
    assert rows == runs.rows, (rows, runs.rows)
    written = sum(path.stat().st_size for path in (place / "prepared").rglob("*") if path.is_file())
    runs.add(measured, written, sum(manifest["num_embeddings"].values()))
    shutil.rmtree(place)


def report(options: Options, done: list[Runs]) -> None:
    """Print the table, the targets and the projection; write all figures as JSON."""
    installed = versions("duckdb", "polars", "pyarrow", "numpy")
    print(versions_line(installed))
    print(f"{options.cores} cores, {options.repeats} runs of each; more options: {options.prepare_options or 'none'}")
    head = ["mode", "rows", "values", "ids", "s", "CPU s", "us/row", "RSS", "PSS", "anonymous"]
    print(markdown([*head, "largest process", "disk", "written"]))
    for runs in done:
        counts = [f"{count:,}" for count in (runs.rows, runs.values, runs.ids)]
        times = [f"{statistics.median(values):.1f}" for values in (runs.seconds, runs.cpu)]
        sizes = map(size, (runs.rss, runs.pss, runs.anonymous, runs.largest, runs.disk, runs.written))
        print(markdown_row([runs.mode, *counts, *times, f"{runs.microseconds:.2f}", *sizes]))
    print("values: distinct values of the columns that have millions, estimated; ids: rows of all embedding tables\n")
    found = {}
    for mode in options.modes:
        small, large = (next(runs for runs in ends if runs.mode == mode) for ends in (done, done[::-1]))
        found[mode] = targets(small, large, options)
        found[mode]["projection"] = projection(small, large, options)
    if options.output is not None:
        runs_json = [asdict(runs) for runs in done]
        content = {"cores": options.cores, "versions": installed, "runs": runs_json, "modes": found}
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def targets(small: Runs, large: Runs, options: Options) -> dict[str, object]:
    """Print the largest size against the smallest, and against the targets."""
    peak, memory, pace = large.peak / GIB, large.peak / small.peak, large.microseconds / small.microseconds
    highest = max(small.peak, large.peak) / GIB
    checks = {
        f"peak {highest:.2f} GiB, at most {options.limit:g}": highest <= options.limit,
        f"peak of {large.rows:,} rows : {small.rows:,} rows = {memory:.2f}, within 20%": 1 / 1.2 <= memory <= 1.2,
        f"time per row {large.rows:,} : {small.rows:,} = {pace:.2f}, at most 1.25": pace <= 1.25,
    }
    for check, met in checks.items():
        print(f"{large.mode}: {check}: {'met' if met else 'MISSED'}")
    return {"peak_gib": peak, "memory_ratio": memory, "time_ratio": pace, "met": all(checks.values())}


def projection(small: Runs, large: Runs, options: Options) -> dict[str, float]:
    """Print the projection from the largest size to Criteo Terabyte on 16 cores."""
    ranks = max(1, TERABYTE_CORES // options.cores)
    share = math.ceil(TERABYTE_DAYS / ranks) / TERABYTE_DAYS  # of the rows, on the rank with the most days
    seconds = TERABYTE_ROWS * share * large.microseconds / 1e6
    # If time per row grows between the sizes, assume the same growth for every factor of ten.
    span = math.log10(large.rows / small.rows) or 1.0
    decades = max(0.0, math.log10(TERABYTE_ROWS * share / large.rows))
    growth = max(1.0, large.microseconds / small.microseconds) ** (decades / span)
    rows = TERABYTE_ROWS / large.rows
    print(
        f"{large.mode}: Criteo Terabyte ({TERABYTE_ROWS:,} rows, {TERABYTE_BYTES / 1e12:g} TB of text) on "
        f"{TERABYTE_CORES} cores: {seconds / 3600:.1f} h, "
        f"and {seconds * growth / 3600:.1f} h if time per row keeps growing as here (x{growth:.2f})\n"
        f"  {ranks} ranks of {options.cores} cores, each as fast as here ({1e6 / large.microseconds:,.0f} rows/s); "
        f"{TERABYTE_DAYS} days of equal length, at most {round(TERABYTE_DAYS * share)} per rank; "
        "merging the counts is not included\n"
        f"  the input is plain text and comes at {TERABYTE_BYTES / seconds / 1e6:,.0f} MB/s, the output leaves at "
        f"{large.written * rows / seconds / 1e6:,.0f} MB/s; here both were in the page cache\n"
        f"  memory {ranks} x {size(large.peak)} = {size(ranks * large.peak)}, if it grows no more than here (x"
        f"{large.peak / small.peak:.2f} from {small.rows:,} to {large.rows:,} rows)\n"
        f"  disk in proportion to the rows: {large.written * rows / 1e12:.2f} TB written, "
        f"{large.disk * rows / 1e12:.2f} TB at the peak"
    )
    return {"hours": seconds / 3600, "hours_if_growing": seconds * growth / 3600, "ranks": ranks}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Rows per second of ``prepare``, end to end to files on disk, beside its peers on the same rows and cores.

    python -m benchmarks.data.prepare_speed
    python -m benchmarks.data.prepare_speed --raw train.txt --cores 4

Hashing stands against TorchRec's ``BinaryCriteoUtils.tsv_to_npys``, the vocabulary against FuxiCTR's build. The raw
rows are cut 8:1:1 into files for training, validation and test beforehand, and every program gets these.

The peers are favoured where it can't be equal: our time is that of the whole command, start of Python included, theirs
is that of their calls alone, without imports, without the start of Ray, and without making the CSV that FuxiCTR wants.
TorchRec's ``tsv_to_npys`` uses one core, so it also runs once per core on equal parts of the file; what it writes then
is not one data set, since each part's numbers are shifted by a minimum of its own. It leaves the hashes as they are, 64
bits wide; we map them to ids. The numbers get TorchRec's logarithm in both. FuxiCTR turns the numbers into categories
too, so ours is shown with that as well. It encodes on half of the cores, and is run once more with a worker per core.

Runs take turns; medians are printed. That FuxiCTR kept as many values per column as we did is checked.
"""

import json
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import tyro

from benchmarks._lib.commands import module_command
from benchmarks._lib.formatting import size, spread
from benchmarks._lib.peer_environments import peer_python
from benchmarks._lib.resource_usage import ResourceUsage, disk_bytes, measure, pick_cores
from benchmarks.data import big_log

NAMES = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
# The splits' names: ours and FuxiCTR's.
SPLITS = {"train": "train", "validation": "valid", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    raw: Path | None = None
    """Plain text in Criteo's format; by default big_log.py makes it."""
    rows: int = 1_000_000
    """Rows of the log that is made."""
    repeats: int = 3
    """Runs of each program."""
    cores: int = 2
    """Cores that each program may use."""
    min_count: int = 10
    """Vocabulary: values seen less often share one id."""
    num_embeddings: int = 40_000_000
    """Hashing: ids per column."""
    peers: tuple[str, ...] = ("torchrec", "fuxictr")
    """Peers to run."""
    prepare_options: str = ""
    """Further words for our command line, such as "--memory 1GiB"."""
    folder: Path | None = None
    """Folder to work in; by default a temporary one. Everything is removed at the end."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class Program:
    """One thing that is measured: how to run it, and what its runs took.

    ``run`` gets an empty folder to write to and returns seconds, measurement, and facts about the output.
    """

    name: str
    against: str | None
    target: float | None
    run: Callable[[Path], tuple[float, ResourceUsage, dict[str, object]]]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    pss: int = 0
    written: int = 0
    facts: dict[str, object] = field(default_factory=dict)
    refused: str | None = None


class Failed(Exception):  # noqa: N818 (a program's failure, told in the table)
    """The program did not do its work."""


def main(options: Options) -> None:
    pick_cores(options.cores)
    with _folder(options.folder) as folder:
        raw = options.raw
        if raw is None:
            raw = folder / "raw.tsv"
            big_log.write_log(raw, options.rows, processes=options.cores)
        files, rows = cut(raw, folder)
        programs = list(our_programs(options, files))
        if "torchrec" in options.peers:
            programs += torchrec_programs(options, files, raw, folder, rows)
        if "fuxictr" in options.peers:
            programs += fuxictr_programs(options, files, folder)
        for repeat in range(options.repeats):
            for program in programs:
                once(program, folder / "output", rows)
                state = program.refused or f"{program.seconds[-1]:.1f} s"
                print(f"{repeat + 1}/{options.repeats} {program.name}: {state}", file=sys.stderr, flush=True)
        report(options, programs, raw, rows)


def once(program: Program, output: Path, rows: int) -> None:
    """Run a program once into an empty folder and keep what it took."""
    if program.refused:
        return
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    try:
        seconds, measured, facts = program.run(output)
        if facts["rows"] != rows:
            raise Failed(f"{facts['rows']} rows were written, not {rows}")
    except Failed as failure:
        program.refused = str(failure)
        return
    program.seconds.append(seconds)
    program.peak, program.pss = max(program.peak, measured.peak), max(program.pss, measured.pss)
    program.written = disk_bytes(output)
    program.facts = facts
    shutil.rmtree(output)


def cut(raw: Path, folder: Path) -> tuple[dict[str, Path], int]:
    """Cut the raw rows 8:1:1, in their order; return the files and the number of rows."""
    with raw.open("rb") as source:
        rows = sum(part.count(b"\n") for part in iter(lambda: source.read(1 << 24), b""))
        source.seek(0)
        ends = {"train": rows * 8 // 10, "validation": rows * 9 // 10, "test": rows}
        files, row = {}, 0
        for split, end in ends.items():
            files[split] = folder / f"{split}.tsv"
            with files[split].open("wb") as target:
                while row < end:
                    target.write(source.readline())
                    row += 1
    return files, rows


def our_programs(options: Options, files: dict[str, Path]) -> Iterator[Program]:
    vocabulary = ("--min-count", options.min_count)
    kinds = {
        "prepare --hash": ("--hash", "--num-embeddings", options.num_embeddings, "--numeric", "log"),
        "prepare": vocabulary,
        "prepare, numbers as categories": (*vocabulary, "--numeric", "bucketize"),
    }
    wanted = {"prepare --hash": ("torchrec", 10.0)}
    for name, words in kinds.items():

        def run(output: Path, words: tuple[object, ...] = words) -> tuple[float, ResourceUsage, dict[str, object]]:
            made = output / "prepared"
            inputs = ("--input", files["train"], "--validation", files["validation"], "--test", files["test"])
            command = module_command("torchrec_deepfm", "prepare", *inputs, "--output", made, *words)
            measured = measure((*command, *shlex.split(options.prepare_options)), cores=pick_cores(options.cores))
            if measured.code:
                raise Failed(measured.last_error)
            manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
            written = sum(day["rows"] for days in manifest["splits"].values() for day in days)
            return measured.seconds, measured, {"rows": written, "sizes": manifest["num_embeddings"]}

        against, target = wanted.get(name, ("fuxictr", 12.0))
        yield Program(name=name, against=against, target=target, run=run)


def torchrec_programs(
    options: Options, files: dict[str, Path], raw: Path, folder: Path, rows: int
) -> Iterator[Program]:
    parts = [folder / f"part_{i}.tsv" for i in range(options.cores)]
    with raw.open("rb") as source:
        for i, part in enumerate(parts):
            count = rows * (i + 1) // options.cores - rows * i // options.cores
            with part.open("wb") as target:
                target.writelines(source.readline() for _ in range(count))
    jobs = {"torchrec, one process": [list(files.values())]}
    if options.cores > 1:
        jobs[f"torchrec, {options.cores} processes"] = [[part] for part in parts]
    for name, lists in jobs.items():

        def run(output: Path, lists: list[list[Path]] = lists) -> tuple[float, ResourceUsage, dict[str, object]]:
            def one(i: int) -> ResourceUsage:
                place = output / str(i)
                place.mkdir()
                command = module_command("benchmarks.data.peer_torchrec_npys", place, *lists[i])
                return measure(command, cores=pick_cores(options.cores))

            with ThreadPoolExecutor(len(lists)) as pool:
                done = list(pool.map(one, range(len(lists))))
            found = [told(measured) for measured in done]
            seconds = max(one["ended"] for one in found) - min(one["began"] for one in found)
            whole = ResourceUsage(
                rss=sum(measured.peak for measured in done), pss=sum(measured.pss for measured in done)
            )
            facts = {"rows": sum(one["rows"] for one in found), "version": found[0]["version"]}
            return seconds, whole, facts

        yield Program(name=name, against=None, target=None, run=run)


def fuxictr_programs(options: Options, files: dict[str, Path], folder: Path) -> Iterator[Program]:
    python = peer_python("fuxictr")
    csv = folder / "csv"
    csv.mkdir()
    for ours, theirs in SPLITS.items():
        with files[ours].open("rb") as source, (csv / f"{theirs}.csv").open("wb") as target:
            target.write(",".join(NAMES).encode() + b"\n")
            for block in iter(lambda: source.read(1 << 24), b""):
                target.write(block.replace(b"\t", b","))

    half = max(1, options.cores // 2)
    kinds = {"fuxictr": half} | ({"fuxictr, a worker per core": options.cores} if options.cores > half else {})
    for name, workers in kinds.items():

        def run(output: Path, workers: int = workers) -> tuple[float, ResourceUsage, dict[str, object]]:
            words = (csv, output, options.min_count, options.cores, workers)
            command = module_command("benchmarks.data.peer_fuxictr_build", *words, python=python)
            measured = measure(command, cores=pick_cores(options.cores), environment={"RAY_USAGE_STATS_ENABLED": "0"})
            found = told(measured)
            return found["ended"] - found["began"], measured, found

        yield Program(name=name, against=None, target=None, run=run)


def told(measured: ResourceUsage) -> dict[str, object]:
    """What a peer's script printed last."""
    if measured.code:
        raise Failed(measured.last_error)
    return dict(json.loads(measured.output.splitlines()[-1]))


def report(options: Options, programs: list[Program], raw: Path, rows: int) -> None:
    versions = {name: metadata.version(name) for name in ("torchrec", "duckdb", "polars", "pyarrow", "numpy")}
    by_name = {program.name: program for program in programs}
    peer = by_name.get("fuxictr")
    if peer and peer.facts:
        versions["fuxictr"] = str(peer.facts["version"])
        same_values(by_name["prepare"], peer)
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    print(
        f"{rows:,} rows, {raw.stat().st_size / 1e9:.2f} GB of text, cut 8:1:1; {options.cores} cores; "
        f"{options.repeats} runs of each, taking turns; min_count {options.min_count}"
    )
    print("| program | rows/s, median (range) | seconds | peak RSS | peak PSS | written |\n| --- |" + " --- |" * 5)
    for program in programs:
        if program.refused:
            print(f"| {program.name} | failed: {program.refused} | | | | |")
            continue
        rates = [rows / seconds for seconds in program.seconds]
        sizes = " | ".join(size(value) for value in (program.peak, program.pss, program.written))
        print(f"| {program.name} | {spread(rates)} | {statistics.median(program.seconds):.2f} | {sizes} |")
    ratios = []
    for ours in programs:
        for theirs in programs:
            if ours.against is None or not theirs.name.startswith(ours.against) or ours.refused or theirs.refused:
                continue
            ratio = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
            ratios.append({"ours": ours.name, "theirs": theirs.name, "ratio": ratio, "target": ours.target})
            print(f"{ours.name} : {theirs.name} = {ratio:.1f} (target {ours.target:g})")
    if options.output is not None:
        keys = ("seconds", "peak", "pss", "written", "refused")
        runs = {program.name: {key: getattr(program, key) for key in keys} for program in programs}
        found = {"rows": rows, "cores": options.cores, "versions": versions, "runs": runs, "ratios": ratios}
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def same_values(ours: Program, theirs: Program) -> None:
    """FuxiCTR counts one id more (padding), and none for a missing value where we may have one."""
    if ours.refused:
        return
    for column in NAMES[14:]:
        mine, other = (program.facts["sizes"][column] for program in (ours, theirs))  # type: ignore[index]
        assert other - mine in (0, 1), (column, mine, other)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given, prefix="benchmark-prepare-") as name:
        yield Path(name)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

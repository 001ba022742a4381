"""Rows per second of ``prepare``, from text to files on disk, beside its peers on the same rows and cores.

    python -m benchmarks.data.peers.prepare_speed
    python -m benchmarks.data.peers.prepare_speed --raw train.txt --cores 4

Hashing is compared with TorchRec's ``BinaryCriteoUtils.tsv_to_npys``, the vocabulary with FuxiCTR's build. The raw rows
are split 8:1:1 into files for training, validation and test before, and every program gets these.

Where conditions cannot be equal, the peers are favoured: ``prepare`` is timed as a whole command, start of Python
included, peers without imports, without the start of Ray, and without making the CSV that FuxiCTR reads. TorchRec's
``tsv_to_npys`` uses one core, so it also runs once per core on equal parts of the file; its output then is not one data
set, because each part's numbers are shifted by their own minimum. It keeps the hashes, 64 bits wide; ``prepare`` maps
them to ids. Both take the logarithm of the numbers. FuxiCTR also turns the numbers into categories, so ``prepare`` runs
with that as well. FuxiCTR encodes on half of the cores, and runs once more with a worker per core.

Runs alternate; medians are printed. The number of values that FuxiCTR kept per column is checked.
"""

import json
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from benchmarks._lib.commands import module_command
from benchmarks._lib.formatting import markdown, markdown_row, size, spread, versions, versions_line
from benchmarks._lib.peer_environments import peer_python
from benchmarks._lib.resource_usage import ResourceUsage, disk_bytes, measure, pick_cores
from benchmarks.data import big_log

NAMES = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
# Names of the splits: this project's and FuxiCTR's.
SPLITS = {"train": "train", "validation": "valid", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    raw: Path | None = None
    """Plain text in Criteo's format. Default: big_log.py makes it."""
    rows: int = 1_000_000
    """Rows of the generated log."""
    repeats: int = 3
    """Runs of each program."""
    cores: int = 2
    """Cores that each program may use."""
    min_count: int = 10
    """Vocabulary: values that occur less often share one id."""
    num_embeddings: int = 40_000_000
    """Hashing: ids per column."""
    peers: tuple[str, ...] = ("torchrec", "fuxictr")
    """Peers to run."""
    prepare_options: str = ""
    """More options of prepare, such as "--memory 1GiB"."""
    folder: Path | None = None
    """Folder to work in; the files made there are removed. Default: the system's temporary folder."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(kw_only=True)
class Program:
    """A measured program and the usage of its runs.

    ``run`` gets an empty folder to write to and returns seconds, resource usage, and facts about the output.
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


class ProgramError(Exception):
    """A program failed; the table has the reason."""


def main(options: Options) -> None:
    pick_cores(options.cores)
    with _folder(options.folder) as folder:
        raw = options.raw
        if raw is None:
            raw = folder / "raw.tsv"
            big_log.write_log(raw, options.rows, processes=options.cores)
        files, rows = cut(raw, folder)
        programs = list(prepare_programs(options, files))
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
    """Run a program once into an empty folder and record its usage."""
    if program.refused:
        return
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    try:
        seconds, measured, facts = program.run(output)
        if facts["rows"] != rows:
            raise ProgramError(f"{facts['rows']} rows were written, not {rows}")
    except ProgramError as failure:
        program.refused = str(failure)
        return
    program.seconds.append(seconds)
    program.peak, program.pss = max(program.peak, measured.peak), max(program.pss, measured.pss)
    program.written = disk_bytes(output)
    program.facts = facts
    shutil.rmtree(output)


def cut(raw: Path, folder: Path) -> tuple[dict[str, Path], int]:
    """Split the raw rows 8:1:1, in their order; return the files and the number of rows."""
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


def prepare_programs(options: Options, files: dict[str, Path]) -> Iterator[Program]:
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
                raise ProgramError(measured.last_error)
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
                command = module_command("benchmarks.data.peers.peer_torchrec_npys", place, *lists[i])
                return measure(command, cores=pick_cores(options.cores))

            with ThreadPoolExecutor(len(lists)) as pool:
                done = list(pool.map(one, range(len(lists))))
            found = [printed_facts(measured) for measured in done]
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
    for split, name in SPLITS.items():
        with files[split].open("rb") as source, (csv / f"{name}.csv").open("wb") as target:
            target.write(",".join(NAMES).encode() + b"\n")
            for block in iter(lambda: source.read(1 << 24), b""):
                target.write(block.replace(b"\t", b","))

    half = max(1, options.cores // 2)
    kinds = {"fuxictr": half} | ({"fuxictr, a worker per core": options.cores} if options.cores > half else {})
    for name, workers in kinds.items():

        def run(output: Path, workers: int = workers) -> tuple[float, ResourceUsage, dict[str, object]]:
            words = (csv, output, options.min_count, options.cores, workers)
            command = module_command("benchmarks.data.peers.peer_fuxictr_build", *words, python=python)
            measured = measure(command, cores=pick_cores(options.cores), environment={"RAY_USAGE_STATS_ENABLED": "0"})
            found = printed_facts(measured)
            return found["ended"] - found["began"], measured, found

        yield Program(name=name, against=None, target=None, run=run)


def printed_facts(measured: ResourceUsage) -> dict[str, object]:
    """Return the JSON object that a peer's script printed last."""
    if measured.code:
        raise ProgramError(measured.last_error)
    return dict(json.loads(measured.output.splitlines()[-1]))


def report(options: Options, programs: list[Program], raw: Path, rows: int) -> None:
    """Print the table and the ratios, and write all figures as JSON."""
    installed = versions("torchrec", "duckdb", "polars", "pyarrow", "numpy")
    by_name = {program.name: program for program in programs}
    fuxictr = by_name.get("fuxictr")
    if fuxictr and fuxictr.facts:
        installed["fuxictr"] = str(fuxictr.facts["version"])
        check_same_values(by_name["prepare"], fuxictr)
    print(versions_line(installed))
    print(
        f"{rows:,} rows, {raw.stat().st_size / 1e9:.2f} GB of text, split 8:1:1; {options.cores} cores; "
        f"{options.repeats} runs of each, alternating; min_count {options.min_count}"
    )
    print(markdown(("program", "rows/s, median (range)", "seconds", "peak RSS", "peak PSS", "written")))
    for program in programs:
        if program.refused:
            print(markdown_row((program.name, f"failed: {program.refused}", "", "", "", "")))
            continue
        rates = [rows / seconds for seconds in program.seconds]
        sizes = map(size, (program.peak, program.pss, program.written))
        print(markdown_row((program.name, spread(rates), f"{statistics.median(program.seconds):.2f}", *sizes)))
    ratios = []
    for ran in programs:
        for peer in programs:
            if ran.against is None or not peer.name.startswith(ran.against) or ran.refused or peer.refused:
                continue
            ratio = statistics.median(peer.seconds) / statistics.median(ran.seconds)
            ratios.append({"program": ran.name, "peer": peer.name, "ratio": ratio, "target": ran.target})
            print(f"{ran.name} : {peer.name} = {ratio:.1f} (target {ran.target:g})")
    if options.output is not None:
        keys = ("seconds", "peak", "pss", "written", "refused")
        runs = {program.name: {key: getattr(program, key) for key in keys} for program in programs}
        found = {"rows": rows, "cores": options.cores, "versions": installed, "runs": runs, "ratios": ratios}
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def check_same_values(prepared: Program, fuxictr: Program) -> None:
    """Compare the numbers of ids: FuxiCTR has one more (padding), and none for a missing value."""
    if prepared.refused:
        return
    for column in NAMES[14:]:
        ids, theirs = (program.facts["sizes"][column] for program in (prepared, fuxictr))  # type: ignore[index]
        assert theirs - ids in (0, 1), (column, ids, theirs)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Yield an empty folder, which is removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given, prefix="benchmark-prepare-") as name:
        yield Path(name)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

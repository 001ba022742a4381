"""The path of docs/criteo-terabyte.md on synthetic days: text, prepare, train with interruptions, evaluate, predict.

    python -m benchmarks.data.dress_rehearsal --folder rehearsal --rows 1000000

``big_log`` writes the days with planted clicks, as many values per column as Criteo Terabyte has. Two ranks prepare
them inside a control group that the kernel limits (cgroup 1 or 2, as root; without one they are stopped beyond the
limit). Two ranks train an epoch: one of them is killed (SIGKILL) and torchelastic starts both again; the job is
stopped (SIGTERM), continues on one rank, is stopped again, and ends on two ranks. Then both halves of the last day are
evaluated, and all of it is predicted. The last lines compare the predictions with the evaluations and with the best
possible AUC.

The folder takes 0.4 GB per million rows of all days, and a few GB for checkpoints.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import tyro
from sklearn.metrics import roc_auc_score

from benchmarks._lib.commands import module_command, working_folder
from benchmarks._lib.formatting import GIB, markdown, markdown_row, size, versions, versions_line
from benchmarks._lib.resource_usage import ResourceUsage, disk_bytes, measure, pick_cores
from benchmarks.data import big_log
from torchrec_deepfm.data.criteo_defaults import MLPERF_NUM_EMBEDDINGS

RANKS = 2
# What the interruptions wait for: shares of the epoch that a checkpoint holds.
KILL, LEAVE, RETURN = 0.25, 0.4, 0.65


@dataclass(frozen=True, kw_only=True)
class Options:
    """The size."""

    rows: int = 2_000_000
    """Rows per day."""
    days: int = 24
    """Days; the last one is split into validation and test."""
    largest_table: int = 1_000_000
    """Limit for the rows of a table, which MLPerf sets at 40 million."""
    memory: float = 2.0
    """GiB that both ranks of prepare may use together."""
    factor_dim: int = 15
    """Width of the latent vectors."""
    layers: tuple[int, ...] = (256, 128)
    """Layers of the MLP."""
    batch_size: int = 8192
    """Samples per step over all ranks."""
    folder: Path | None = None
    """Folder for everything. Default: a temporary one, removed at the end."""
    output: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command that has run."""

    name: str
    rows: int
    usage: ResourceUsage

    def cells(self) -> list[object]:
        """A row of the table."""
        used = self.usage
        pace = f"{self.rows / used.seconds:,.0f}" if self.rows else ""
        return [self.name, f"{used.seconds:.0f}", pace, size(used.anonymous), size(used.rss), used.code]


def main(options: Options) -> None:
    with working_folder(options.folder, "rehearsal-") as folder:
        parts, figures = rehearse(folder.absolute(), options)
    print(versions_line(versions("torch", "torchrec", "duckdb", "polars", "numpy")))
    print(f"{options.days} days of {options.rows:,} rows, tables of at most {options.largest_table:,} rows")
    print(markdown(["part", "s", "rows/s", "anonymous", "RSS", "exit code"]))
    for part in parts:
        print(markdown_row(part.cells()))
    print(json.dumps(figures, indent=2))
    if options.output is not None:
        content = {"options": asdict(options), "parts": [asdict(part) for part in parts], "figures": figures}
        options.output.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def rehearse(folder: Path, options: Options) -> tuple[list[Part], dict[str, Any]]:
    """Run everything; return the commands with what they used, and figures."""
    parts: list[Part] = []
    figures: dict[str, Any] = {}
    raw, data, run = folder / "raw", folder / "prepared", folder / "run"
    last = raw / f"day_{options.days - 1}.zst"
    total = options.rows * options.days

    def step(name: str, rows: int, command: list[str], codes: tuple[int, ...] = (0,), **more: Any) -> ResourceUsage:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        used = measure(command, cores=pick_cores(2), environment=one_thread(), **more)
        if used.code not in codes:
            raise SystemExit(f"{name}: exit code {used.code}\n{used.output[-2000:]}{used.errors[-2000:]}")
        parts.append(Part(name=name, rows=rows, usage=used))
        return used

    started = time.perf_counter()
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
        text = sum(pool.map(write_day, [(raw, day, options.rows) for day in range(options.days)]))
    figures["text"] = {
        "seconds": time.perf_counter() - started, "bytes": text, "compressed": disk_bytes(raw),
    }  # fmt: skip

    limit = int(options.memory * GIB)
    sizes = [min(rows, options.largest_table) for rows in MLPERF_NUM_EMBEDDINGS]
    words = ("--schema", "criteo-terabyte", "--hash", "--num-embeddings", *sizes, "--input", raw, "--output", data)
    share = f"{limit // RANKS >> 20}MiB"
    with control_group(limit) as (front, kernel):
        used = step(
            "prepare, 2 ranks", total, [*front, *launched(RANKS, "prepare", *words, "--memory", share)],
            watch=folder, ceiling=limit,
        )  # fmt: skip
        figures["prepare"] = {"limit": limit, "anonymous": used.anonymous, "disk_peak": used.disk, **kernel()}
    for path in raw.iterdir():
        if path != last:
            path.unlink()

    steps = (total - options.rows) // options.batch_size
    figures["training"] = {"steps": steps}
    every = max(steps // 20, 1)
    fixed = (
        "--recipe", "criteo-terabyte", "--data", data, "--output", run, "--factor-dim", options.factor_dim,
        "--over-arch-layer-sizes", *options.layers, "--sparse-optimizer", "rowwise_adagrad", "--sparse-lr", "0.02",
        "--checkpoint-every", every, "--eval-every", max(steps // 4, 1), "--keep-last", 1,
    )  # fmt: skip
    for name, ranks, plan in (
        ("train, 2 ranks, one killed", RANKS, [(KILL, kill_a_rank), (LEAVE, stop)]),
        ("train, 1 rank", 1, [(RETURN, stop)]),
        ("train, 2 ranks, to the end", RANKS, []),
    ):
        before = saved_step(run)
        command = launched(ranks, "train", *fixed, "--batch-size", options.batch_size // ranks, restarts=3)
        with interruptions(run, steps, plan):
            used = step(name, 0, command, (143,) if plan else (0,))
        done = (saved_step(run) if plan else steps) - before
        parts[-1] = Part(name=name, rows=done * options.batch_size, usage=used)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    figures["training"] |= {key: summary[key] for key in ("steps", "samples_per_second", "validation", "test")}

    half = options.rows // 2
    for split in ("validation", "test"):
        file = folder / f"{split}.json"
        words = ("--run", run, "--data", data, "--split", split, "--output", file)
        step(f"evaluate {split}, 2 ranks", half, launched(RANKS, "evaluate", *words))
    predicted = folder / "predictions.parquet"
    words = ("--run", run, "--input", last, "--output", predicted, "--keep", "label")
    step("predict the last day, 2 ranks", options.rows, launched(RANKS, "predict", *words))

    table = pl.read_parquet(predicted)
    assert len(table) == options.rows, len(table)
    first = table[: options.rows - half]
    figures["last_day"] = {
        "auc": roc_auc_score(table["label"], table["probability"]),
        "best_auc": best_auc(last),
        "validation_auc": roc_auc_score(first["label"], first["probability"]),
    }
    return parts, figures


def write_day(day: tuple[Path, int, int]) -> int:
    """Write the text of a day; return its bytes before compression."""
    folder, number, rows = day
    return big_log.write_log(folder / f"day_{number}.zst", rows, seed=number, clicks="planted")


def one_thread() -> dict[str, str]:
    """Variables for ranks of a thread each."""
    names = ("POLARS_MAX_THREADS", *(f"{name}_NUM_THREADS" for name in ("ARROW", "MKL", "OMP", "OPENBLAS")))
    return dict.fromkeys(names, "1")


def launched(ranks: int, command: str, *words: object, restarts: int = 0) -> list[str]:
    """A command on some ranks, as TorchX's components start it."""
    front = ("--standalone", "--nproc_per_node", ranks, "--max_restarts", restarts, "--shutdown_timeout", 120)
    return module_command("torchrec_deepfm.launch", *front, "-m", "torchrec_deepfm", command, *words)


@contextmanager
def control_group(limit: int) -> Iterator[tuple[list[str], Callable[[], dict[str, int]]]]:
    """A group of processes whose memory, page cache included, the kernel limits.

    Yields words to put before a command, and a function that reads the kernel's figures; neither does anything where
    groups can't be made.
    """
    made = _make_group(limit)
    if made is not None:
        group, counters = made
        join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        try:
            yield ["sh", "-c", join, "sh"], lambda: {name: int((group / name).read_text()) for name in counters}
        finally:
            group.rmdir()
        return
    print("no control group can be made: the limit is checked 20 times per second", file=sys.stderr)
    yield [], dict


def _make_group(limit: int) -> tuple[Path, list[str]] | None:
    """Make a group by version 1 or 2; return it and the files with its figures."""
    for root, limits, counters in (
        ("/sys/fs/cgroup/memory", {"memory.limit_in_bytes": limit}, ("memory.max_usage_in_bytes", "memory.failcnt")),
        ("/sys/fs/cgroup", {"memory.max": limit, "memory.swap.max": 0}, ("memory.peak",)),
    ):
        with suppress(OSError):
            group = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=root))
            try:
                for name, value in limits.items():
                    (group / name).write_text(str(value))
            except OSError:
                group.rmdir()
                raise
            return group, [name for name in counters if (group / name).exists()]
    return None


@contextmanager
def interruptions(run: Path, steps: int, plan: list[tuple[float, Callable[[Path], None]]]) -> Iterator[None]:
    """Do each of some things as soon as a checkpoint holds its share of the steps."""
    ended = threading.Event()

    def work() -> None:
        for share, act in plan:
            while saved_step(run) < share * steps:
                if ended.wait(0.2):
                    return
            act(run)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def kill_a_rank(run: Path) -> None:
    """SIGKILL the last rank of a training."""
    *_, rank = processes_of(run, launchers=False)
    os.kill(rank, signal.SIGKILL)
    print(
        f"{time.strftime('%H:%M:%S')}   killed a rank at step {saved_step(run)} or later", file=sys.stderr, flush=True
    )


def stop(run: Path) -> None:
    """SIGTERM the launcher of a training."""
    (launcher,) = processes_of(run, launchers=True)
    os.kill(launcher, signal.SIGTERM)


def processes_of(run: Path, *, launchers: bool) -> list[int]:
    """The processes whose command line names a run folder, without children that have not started a program."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_text().split("\0")
            if str(run) in words and ("torchrec_deepfm.launch" in words) == launchers:
                found.append(int(path.parent.name))
    return sorted(found)


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads((run / "saved.json").read_text(encoding="utf-8"))["step"] or 0)
    return 0


def best_auc(day: Path) -> float:
    """The AUC of the probabilities that a day's clicks were drawn with."""
    first = 1 + len(big_log.LARGEST)
    columns = [first + column for column in big_log.PLANTED]
    with pa.input_stream(str(day)) as stream:
        table = pl.read_csv(stream.read(), separator="\t", has_header=False, columns=[0, *columns], infer_schema=False)
    label, *values = table.iter_columns()
    fields = [
        np.array(value.fill_null("").to_list(), "S8").view(np.uint8).reshape(-1, 8) for value in values
    ]  # zeros where missing, as the probabilities were made
    return float(roc_auc_score(label.cast(pl.Int8), big_log.click_probability(fields)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The benchmarks of `prepare` and of the loader, at tiny sizes and with peers that are installed.

Expected results are computed in plain Python.
"""

import gzip
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks._lib import resource_usage
from benchmarks.data import (
    big_log,
    dress_rehearsal,
    engines,
    loader_speed,
    prepare_scale,
    shuffle_mixing,
)
from benchmarks.data.peers import prepare_speed
from tests.benchmarks.scripts import forked, run

LINE = re.compile(rb"[01](\t(-?[0-9]+)?){13}(\t([0-9a-f]{8})?){26}\n")
MIB = 1 << 20


# big_log


def test_big_log_depends_on_rows_and_seed_only(tmp_path: Path) -> None:
    rows = big_log.BLOCK_ROWS + 1000  # two blocks
    paths = [tmp_path / name for name in ("one.tsv", "two.tsv", "packed.gz", "packed.zst", "other.tsv")]
    for path, processes in zip(paths, (1, 2, 1, 1, 1), strict=True):
        run(
            big_log,
            "--output",
            path,
            "--rows",
            rows,
            "--processes",
            processes,
            "--seed",
            int(path.stem == "other"),
        )
    one, two, packed_gz, packed_zst, other = paths
    text = one.read_bytes()
    assert text.count(b"\n") == rows
    assert len(set(text.splitlines())) > 0.99 * rows
    assert two.read_bytes() == text
    assert gzip.decompress(packed_gz.read_bytes()) == text
    assert pa.input_stream(str(packed_zst)).read() == text
    assert other.read_bytes() != text
    assert not list(tmp_path.glob("*.partial"))


def test_planted_clicks_change_nothing_but_the_labels(tmp_path: Path) -> None:
    rows = 20_000
    plain, planted = (big_log.block_text(3, 0, rows, clicks).splitlines() for clicks in ("random", "planted"))
    assert [line[1:] for line in plain] == [line[1:] for line in planted]
    # A click is as probable as the values of the columns say, read back from the text: each of ten groups agrees.
    values = [line.split(b"\t")[1 + len(big_log.LARGEST) :] for line in planted]
    fields = [
        np.array([row[column] for row in values], "S8").view(np.uint8).reshape(-1, 8) for column in big_log.PLANTED
    ]
    probability = big_log.click_probability(fields)
    clicks = np.array([line[:1] == b"1" for line in planted])
    for group in np.array_split(np.argsort(probability), 10):
        expected, deviation = probability[group].mean(), np.sqrt((probability[group].mean()) / len(group))
        assert abs(clicks[group].mean() - expected) < 4 * deviation
    assert dress_rehearsal.write_day((tmp_path, 3, rows)) > 0
    assert dress_rehearsal.best_auc(tmp_path / "day_3.zst") == pytest.approx(
        roc_auc_score(clicks, probability), abs=1e-9
    )


def test_the_rehearsal_finds_and_limits_its_processes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    waits = [sys.executable, "-c", "print(flush=True); input()", run]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        rank.stdout.readline()  # it has its command line now
        assert dress_rehearsal.processes_of(run, launchers=False) == [rank.pid]
        assert dress_rehearsal.processes_of(run, launchers=True) == []
        dress_rehearsal.kill_a_rank(run)
        assert rank.wait() == -signal.SIGKILL
    with dress_rehearsal.control_group(64 << 20) as (front, figures):
        if not front:
            pytest.skip("no control group can be made here")
        greedy = [sys.executable, "-c", "bytearray(200 << 20)"]
        assert subprocess.run([*front, *greedy], check=False).returncode in (-signal.SIGKILL, 137)
        assert max(figures().values()) > 32 << 20


def test_big_log_is_criteo_with_the_stated_ranges() -> None:
    text = big_log.block_text(3, 0, 20_000)
    lines = text.splitlines(keepends=True)
    assert len(lines) == 20_000
    assert all(LINE.fullmatch(line) for line in lines)
    columns = list(zip(*(line.rstrip(b"\n").split(b"\t") for line in lines), strict=True))
    for j, column in enumerate(columns[1:14]):
        numbers = [int(value) for value in column if value]
        assert b"-0" not in column
        assert not any(value.lstrip(b"-").startswith(b"0") and len(value) > 1 for value in column)
        assert big_log.LOWEST[j] <= min(numbers) <= max(numbers) <= big_log.LARGEST[j]
        assert min(numbers) == big_log.LOWEST[j]
        assert max(numbers) > 0.5 * big_log.LARGEST[j]
    # A zero in the middle of a large number is as frequent as any other digit there.
    large = [value for value in columns[5] if len(value) >= 7]
    assert 0.05 < sum(value[-4:-3] == b"0" for value in large) / len(large) < 0.15
    for j, column in enumerate(columns[14:]):
        values = set(column) - {b""}
        assert len(values) <= big_log.RANGES[j]
        if big_log.RANGES[j] < 100:
            assert len(values) >= big_log.RANGES[j] - 1
    shares = [Counter(column)[b""] / len(lines) for column in columns[1:]]
    assert shares == pytest.approx([share / 256 for share in big_log.MISSING], abs=0.02)
    # Uniform draws from 40 million hardly meet; the heavy hitters of the others do.
    assert len(set(columns[14 + 19])) > 0.85 * len(lines)
    assert Counter(columns[14]).most_common(1)[0][1] > 0.01 * len(lines)
    assert big_log.block_text(3, 1, 1000) != big_log.block_text(3, 0, 1000)
    assert 0.22 < columns[0].count(b"1") / len(lines) < 0.28


# resource_usage


def test_memory_of_the_whole_tree_is_summed() -> None:
    """Two grandchildren that hold 150 MiB each, one of them after its parent has gone."""
    hold = "import time; kept = bytearray(150 << 20); kept[::4096] = bytes([1]) * len(kept[::4096]); time.sleep(1.5)"
    middle = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {hold!r}])"
    top = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {middle!r}])\n"
        f"subprocess.run([sys.executable, '-c', {hold!r}])"
    )
    found = resource_usage.measure([sys.executable, "-c", top], cores=resource_usage.pick_cores(1))
    assert found.code == 0, found.errors
    for total in (found.rss, found.anonymous, found.pss):
        assert 300 * MIB < total < 400 * MIB
    assert 150 * MIB < found.largest < 200 * MIB
    assert found.peak == found.rss


def test_a_spike_between_samples_is_seen() -> None:
    own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    amount = own + 300 * MIB
    found = resource_usage.measure(
        [sys.executable, "-c", f"import mmap; m = mmap.mmap(-1, {amount}); m.madvise(23); m.close()"],  # populate
        cores=resource_usage.pick_cores(1),
    )
    assert found.code == 0, found.errors
    assert found.largest > amount
    assert found.peak > amount


def test_the_ceiling_ends_a_run() -> None:
    grow = "import time\nkept = []\nwhile True: kept.append(b'1' * (10 << 20)); time.sleep(0.01)"
    found = resource_usage.measure([sys.executable, "-c", grow], cores=resource_usage.pick_cores(1), ceiling=200 * MIB)
    assert found.over
    assert found.code < 0
    assert 200 * MIB < found.anonymous < 500 * MIB


def test_disk_cores_threads_and_errors(tmp_path: Path) -> None:
    work = (
        "import os, pathlib, sys, time\n"
        "big = pathlib.Path(sys.argv[1], 'sub', 'big'); big.parent.mkdir(); big.write_bytes(bytes(5 << 20))\n"
        "time.sleep(1); big.unlink()\n"
        "print(len(os.sched_getaffinity(0)), os.environ['POLARS_MAX_THREADS'], os.environ['MORE'])\n"
        "sys.exit('first\\n\\nlast')"
    )
    found = resource_usage.measure(
        [sys.executable, "-c", work, tmp_path],
        cores=resource_usage.pick_cores(1),
        environment={"MORE": "yes"},
        watch=tmp_path,
    )
    assert found.output.split() == ["1", "1", "yes"]
    assert (found.code, found.last_error, found.over) == (1, "last", False)
    assert 5 * MIB <= found.disk < 6 * MIB
    assert found.seconds > 1 > found.cpu > 0
    with pytest.raises(SystemExit, match="--cores: 0 is out of range"):
        resource_usage.pick_cores(0)


# prepare_speed and prepare_scale


def test_prepare_beside_torchrec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    words = ("--rows", 3000, "--repeats", 1, "--cores", 1, "--peers", "torchrec", "--min-count", 2)
    run(prepare_speed, *words, "--folder", tmp_path / "work", "--output", output)
    found = json.loads(output.read_text())
    for name, one in found["runs"].items():
        assert one["refused"] is None, (name, one)
        assert one["seconds"][0] > 0
        assert one["peak"] > 0
    # 3000 rows of 13 float32 and 1 int32, and 26 int64 (TorchRec) or 26 int32 (prepare).
    assert found["runs"]["torchrec, one process"]["written"] >= 3000 * (14 * 4 + 26 * 8)
    assert found["runs"]["prepare --hash"]["written"] >= 3000 * (14 * 4 + 26 * 4)
    [ratio] = found["ratios"]
    seconds = {name: one["seconds"][0] for name, one in found["runs"].items()}
    assert ratio["ratio"] == pytest.approx(seconds["torchrec, one process"] / seconds["prepare --hash"])
    assert f"prepare --hash : torchrec, one process = {ratio['ratio']:.1f} (target 10)" in capsys.readouterr().out
    assert not list((tmp_path / "work").iterdir())


def test_prepare_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    words = ("--sizes", 1000, 4000, "--cores", 1, "--files", 2, "--min-count", 2)
    run(prepare_scale, *words, "--folder", tmp_path / "work", "--output", output)
    found = json.loads(output.read_text())
    runs = {(one["mode"], one["rows"]): one for one in found["runs"]}
    assert set(runs) == {(mode, rows) for mode in ("hash", "vocabulary") for rows in (1000, 4000)}
    for (_, rows), one in runs.items():
        assert one["text"] == sum(path.stat().st_size for path in (tmp_path / "work").glob(f"text_{rows}_*"))
        assert one["rss"] >= one["anonymous"] > 20 * MIB
        assert one["disk"] >= one["written"] >= rows * 40 * 4
    for mode in ("hash", "vocabulary"):
        small, large = (runs[mode, rows] for rows in (1000, 4000))
        pace = (large["seconds"][0] / 4000) / (small["seconds"][0] / 1000)
        assert found["modes"][mode]["time_ratio"] == pytest.approx(pace)
        # 24 days over 16 ranks of one core: two days on the busiest.
        hours = 4_373_472_329 * 2 / 24 * large["seconds"][0] / 4000 / 3600
        assert found["modes"][mode]["projection"]["hours"] == pytest.approx(hours)
    assert "Criteo Terabyte" in capsys.readouterr().out
    assert not (tmp_path / "work" / "run").exists()


# engines


@pytest.fixture(scope="module")
def engine_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("engines")
    sizes = ("--text-rows", 2000, "--group-rows", 20_000, "--group-range", 5000, "--lookups", 3000)
    sizes += ("--block-bytes", 50_000)  # ten blocks of text
    sizes += ("--vocabularies", 700, "--repeats", 1, "--threads", 1)
    run(engines, *sizes, "--folder", folder, "--output", folder / "found.json")
    found = json.loads((folder / "found.json").read_text())
    return folder, {(one["job"], one["name"]): one for one in found["runs"]}


def test_every_engine_parses_as_plain_python(engine_runs: Any) -> None:
    folder, runs = engine_runs
    rows = [line.split("\t") for line in (folder / "text_2000.tsv").read_text().splitlines()]
    numbers = [int(value) for row in rows for value in row[1:14] if value]
    categories = [int(value, 16) for row in rows for value in row[14:] if value]
    order = sum(int(row[14] or "0", 16) * (i % 251) for i, row in enumerate(rows))
    missing = sum(not value for row in rows for value in row)
    expected = [2000, sum(row[0] == "1" for row in rows), sum(numbers), sum(categories), missing, order]
    found = {name: one["check"] for (job, name), one in runs.items() if job == "parse"}
    assert found == dict.fromkeys(
        ("duckdb-columns", "duckdb-lines", "polars-blocks", "polars-scan", "pyarrow"), expected
    )


def test_every_engine_counts_as_plain_python(engine_runs: Any) -> None:
    folder, runs = engine_runs
    counts = Counter(pq.read_table(folder / "column_20000_5000.parquet")["value"].to_pylist())
    kept = sorted(((value, count) for value, count in counts.items() if count >= 3), key=lambda one: (-one[1], one[0]))
    assert 100 < len(kept) < len(counts)
    placed = sum(value * (i % 251) for i, (value, _) in enumerate(kept, start=1))
    expected = [len(kept), sum(count for _, count in kept), placed]
    found = {name: one["check"] for (job, name), one in runs.items() if job == "group"}
    assert found == dict.fromkeys(("duckdb", "polars", "polars-spilling", "pyarrow", "numpy"), expected)


def test_every_engine_joins_as_plain_python(engine_runs: Any) -> None:
    folder, runs = engine_runs
    vocabulary = pq.read_table(folder / "vocabulary_700.parquet")
    ids = dict(zip(vocabulary["value"].to_pylist(), vocabulary["id"].to_pylist(), strict=True))
    rows = [ids.get(value, 0) for value in pq.read_table(folder / "rows_3000_700.parquet")["value"].to_pylist()]
    assert 100 < rows.count(0) < 1000
    expected = [len(rows) - rows.count(0), sum(found * (i % 251) for i, found in enumerate(rows))]
    found = {name: one["check"] for (job, name), one in runs.items() if job == "join"}
    assert found == dict.fromkeys(("duckdb", "polars", "polars-streaming", "pyarrow", "numpy"), expected)


def test_engines_with_different_results_are_reported() -> None:
    cases = [
        engines.Case(job="join", name=name, about=about, settings={}, check=check)
        for name, about, check in (("a", "x", [1, 2]), ("b", "x", [1, 2]), ("a", "y", [3]), ("b", "y", None))
    ]
    assert engines.agree(cases)
    cases[1].check = [1, 3]
    assert not engines.agree(cases)


# shuffle_mixing and loader_speed: tiny sizes, and no rate is compared


def test_mixing_separates_good_orders_from_bad_ones(capsys: pytest.CaptureFixture[str]) -> None:
    run(shuffle_mixing, "--rows", 3_000_000, "--batch-sizes", 4096)
    rows = [line.rsplit(maxsplit=6) for line in capsys.readouterr().out.splitlines()]
    table = {words[0]: [float(word.replace(",", "")) for word in words[1:]] for words in rows[2:]}
    expected = table["global shuffle"]
    assert expected[0] == 4096
    assert 0.9 < expected[2] < 1.1
    assert abs(expected[3]) < 0.15
    # In file order a batch has one value of a slow column: the spread is the square root of its rows.
    files = next(value for name, value in table.items() if name.startswith("file order"))
    assert 60 < files[2] < 65
    assert files[3] > 0.99
    assert table["Loader"][2] < 1.2
    assert table["windows of blocks from anywhere"][2] > 2


def test_loader_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with forked(loader_speed):
        run(loader_speed, "--rows", 16_000, "--days", 2, "--batch-size", 512, "--repeats", 1)
    found = capsys.readouterr().out.splitlines()
    kinds = [
        "Loader, in order",
        "Loader, shuffled",
        "Loader, shuffled, no thread",
        "Loader, lists",
        "TorchRec, in order",
    ]
    assert "16,000 rows, batch 512" in found[0]
    assert [line.startswith(kind) for kind, line in zip(kinds, found[1:], strict=True)] == [True] * 5

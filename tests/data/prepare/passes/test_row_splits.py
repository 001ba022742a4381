"""Splits by time, by user and by a column, row by row against plain Python."""

import random
from collections import defaultdict
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from tests.support.data.stopped_prepare import StoppedError, content, stop_at_each_record, stopping
from tests.support.ranks import run_module
from torchrec_deepfm.data.prepare.options import SplitBy
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError

SCHEMA = Schema(label="y", numeric=("n",), categorical=("c",), layout="table")
SPLITS = ("train", "validation", "test")


def make(folder: Path, rows: int = 500, files: int = 3) -> pl.DataFrame:
    """Rows with a number of their own, in several files; many share a time."""
    draw = random.Random(1)
    seconds = [1_700_000_000 + 3600 * draw.randrange(300) for _ in range(rows)]
    frame = pl.DataFrame(
        {
            "y": [draw.randrange(2) for _ in range(rows)],
            "n": range(rows),
            "c": [draw.randrange(5) for _ in range(rows)],
            "t": seconds,
            "when": [datetime(1970, 1, 1) + timedelta(seconds=one) for one in seconds],
            "user": [draw.choice(["a", "b", "c", *map(str, range(60)), None]) for _ in range(rows)],
            "fold": [draw.choice(["train", "Train", "valid", "TEST"]) for _ in range(rows)],
        }
    )
    size = -(-rows // files)
    for i in range(files):
        frame[i * size : (i + 1) * size].write_parquet(folder / f"part-{i}.parquet", row_group_size=50)
    return frame


def run(folder: Path, name: str = "out", schema: Schema = SCHEMA, **options):
    by = {key: options.pop(key) for key in ("time", "gap", "user", "leave", "split_column") if key in options}
    paths = [folder / f"part-{i}.parquet" for i in range(3)]
    said: list[str] = []
    data = prepare(paths, folder / name, schema=schema, split_by=SplitBy(**by), report=said.append, **options)
    return data, said


def found(data) -> dict[str, set[int]]:
    return {
        split: {int(n) for day in data.days(split) for n in data.arrays(day).dense[day.start : day.start + day.rows, 0]}
        for split in SPLITS
    }


def by_time(times: list, gap) -> dict[str, set[int]]:
    ordered = sorted(times)
    first, second = ordered[len(times) * 8 // 10], ordered[len(times) * 9 // 10]
    return {
        "train": {i for i, time in enumerate(times) if time < first},
        "validation": {i for i, time in enumerate(times) if first + gap <= time < second},
        "test": {i for i, time in enumerate(times) if time >= second + gap},
    }


def test_by_time(tmp_path):
    frame = make(tmp_path)
    data, said = run(tmp_path, split="time", time="t")
    assert found(data) == by_time(frame["t"].to_list(), 0)
    edges = [sorted(frame["t"])[500 * share // 10] for share in (8, 9)]
    assert f"split by t: train before {edges[0]}, validation from {edges[0]}, test from {edges[1]}" in said
    data, _ = run(tmp_path, "number", split="time", time="t", gap="7200")
    assert found(data) == by_time(frame["t"].to_list(), 7200)
    data, said = run(tmp_path, "days", split="time", time="when", gap="0.5d")
    wanted = by_time(frame["when"].to_list(), timedelta(days=0.5))
    assert found(data) == wanted
    assert sum(map(len, wanted.values())) < len(frame)  # some rows are in a gap
    assert f"train before {sorted(frame['when'])[400]}, " in said[0]
    hours = {"hour": Column(of="t", part="hour", format="s")}
    schema = Schema(label="y", numeric=("n",), categorical=("hour",), columns=hours, layout="table")
    data, _ = run(tmp_path, "format", schema, split="time", time="t", gap="12h")
    assert found(data) == wanted
    assert not any("warning" in line for line in said)


@pytest.mark.parametrize("leave", [1, 2])
@pytest.mark.parametrize("timed", [True, False])
def test_the_last_of_each_user(tmp_path, leave, timed):
    frame = make(tmp_path)
    data, said = run(tmp_path, split="leave-last-out", user="user", leave=leave, **({"time": "t"} if timed else {}))
    rows = defaultdict(list)
    for i, (user, time) in enumerate(frame.select("user", "t").rows()):
        rows[user].append((time if timed else 0, i))
    wanted = {split: set() for split in SPLITS}
    for user, seen in rows.items():
        order = [i for _, i in sorted(seen)]
        if user is None or len(order) <= 2 * leave:
            wanted["train"].update(order)
            continue
        wanted["train"].update(order[: -2 * leave])
        wanted["validation"].update(order[-2 * leave : -leave])
        wanted["test"].update(order[-leave:])
    assert found(data) == wanted
    last = max(frame["t"][i] for i in wanted["train"])
    early = sum(frame["t"][i] <= last for i in wanted["test"])
    leak = (
        f"warning: {early:,} of {len(wanted['test']):,} test rows are not later than the last training row (t {last})"
    )
    assert any(line.startswith(leak) for line in said) == timed


def test_by_a_column(tmp_path):
    frame = make(tmp_path)
    data, _ = run(tmp_path, split="column", split_column="fold")
    names = {"train": "train", "valid": "validation", "test": "test"}
    wanted = {split: set() for split in SPLITS}
    for i, name in enumerate(frame["fold"]):
        wanted[names[name.lower()]].add(i)
    assert found(data) == wanted


@pytest.mark.parametrize("split", ["8:1:1", "last-day"])
def test_leaks_across_time_are_named(tmp_path, split):
    frame = make(tmp_path)
    data, said = run(tmp_path, split=split, time="when")
    rows = found(data)
    last = max(frame["when"][i] for i in rows["train"])
    warnings = [line for line in said if line.startswith("warning")]
    held_out = [rows["validation"], rows["test"]]
    if split == "last-day":  # its halves are told apart at the end only
        held_out = [rows["validation"] | rows["test"]]
    for line, part in zip(warnings, held_out, strict=True):
        early = sum(frame["when"][i] <= last for i in part)
        name = "test" if line is warnings[-1] and split == "8:1:1" else "validation"
        assert line.startswith(f"warning: {early} of {len(part)} {name} rows are not later than")
        assert f"(when {last})" in line


def test_files_in_order_of_time_leak_nothing(tmp_path):
    frame = make(tmp_path).sort("t")
    for name, rows in (
        ("a", frame.filter(pl.col("t") < 1_700_500_000)),
        ("b", frame.filter(pl.col("t") >= 1_700_500_000)),
    ):
        rows.write_parquet(tmp_path / f"{name}.parquet")
    for test, leaks in (("b", False), ("a", True)):
        said: list[str] = []
        train = {"a": "b", "b": "a"}[test]
        prepare(
            [tmp_path / f"{train}.parquet"],
            tmp_path / f"out-{test}",
            test=[tmp_path / f"{test}.parquet"],
            schema=SCHEMA,
            split_by=SplitBy(time="t"),
            report=said.append,
        )
        assert any("warning" in line for line in said) == leaks


def test_what_is_learned_comes_from_the_rows_that_train(tmp_path):
    frame = make(tmp_path)
    schema = Schema(
        label="y", numeric=("n",), categorical=("c",), columns={"n": Column(transform="minmax")}, layout="table"
    )
    data, _ = run(tmp_path, schema=schema, split="time", time="t")
    train = by_time(frame["t"].to_list(), 0)["train"]
    dense = data.arrays(data.days("train")[0]).dense[:, 0]
    first = [i for i in sorted(train) if i < 167]
    expected = [(i - min(train)) / (max(train) - min(train)) for i in first]
    assert dense.tolist() == pytest.approx(expected, rel=1e-6)


def test_bad_rows_are_left_out_before(tmp_path):
    frame = make(tmp_path, 90)
    cells = frame.with_columns(y=pl.when(pl.col("n") % 7 == 3).then(pl.lit("x")).otherwise(pl.col("y").cast(pl.String)))
    cells.write_csv(tmp_path / "a.csv")
    options = {"schema": SCHEMA, "split": "column", "split_by": SplitBy(split_column="fold")}
    data = prepare([tmp_path / "a.csv"], tmp_path / "skipped", on_bad_row="skip", **options)
    good = {n for n in range(90) if n % 7 != 3}
    rows = found(data)
    assert rows["test"] == {n for n in good if frame["fold"][n] == "TEST"}
    assert rows["train"] | rows["validation"] | rows["test"] == good


def test_stopped_anywhere_and_on_two_ranks(tmp_path):
    """After each record up to the first checksum, with a transform that learns; and by two ranks."""
    make(tmp_path, 120)
    schema = Schema(
        label="y", numeric=("n",), categorical=("c",), columns={"n": Column(transform="quantile")}, layout="table"
    )
    options = {"schema": schema, "split": "time", "time": "t", "gap": "3600", "min_count": 1}
    stops = stop_at_each_record(lambda out: run(tmp_path, out.name, **options), tmp_path / "out", checksums=slice(1))
    assert stops > 10
    whole = content(run(tmp_path, "whole", **options)[0].folder)
    text = 'label = "y"\nnumeric = ["n"]\ncategorical = ["c"]\n[columns.n]\ntransform = "quantile"\n'
    (tmp_path / "schema.toml").write_text(text)
    files = [tmp_path / f"part-{i}.parquet" for i in range(3)]
    command = ["torchrec_deepfm.launch", "--standalone", "--nproc-per-node", "2", "-m", "torchrec_deepfm", "prepare"]
    more = ["--schema", tmp_path / "schema.toml", "--output", tmp_path / "ranks", "--split", "time", "--time", "t"]
    done = run_module([*command, "--input", *map(str, files), *map(str, more), "--gap", "3600", "--min-count", "1"])
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "ranks") == whole


def test_a_changed_file_moves_the_border(tmp_path):
    frame = make(tmp_path)
    with (
        pytest.raises(StoppedError),
        stopping(lambda name, record: name == "stage_train_1" and record["finished"]),
    ):
        run(tmp_path, split="time", time="t")
    later = frame[334:].with_columns(pl.col("t") + 10**7)
    later.write_parquet(tmp_path / "part-2.parquet")
    data, _ = run(tmp_path, split="time", time="t")
    assert found(data) == by_time([*frame["t"][:334], *later["t"]], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "time"}, "--split time: give the column, --time NAME"),
        ({"split": "leave-last-out", "time": "t"}, "--split leave-last-out: give the column, --user NAME"),
        ({"split_column": "fold"}, "--split-column: only valid with --split column; leave it out"),
        ({"time": "t", "gap": "1d"}, "--gap: only valid with --split time; leave it out"),
        (
            {"split": "time", "time": "t", "gap": "1 year"},
            "--gap 1 year: not a time; give a number with s, m, h, d or w",
        ),
        ({"split": "time", "time": "t", "gap": "1d"}, "--gap 1d: column 't' holds numbers of an unknown unit"),
        ({"split": "time", "time": "when", "gap": "5"}, "--gap 5: column 'when' holds times; add a unit, such as 1d"),
        ({"split": "time", "time": "whem"}, "part-0.parquet: no column 'whem'; the file has 'y', 'n'"),
        ({"split": "time", "time": "fold"}, "part-0.parquet: row 1, column 'fold': "),
        ({"split": "column", "split_column": "user"}, "is not a split; write train, validation or test"),
        ({"split": "leave-last-out", "user": "user", "leave": 0}, "--leave 0: must be at least 1"),
        ({"split": "leave-last-out", "user": "user", "leave": 400}, "500 rows are too few to split leave-last-out"),
    ],
)
def test_mistakes(tmp_path, options, message):
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        run(tmp_path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not WorkFolder(tmp_path / "out").path.exists()


def test_a_time_that_is_missing(tmp_path):
    frame = make(tmp_path)
    frame[:167].with_columns(t=pl.when(pl.col("n") == 5).then(None).otherwise("t")).write_parquet(
        tmp_path / "part-0.parquet"
    )
    with pytest.raises(UserError, match=r"part-0.parquet: row 6, column 't': the time is missing; give it, or remove"):
        run(tmp_path, split="time", time="t")

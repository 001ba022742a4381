"""`plan`, `plan show` and `plan diff` as commands, and what they refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import embedded_data
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.io import load_plan
from torchrec_deepfm.sharding.plan.text import diff_text, ranks_text
from torchrec_deepfm.sharding.search.plan_tables import plan_tables


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def planned(folder: Path, name: str, *words: object) -> Path:
    path = folder / name
    run("plan", "--tables", "criteo-terabyte", "--hardware", "h100", "--ranks", 16, "--output", path, *words)
    return path


def test_a_plan_with_a_moving_average(tmp_path: Path) -> None:
    """The same plan takes one more copy of the weights on every rank."""
    rules = ("--constraint", "*=row_wise:kernel=fused", "--dim", 16)
    plans = [load_plan(planned(tmp_path, f"{len(more)}.json", *rules, *more)) for more in ((), ("--ema",))]
    assert plans[0].without_predictions() == plans[1].without_predictions()
    weights = [0] * 16
    for table in plans[0].tables:
        for shard in table.shards:
            weights[shard.rank] += shard.sizes[0] * shard.sizes[1] * 4
    held = [[cost.hbm_bytes for cost in plan.predicted.per_rank] for plan in plans if plan.predicted is not None]
    assert [after - before for before, after in zip(*held, strict=True)] == weights


def test_a_plan_is_written_shown_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    balanced = planned(tmp_path, "balanced.json")
    printed = capsys.readouterr().out
    plan = load_plan(balanced)
    assert plan.predicted is not None
    path = plan.predicted.critical_path_ms
    assert f"critical path {path:.2f} ms (rank " in printed
    assert f"mean {plan.predicted.mean_ms:.2f} ms" in printed
    assert "of 68.0 GiB per rank (80.0 GiB less 15% for all else)" in printed
    assert printed.rstrip().endswith(f"wrote {balanced}")
    raw = json.loads(balanced.read_text())
    assert raw["hardware"]["name"] == "h100"
    assert raw["predicted"]["critical_path_ms"] == path
    assert len(raw["predicted"]["per_rank"]) == raw["world_size"] == 16
    assert [table["name"] for table in raw["tables"]] == [f"t_C{n}" for n in range(1, 27)]
    totals = [0.0] * 16
    for table in raw["tables"]:
        for shard in table["shards"]:
            totals[shard["rank"]] += shard["predicted"]["total_ms"]
    assert max(totals) == pytest.approx(path)

    run("plan", "show", balanced)
    shown = capsys.readouterr().out
    assert f"critical path {path:.2f} ms" in shown
    assert "of 68.0 GiB per rank (80.0 GiB less 15% for all else)" in shown

    torchrec = planned(tmp_path, "torchrec.json", "--search", "torchrec", "--constraint", "C1=row_wise")
    capsys.readouterr()
    run("plan", "diff", balanced, torchrec)
    reported = capsys.readouterr().out
    before = next(table for table in raw["tables"] if table["name"] == "t_C1")
    assert f"t_C1: {before['sharding_type']} -> row_wise; {len(before['shards'])} -> 16 shards" in reported
    other = load_plan(torchrec).predicted
    assert other is not None
    assert f"critical path: {path:.2f} -> {other.critical_path_ms:.2f} ms" in reported
    run("plan", "diff", balanced, balanced)
    assert capsys.readouterr().out == f"{balanced} and {balanced} place 26 tables alike\n"


def test_the_report_shows_torchrecs_plan_beside(tmp_path: Path) -> None:
    """Its figures are those that the planner of TorchRec alone is given."""
    words = ["--ranks", 4, "--dim", 16]
    balanced = load_plan(planned(tmp_path, "balanced.json", *words, "--report", tmp_path / "plan.html")).predicted
    alone = load_plan(planned(tmp_path, "alone.json", *words, "--search", "torchrec")).predicted
    assert balanced is not None
    assert alone is not None
    html = (tmp_path / "plan.html").read_text()
    for name, one in (("this plan", balanced), ("TorchRec&#39;s planner", alone)):
        cells = html.split(f">{name}</td>", 1)[1].split("</tr>", 1)[0]
        shown = re.findall(r">([0-9.]+)</td>", cells)
        held = max(cost.hbm_bytes for cost in one.per_rank) / 2**30
        total = max(cost.total_ms - cost.input_dist_comms_ms for cost in one.per_rank)
        amounts = (one.critical_path_ms, total, one.mean_ms)
        assert shown == [*(f"{amount:.3f}" for amount in amounts), f"{held:.2f}"]


def test_single_differences_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = planned(tmp_path, "a.json", "--dim", 16)
    raw = json.loads(path.read_text())
    table = next(table for table in raw["tables"] if table["sharding_type"] != "data_parallel")
    moved = table["shards"][0]
    moved["rank"] = (moved["rank"] + 1) % 16
    table["ranks"][0] = moved["rank"]
    (tmp_path / "b.json").write_text(json.dumps(raw))
    one, other = load_plan(path), load_plan(tmp_path / "b.json")
    reported = diff_text(one, other, ("a", "b")).splitlines()
    assert reported[0] == "a -> b: 1 of 26 tables placed differently"
    assert reported[1].startswith(f"{table['name']}: ranks ")
    assert reported[-1].startswith(("GPU memory of the fullest rank", "host memory"))


@pytest.mark.parametrize(
    ("search", "name"),
    [("balanced", "balanced"), ("torchrec", "torchrec"), ("ours", "balanced"), ("stock", "torchrec")],
)
def test_a_plan_for_cpu_ranks_leaves_none_without_a_row(search: str, name: str, tmp_path: Path) -> None:
    """FBGEMM's kernel on CPU needs one. TorchRec's planner does not know, and takes row_wise of two rows here."""
    (tmp_path / "short.csv").write_text("name,num_embeddings,embedding_dim,pooling_factor\na,2,128,100\nb,2,128,100\n")
    words = ["--tables", tmp_path / "short.csv", "--hardware", "cpu", "--ranks", 8, "--output", tmp_path / "plan.json"]
    run("plan", *words, "--search", search)
    plan = load_plan(tmp_path / "plan.json")
    assert plan.search == name  # "ours" and "stock" are the names of earlier versions
    assert all(min(shard.sizes) >= 1 for table in plan.tables for shard in table.shards)


def test_a_reader_that_leaves_early_is_not_an_error() -> None:
    command = f"{sys.executable} -m torchrec_deepfm plan --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("usage")
    assert done.stderr == ""


def test_ranks_in_short() -> None:
    assert ranks_text(range(16)) == "0-15"
    assert ranks_text([3, 1, 3]) == "1 3"
    assert ranks_text(range(0, 40, 2)) == "0 2 4 6 8 10 ... (20 ranks)"


def test_as_a_rank_only_the_first_one_plans(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchrec_deepfm", "plan", "--tables", "criteo-terabyte", "--hardware", "h100"]
    command += ["--ranks", "8", "--output", str(tmp_path / "plan.json")]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


GOOD = {"--tables": "criteo-terabyte", "--hardware": "h100", "--ranks": "16", "--output": "plan.json"}


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"--ranks": "12"}, "12 ranks on h100: not a multiple of the 8 ranks of a host; take 8 or 16"),
        ({"--ranks": "9" * 30}, f"--ranks {'9' * 30}: must be at most 65,536"),
        ({"--batch-size": "9" * 30}, f"--batch-size {'9' * 30}: must be at most 2,147,483,647"),
        ({"--ranks": "0"}, "--ranks 0: must be at least 1"),
        ({"--ranks": None}, "option --ranks is missing; python -m torchrec_deepfm plan --help lists the options"),
        ({"--hardware": "h10"}, "hardware 'h10': no such preset; choose one of a100-40,"),
        ({"--hardware": "bad.toml"}, "bad.toml: hbm_bytes: expected a whole number >= 1, not -5; correct it"),
        ({"--tables": "criteo"}, "tables 'criteo': neither criteo-terabyte nor criteo-dcnv2 nor a file nor a prepared"),
        ({"--tables": "."}, "."),
        ({"--dim": "10"}, "--dim: embedding_dim: 10 is not a multiple of 4"),
        ({"--dim": "-4"}, "--dim: embedding_dim: expected a whole number >= 4, not -4"),
        ({"--batch-size": "0"}, "--batch-size 0: must be at least 1"),
        ({"--output": "absent/plan.json"}, "--output absent/plan.json: its folder does not exist"),
        ({"--output": "."}, "--output .: this is a folder"),
        ({"--output": "pipe"}, "--output pipe: this is not a regular file; name a file, such as plan.json"),
        ({"--output": "o" * 300}, f"'{'o' * 56}...: longer than a name may be here; take a shorter one"),
        ({"--tables": "short.csv", "--output": "short.csv"}, "--output short.csv: this command reads or writes that"),
        ({"--hardware": "good.toml", "--output": "good.toml"}, "--output good.toml: this command reads or writes that"),
        ({"--report": "./plan.json"}, "--report plan.json: this command reads or writes that file already"),
        ({"--report": "."}, "--report .: this is a folder; name a file, such as plan.html"),
        ({"--tables": "short.csv", "--dim": "6"}, "--dim: embedding_dim: 6 is not a multiple of 4"),
        ({"--tables": "lines.json"}, "lines.json: missing tables, unknown 'a\\nb'; correct it"),
        ({"--tables": "t" * 300}, f"'{'t' * 56}...: longer than a name may be here"),
        ({"--hardware": "h" * 300}, f"'{'h' * 56}...: longer than a name may be here"),
        ({"--constraint": "C99=row_wise"}, "--constraint C99=row_wise: "),
        ({"--constraint": "C1=fused"}, "--constraint C1=fused: unknown sharding type 'fused'"),
        (
            {"--tables": "short.csv", "--hardware": "cpu", "--constraint": "b=row_wise"},
            "--constraint b=row_wise: table b: row_wise cuts its 2 rows into pieces of 1 and leaves 14 of 16 ranks",
        ),
        ({"--tables": "huge.json"}, "table huge: 1,000,000,000,000 x 128 are 465.7 TiB of weights"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    changed: dict[str, str | None],
    reported: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text('base = "h100"\nhbm_bytes = -5\n')
    Path("huge.json").write_text('[{"name": "huge", "num_embeddings": 1000000000000, "embedding_dim": 128}]')
    Path("good.toml").write_text('base = "H100"\n')
    Path("lines.json").write_text('{"a\\nb": 1}')
    os.mkfifo("pipe")
    Path("short.csv").write_text("name,num_embeddings,embedding_dim\na,100000,16\nb,2,16\n")
    before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    words = [word for key, value in (GOOD | changed).items() if value is not None for word in (key, value)]
    with pytest.raises(SystemExit) as stopped:
        run("plan", *words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith(f"error: {reported}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == len(before) + 1
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["shwo", "a.json"], "unknown option shwo; python -m torchrec_deepfm plan --help lists the options"),
        (["show"], "option file is missing"),
        (["diff", "a.json"], "option second is missing"),
        (["show", "absent.json"], "absent.json: no such file"),
        (["show", "absent.json", "--ranks", "8"], "unknown option --ranks"),
        (["diff", "a.json", "b.json", "--report", "x.html"], "unknown option --report"),
        (["--ranks", "8", "show", "absent.json"], "unknown option show"),
        (
            ["--tables", "x", "--hardware", "h100", "--ranks", "2", "--output", "y", "--search", "stok"],
            "option --search: 'stok' is not valid; choose one of balanced, torchrec",
        ),
        ([], "option --tables is missing; python -m torchrec_deepfm plan --help lists the options"),
        (["--tables", "x", "--ranks", "8"], "option --hardware is missing"),
    ],
)
def test_wrong_words_get_one_line(words: list[str], reported: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("plan", *words)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert captured.err.startswith(f"error: {reported}")
    assert captured.err.count("\n") == 1


def test_kinds_of_hardware_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [Table(name=f"t{n}", num_embeddings=10**6, embedding_dim=64, pooling_factor=n + 1) for n in range(4)]
    (tmp_path / "tables.json").write_text(json.dumps([vars(table) for table in tables]))
    (tmp_path / "ours.toml").write_text('base = "h100"\ndollars_per_hour = 2.5\n')
    words = ["--tables", tmp_path / "tables.json", "--ranks", 8, 12, 16, "--batch-size", 512, "--report"]
    run("plan", "--compare", tmp_path / "ours.toml", "b200", *words, tmp_path / "c.html")
    lines = capsys.readouterr().out.splitlines()
    found = embedded_data((tmp_path / "c.html").read_text())["compared"]
    assert [(row["hardware"], row["ranks"]) for row in found] == [
        (name, ranks) for name in ("ours", "b200") for ranks in (8, 12, 16)
    ]
    for row in found:
        line = next(line for line in lines if line.split()[:2] == [row["hardware"], str(row["ranks"])])
        if row["ranks"] == 12:
            assert row["step_ms"] is None
            assert "no plan: 12 ranks on" in line
            continue
        hardware = read_hardware("b200" if row["hardware"] == "b200" else str(tmp_path / "ours.toml"))
        plan = plan_tables(tables, hardware, row["ranks"], batch_size=512)
        assert plan.predicted is not None
        assert row["step_ms"] == pytest.approx(plan.predicted.critical_path_ms)
        steps = 1e9 / (512 * row["ranks"])  # for a billion samples
        dollars = steps * row["step_ms"] / 1000 / 3600 * row["ranks"] * 2.5
        assert row["dollars"] == (pytest.approx(dollars) if row["hardware"] == "ours" else None)
        assert f"{row['step_ms']:.2f}" in line.split()
        assert line.split()[-1] == ("-" if row["hardware"] == "b200" else f"{dollars:,.2f}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "h100", "--tables", "criteo-terabyte", "--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--compare", "h1oo", "--tables", "criteo-terabyte", "--ranks", "8"], "hardware 'h1oo': no such preset"),
        (
            ["--compare", "h100", "--tables", "criteo-terabyte", "--ranks", "12"],
            "no plan for any of these: 12 ranks on",
        ),
        (["--compare", "--tables", "criteo-terabyte", "--ranks", "8"], "--compare: needs at least one value"),
        (["--compare", "h100", "H100", "--tables", "criteo-terabyte", "--ranks", "8"], "--compare: two descriptions"),
        (["--compare", "h100", "--ranks", "8"], "option --tables is missing"),
    ],
)
def test_what_can_not_be_compared_is_refused(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *words])
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err.splitlines()[-1]

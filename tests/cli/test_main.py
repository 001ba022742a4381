"""The command line: its option names, frozen, and what it answers to bad input."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from tests.support.ranks import run_module
from torchrec_deepfm import __main__
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe

# Scripts rely on these names. Add to them; a change or a removal breaks somebody's job.
OPTIONS = {
    "synthetic": {"output", "rows", "days", "seed", "click-rate"},
    "prepare": {
        "input",
        "output",
        "validation",
        "test",
        "schema",
        "min-count",
        "hash",
        "num-embeddings",
        "seed",
        "split",
        "time",
        "gap",
        "user",
        "leave",
        "split-column",
        "numeric",
        "vocabulary",
        "on-bad-row",
        "memory",
        "missing",
    },
    "verify": set(),
    "recipes": {"data", "ranks", "samples-per-second"},
    "report": {"run", "output", "importance", "data"},
    "schema infer": {"label", "output"},
    "plan show": {"report"},
    "plan diff": set(),
    "train": {
        "data",
        "num-embeddings",
        "output",
        "recipe",
        "factor-dim",
        "over-arch-layer-sizes",
        "activation",
        "dropout",
        "batch-norm",
        "terms",
        "init-std",
        "epochs",
        "batch-size",
        "sparse-optimizer",
        "sparse-lr",
        "dense-lr",
        "data-parallel-rows",
        "warmup",
        "decay",
        "decay-power",
        "embedding-l2",
        "linear-l2",
        "touched-embedding-l2",
        "touched-linear-l2",
        "over-arch-l2",
        "clip-norm",
        "ema",
        "ema-every",
        "seeds",
        "max-ne",
        "precision",
        "eval-every",
        "seed",
        "resume",
        "checkpoints",
        "plan",
        "hardware",
        "constraint",
        "qcomms",
        "timeout",
        "stop-before-limit",
        "checkpoint-every",
        "keep-last",
        "metric",
        "patience",
        "lr-patience",
        "lr-factor",
    },
    "evaluate": {
        "run",
        "data",
        "input",
        "num-embeddings",
        "split",
        "checkpoint",
        "by",
        "slices",
        "by-user",
        "k",
        "bootstrap",
        "confidence",
        "seed",
        "compare",
        "compare-checkpoint",
        "output",
        "overwrite",
    },
    "serve": {
        "batch-rows",
        "batch-wait-ms",
        "checkpoint",
        "host",
        "max-body-mb",
        "max-connections",
        "max-rows",
        "package",
        "port",
        "queue-rows",
        "run",
        "threads",
        "timeout",
    },
    "plan --compare": {"compare", "tables", "ranks", "dim", "batch-size", "constraint", "report"},
    "plan": {
        "objective",
        "tables",
        "hardware",
        "ranks",
        "output",
        "dim",
        "batch-size",
        "ema",
        "search",
        "constraint",
        "optimizer",
        "report",
    },
    "experiment": {
        "tables",
        "output",
        "plans",
        "rules",
        "sweep",
        "ranks",
        "dim",
        "batch-size",
        "steps",
        "turns",
        "hardware",
        "optimizer",
        "over-arch-layer-sizes",
        "ids",
        "seed",
        "scaling",
    },
    "calibrate": {"output", "check", "name"},
    "doctor": set(),
    "predict": {"shard-tables", "run", "package", "checkpoint", "data", "input", "output", "keep", "on-bad-row"},
    "explain": {"run", "package", "checkpoint", "data", "input", "output", "rows", "importance-rows", "page"},
    "export": {"layout", "run", "output", "to", "tables", "checkpoint", "data"},
}


def options_in_help(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    return set(re.findall(r"^\W{1,3}--([a-z][a-z0-9-]*)", capsys.readouterr().out, flags=re.MULTILINE))


def test_the_commands_are_frozen() -> None:
    assert set(cli.COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_the_option_names_are_frozen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert options_in_help(command, capsys) == OPTIONS[command]


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", OPTIONS)
def test_help_is_plain(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option has a type or choices and a text; no None, no markup, no empty default; no line is too wide."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    found = capsys.readouterr().out
    assert max(len(line) for line in found.splitlines() if line[:1] in "╭│╰ ") <= int(columns)
    assert "None" not in found
    assert "``" not in found
    assert "default: )" not in found
    text = " ".join(found.replace("│", " ").split())
    for option in OPTIONS[command]:
        flag = rf"--{option}, --no-{option}|--{option}" if f"--no-{option} " in text else f"--{option}"
        assert re.search(
            rf" (?:{flag})(?: [A-Z]+| \{{[^ ]+\}}| \[.+? \.\.\.\])?(?: \[[A-Z]+ \.\.\.\])? (?!--).{{12}}", text
        ), option


def test_the_help_of_train_is_in_groups_and_the_same_whatever_else_is_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    for words in ([], ["--recipe", "smoke"], ["--data", "x", "--dropout", "0.1"]):
        with pytest.raises(SystemExit):
            cli.main(["train", *words, "--help"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    groups = re.findall(r"^(?:╭─)? ([a-z ]*options) ", texts[0], flags=re.MULTILINE)
    kinds = ("model", "optimization", "regularization", "evaluation", "checkpoint", "planner", "run")
    assert groups == ["options", *(f"{kind} options" for kind in kinds)]
    text = " ".join(texts[0].replace("│", " ").split())
    assert "Hidden layers of the MLP. (default: 400 400 400)" in text  # the paper's


def train_config(*words: str) -> TrainConfig:
    command = cli.parse(["train", *words])
    assert isinstance(command, cli.Train)
    return command.config


def test_a_recipe_and_single_options_on_top() -> None:
    assert train_config() == recipe("synthetic")
    assert train_config("--data", "x") == recipe("paper")
    assert train_config("--data=x", "--recipe=smoke") == recipe("smoke")
    changed = train_config("--recipe", "paper", "--dropout", "0.25", "--terms", "linear", "fm", "--seed", "7")
    assert changed == dataclasses.replace(recipe("paper"), dropout=0.25, terms=("linear", "fm"), seed=7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], f"no command; choose one of {', '.join(cli.COMMANDS)}"),
        (["trian"], f"trian: unknown command; choose one of {', '.join(cli.COMMANDS)} (did you mean 'train'?)"),
        (["zzz"], f"zzz: unknown command; choose one of {', '.join(cli.COMMANDS)}"),
        (["train", "--batchsize", "3"], "unknown option --batchsize; python -m torchrec_deepfm train --help lists"),
        (["train", "--dropout", "x"], "option --dropout: 'x' is not a number; python -m"),
        (
            ["recipes", "--ranks", "eight"],
            "option --ranks: 'eight' is not a whole number; python -m torchrec_deepfm rec",
        ),
        (["plan", "shwo", "a.json"], "unknown option shwo"),
        (["recipes", "paper", "--ranks", "1.5"], "option --ranks: '1.5' is not a whole number; python -m"),
        (["train", "--dropout", "1"], "--dropout 1.0: the probability of dropping a unit lies in [0, 1)"),
        (["train", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["train", "--sparse-lr", "nan"], "--sparse-lr nan: must be greater than 0"),
        (["train", "--warmup", "0.6", "--decay", "0.6"], "--warmup 0.6 --decay 0.6: these are shares of the training"),
        (["train", "--precision", "fp8"], "option --precision takes no 'fp8'; choose one of bf16, float32, medium"),
        (["train", "--recipe", "x"], "--recipe x: unknown recipe; choose one of paper, d2l, criteo-x1, "),
        (["recipes", "--ranks", "2"], "--ranks: name the recipe too"),
        (["recipes", "paper", "--ranks", "0"], "--ranks 0: must be at least 1"),
        (["recipes", "d2l", "--samples-per-second", "nan"], "--samples-per-second nan: must be greater than 0"),
        (["recipes", "papre"], "--recipe papre: unknown recipe; choose one of paper, d2l, criteo-x1, "),
        (["recipes", "paper", "--data", "nowhere"], "nowhere: "),
        (["report", "--run", "nowhere"], "--run nowhere: not a run folder"),
        (["prepare", "--output", "x"], "--input: no file is named; name at least one"),
        (["prepare", "--input", "x"], "option --output is missing; python -m torchrec_deepfm prepare --help lists"),
        (
            ["prepare", "--input", "x", "--output", "y", "--memory", "much"],
            "--memory much: not an amount of memory",
        ),
        (["schema", "guess", "x"], "schema: unknown command; choose one of"),
        (["verify"], "option folder is missing"),
        (["prepare", "--input", "a", "--output", "x", "--mincount", "3"], "unknown option --mincount"),
        (["synthetic", "--output"], "option --output lacks a value"),
        (["evaluate", "--run", "x"], "--data, --input: give one of the two, a prepared folder or raw files"),
        (["evaluate", "--run", "x", "--data", "y", "--split", "z"], "option --split takes no 'z'; choose one of"),
    ],
)
def test_bad_command_lines_get_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


# What each command wants besides the option under test.
NEEDED = {
    "synthetic": ["--output", "x"],
    "prepare": ["--input", "x", "--output", "x"],
    "verify": [],
    "recipes": ["paper"],
    "report": ["--run", "x"],
    "schema infer": ["x"],
    "plan show": ["x"],
    "plan diff": ["x", "x"],
    "train": [],
    "evaluate": ["--run", "x", "--data", "x"],
    "predict": ["--run", "x", "--input", "x", "--output", "x"],
    "explain": ["--run", "x", "--input", "x"],
    "export": ["--run", "x", "--output", "x", "--to", "onnx"],
    "serve": ["--run", "x"],
    "plan --compare": ["x", "--tables", "x", "--ranks", "2"],
    "plan": ["--tables", "x", "--hardware", "x", "--ranks", "2", "--output", "x"],
    "experiment": ["--tables", "x", "--output", "x"],
    "calibrate": ["x", "--output", "x"],
    "doctor": [],
}
# Every option that says where something is written.
WRITTEN = {
    ("synthetic", "output"),
    ("prepare", "output"),
    ("report", "run"),
    ("schema infer", "output"),
    ("plan show", "report"),
    ("plan --compare", "report"),
    ("train", "output"),
    ("evaluate", "run"),
    ("evaluate", "output"),
    ("plan", "output"),
    ("plan", "report"),
    ("experiment", "output"),
    ("export", "output"),
    ("calibrate", "output"),
}


def test_an_address_is_refused_wherever_a_local_path_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {("verify", ""), ("calibrate", "")} | {("train", "data"), ("evaluate", "data"), ("prepare", "vocabulary")}
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        named = re.findall(r"--([a-z-]+) \[?PATH", capsys.readouterr().out)
        cases |= {(command, name) for name in named}
    assert cases >= WRITTEN
    for command, name in sorted(cases):
        for address in ("s3://bucket/out", "memory://out", "simplecache::s3://bucket/out"):
            option = [f"--{name}", address] if name else [address]
            needed = NEEDED[command]
            at = needed.index(option[0]) if option[0] in needed else len(needed) if name else 0
            with pytest.raises(SystemExit) as stopped:
                cli.main([*command.split(), *needed[:at], *option, *needed[at + 2 * bool(name) :]])
            message = capsys.readouterr().err
            assert stopped.value.code == 2, (command, option)
            assert f"{address}: only a local path works here" in message, (command, option)
            assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_library_refuses_an_address_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_deepfm.data.dataset.publish import check_free
    from torchrec_deepfm.data.raw.infer_schema import write_inferred
    from torchrec_deepfm.distributed.run_lock import RunLock
    from torchrec_deepfm.experiment.plans import check_output
    from torchrec_deepfm.files import write_text

    monkeypatch.chdir(tmp_path)
    for write in (
        check_free,
        check_output,
        RunLock,
        lambda path: write_text(path, "", what="plan"),
        lambda path: write_inferred("x.csv", path),
    ):
        with pytest.raises(UserError, match=r"s3://bucket/out: only a local path works here"):
            write(Path("s3://bucket/out"))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_of_parse_error_still_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should tyro grow a kind of error that is not known here, its own report stands."""
    monkeypatch.setattr("torchrec_deepfm.cli.parse_errors._explain", lambda event: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--batchsize", "3"])
    assert stopped.value.code == 2


def test_a_parse_error_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"^unknown option --x"):
        cli.parse(["train", "--x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "absent"], "error: absent: no such folder; make it with prepare"),
        (["train", "--data", "taken"], "error: taken: not a prepared folder, manifest.json is missing; make one with"),
        (["evaluate", "--run", "absent", "--data", "taken"], "error: "),
        (["evaluate", "--run", "taken", "--data", "taken"], "error: "),
        (["prepare", "--input", "absent.tsv", "--output", "new"], "error: absent.tsv: "),
        (["prepare", "--input", "x", "--output", "new", "--schema", "y.toml"], "error: "),
        (["schema", "infer", "absent.parquet"], "error: absent.parquet: "),
        (["verify", "absent"], "error: absent: no such folder; make it with prepare"),
        (["synthetic", "--output", "taken"], "error: taken"),
        (["synthetic", "--output", "new", "--rows", "0"], "error: --rows"),
        (["synthetic", "--output", "new", "--click-rate", "1.5"], "error: --click-rate"),
    ],
)
def test_bad_input_is_answered_with_code_2_and_leaves_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["torchrec_deepfm", *words])
    code = __main__.run()
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["something"]


def test_from_raw_text_to_an_evaluated_run(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return run_module(["torchrec_deepfm", *words], cwd=tmp_path)

    made = run("synthetic", "--output", "raw", "--rows", "4000", "--click-rate", "0.1")
    assert (made.returncode, made.stderr) == (0, "")
    assert "best reachable AUC" in made.stdout
    splits = ["--validation", "raw/validation.tsv", "--test", "raw/test.tsv"]
    prepared = run("prepare", "--input", "raw/day_0.tsv", *splits, "--output", "data")
    assert (prepared.returncode, prepared.stderr) == (0, "")
    # A Python of its own: nothing is to be seen of the warnings that torch, FBGEMM and TorchRec have while they load.
    command = [sys.executable, "-m", "torchrec_deepfm", "train", "--data", "data", "--output", "run"]
    trained = subprocess.run(
        [*command, "--recipe", "smoke"], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert (trained.returncode, trained.stderr) == (0, "")
    named = trained.stdout.splitlines()[-1]
    assert named.startswith("wrote run/: ")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {name.strip("/,") for name in named.split()[2:]} == written
    assert written >= {
        "checkpoint",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "plan.json",
        "calibration.json",
        "curves.json",
        "data.json",
        "importance.json",
        "report.html",
        "summary.json",
        "tensorboard",
    }

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    truth = json.loads((tmp_path / "raw" / "truth.json").read_text())
    assert summary["test"]["best_reachable_auc"] == truth["files"]["test.tsv"]["auc"]
    assert summary["test"]["rows"] == truth["files"]["test.tsv"]["rows"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "validation", "test"}
    assert all({"step", "split", "loss"} <= line.keys() for line in lines)

    (tmp_path / "run" / "report.html").unlink()
    drawn = run("report", "--run", "run")
    assert (drawn.returncode, drawn.stdout, drawn.stderr) == (0, "wrote run/report.html\n", "")
    told = run("recipes", "smoke", "--data", "data")
    assert (told.returncode, told.stderr) == (0, "")
    assert f"steps             {summary['steps']:,} of 256 samples" in told.stdout

    again = run("train", "--data", "data", "--output", "run", "--recipe", "smoke")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("run: this training is finished, there is nothing left to do\n")

    evaluated = run("evaluate", "--run", "run", "--data", "data")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    result = json.loads((tmp_path / "run" / "evaluate_test.json").read_text())
    assert summary["test"].items() <= result.items()


def test_tyro_keeps_the_hook_that_one_line_errors_stand_on() -> None:
    assert callable(tyro._errors.on_parse_error)

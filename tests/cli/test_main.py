"""The command line: its commands and option names, frozen, and their help."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_deepfm.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]

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
        "negative-rate",
        "on-bad-row",
        "memory",
        "missing",
    },
    "verify": set(),
    "recipes": {"data", "ranks", "samples-per-second"},
    "report": {"run", "output", "importance", "data"},
    "runs": {"json"},
    "runs compare": {"output"},
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
        "embedding-weight-decay",
        "over-arch-l2",
        "clip-embedding",
        "cowclip-ratio",
        "cowclip-bound",
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
        "compile-dense",
        "timeout",
        "stop-before-limit",
        "profile",
        "watch",
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
        "queue-requests",
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
    groups = re.findall(r"^(?:╭─)? ([a-z]* ?options) ", texts[0], flags=re.MULTILINE)
    kinds = ("model", "optimization", "regularization", "evaluation", "checkpoint", "planner", "run")
    assert groups == ["options", *(f"{kind} options" for kind in kinds)]
    text = " ".join(texts[0].replace("│", " ").split())
    assert "Hidden layers of the MLP. (default: 400 400 400)" in text  # the paper's


def test_what_infer_advises_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = (f"{row % 2},{row % 7},{row % 5}" for row in range(100))
    Path("my clicks.csv").write_text("\n".join(["click,user_id,item_id", *rows]))
    cli.main(["schema", "infer", "my clicks.csv", "--output", "schema.toml"])
    advice = capsys.readouterr().out.partition("python -m torchrec_deepfm ")[2]
    cli.main([*shlex.split(advice), "--min-count", "1"])
    assert Path("FOLDER/manifest.json").is_file()


def test_a_python_without_the_packages_gets_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-m", "torchrec_deepfm", "train"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    line = f"torchrec_deepfm: {sys.executable} lacks the package 'tyro'; run `make setup` and "
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1

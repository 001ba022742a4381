"""What the command line answers to words that it can't read, and to a recipe with options on top."""

import dataclasses
from pathlib import Path

import pytest
import tyro

from torchrec_deepfm import __main__
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.cli.train import Train
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.recipes import recipe


def train_config(*words: str) -> TrainConfig:
    command = cli.parse(["train", *words])
    assert isinstance(command, Train)
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


def test_tyro_keeps_the_hook_that_one_line_errors_stand_on() -> None:
    assert callable(tyro._errors.on_parse_error)

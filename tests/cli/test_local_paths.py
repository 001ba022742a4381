"""An address is refused wherever a local path is meant."""

import re
from pathlib import Path

import pytest

from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError

# What each command wants besides the option under test.
NEEDED = {
    "synthetic": ["--output", "x"],
    "prepare": ["--input", "x", "--output", "x"],
    "verify": [],
    "recipes": ["paper"],
    "report": ["--run", "x"],
    "runs": [],
    "runs compare": ["x", "x"],
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
    ("runs compare", "output"),
    ("schema infer", "output"),
    ("plan show", "report"),
    ("plan --compare", "report"),
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
    cases = {("verify", ""), ("calibrate", ""), ("prepare", "vocabulary")}
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        named = re.findall(r"--([a-z-]+) \[?PATH", capsys.readouterr().out)
        taken = {name.replace("run_folder", "run") for name in getattr(cli.command_class(command), "ADDRESSES", ())}
        cases |= {(command, name) for name in named if name not in taken}
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

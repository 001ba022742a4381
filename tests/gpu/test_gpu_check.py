"""`make gpu-check` where its commands are replaced: their order, what fails a step, and the report."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.training import gpu_check
from benchmarks.training.gpu_check import Check, FailedError, Step

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """Does what the commands would leave behind; `auc` of each training in turn."""

    def __init__(self, *auc: float, broken: str = "") -> None:
        self.auc, self.broken = list(auc), broken
        self.ran: list[str] = []
        self.devices: set[str] = set()

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> str:
        words = list(command[2:])
        self.devices.add(variables["TEST_DEVICE"])
        if "train" in words:
            words = words[words.index("train") :]
        self.ran.append(" ".join(words[:2]))
        if self.broken and self.broken in words:
            raise FailedError("a line of output\nexit code 1")
        if "--output" in words and "synthetic" not in words:
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").touch()
            if "train" in words:
                figures = {"auc": self.auc.pop(0), "logloss": 0.5}
                (folder / "summary.json").write_text(json.dumps({"validation": figures, "test": figures}))
        return "Resuming from step 20" if len(self.auc) == 0 else "trained"

    def kill(self, command: Sequence[str], variables: Mapping[str, str], due: Callable[[], bool]) -> str:
        self.ran.append("kill")
        checkpoint = Path(command[command.index("--output") + 1]) / "checkpoints" / "step_00000020"
        assert not due()
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").touch()
        assert due()
        return "killed\n"


def outcomes(commands: Commands, folder: Path, device: str = "cuda") -> dict[str, tuple[bool, str]]:
    check = Check(device=device, ranks=2, folder=folder, run=commands.run, run_and_kill=commands.kill)
    found = gpu_check.check(check.steps(), say=lambda line: None)
    return {one.title: (one.passed, one.text) for one in found}


def test_the_steps_in_their_order(tmp_path: Path) -> None:
    commands = Commands(0.75, 0.75)
    found = outcomes(commands, tmp_path)
    assert [passed for passed, _ in found.values()] == [True] * 6
    assert [words.split()[0] for words in commands.ran] == [
        *("torchrec_deepfm", "pytest", "torchrec_deepfm", "torchrec_deepfm", "train"),
        *("kill", "train", "torchrec_deepfm", "benchmarks.training.speed"),
    ]
    assert commands.devices == {"cuda"}


@pytest.mark.parametrize(
    ("device", "second", "passed"), [("cuda", 0.7505, True), ("cuda", 0.76, False), ("cpu", 0.7500001, False)]
)
def test_a_resumed_training_must_end_alike(tmp_path: Path, device: str, second: float, passed: bool) -> None:
    found = outcomes(Commands(0.75, second), tmp_path, device)
    assert found["The same training, killed and resumed"][0] == passed


def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    found = outcomes(Commands(0.75, 0.75, broken="doctor"), tmp_path)
    assert [passed for passed, _ in found.values()] == [False, *[True] * 5]
    assert found["Doctor"][1] == "a line of output\nexit code 1"


def test_a_failed_training_fails_what_needs_it(tmp_path: Path) -> None:
    found = outcomes(Commands(0.75, 0.75, broken="train"), tmp_path)
    assert [passed for passed, _ in found.values()] == [True, True, False, False, True, True]


def test_the_report_has_the_end_of_each_output() -> None:
    def fail() -> str:
        raise FailedError("why")

    steps = [Step(title="one", work=lambda: "\n".join(map(str, range(100)))), Step(title="two", work=fail)]
    text = gpu_check.report(gpu_check.check(steps, say=lambda line: None), {"device": "NVIDIA H100", "torch": "2.13"})
    assert "device NVIDIA H100, torch 2.13" in text
    assert "| one | passed | 0 |\n| two | **failed** | 0 |" in text
    assert "```text\n60\n61\n" in text
    assert "\n99\n```" in text
    assert "## two\n\n```text\nwhy\n```" in text


def test_without_a_gpu_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(gpu_check.Options(output=tmp_path / "check.md"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: gpu-check: torch finds no GPU here; run it on a machine with one, or add --device cpu\n"
    )
    assert not (tmp_path / "check.md").exists()


def test_a_command_is_killed_when_it_is_due(tmp_path: Path) -> None:
    words = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; touch {tmp_path}/due; wait"]
    found = gpu_check._run_and_kill(words, os.environ, (tmp_path / "due").exists)
    assert found == "killed with exit code -9\n"
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    deadline = time.monotonic() + 30
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "its child lives"
        time.sleep(0.02)


def test_a_failed_command_says_why() -> None:
    with pytest.raises(FailedError, match="broken\n\nexit code 3: -c echo broken; exit 3"):
        gpu_check._run(["sh", "-c", "echo broken; exit 3"], os.environ)


def test_make_knows_it() -> None:
    shown = subprocess.check_output(["make", "-n", "gpu-check"], cwd=ROOT, text=True)
    assert "-m benchmarks.training.gpu_check" in shown

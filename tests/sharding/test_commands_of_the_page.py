"""The commands of docs/sharding.md, as they are typed: plans and trainings run, experiments only read their tables."""

import re
import shlex
from pathlib import Path

import pytest

from torchrec_deepfm.cli.experiment import CalibrateCommand, ExperimentCommand
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.sharding.inputs.tables import read_tables

PAGE = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text(encoding="utf-8")
PREFIX = "python -m torchrec_deepfm "


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measured: list[str] = []
    monkeypatch.setattr(ExperimentCommand, "run", lambda self: measured.append(read_tables(self.tables)[0].name))
    monkeypatch.setattr(CalibrateCommand, "run", lambda self: Path(self.output).write_text('base = "cpu"\n'))
    [tables] = re.findall(r"^```csv\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    Path("tables.csv").write_text(tables, encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line.removeprefix(PREFIX), comments=True) for line in lines if line.startswith(PREFIX)]
    assert {words[0] for words in commands} == {"plan", "synthetic", "prepare", "train", "experiment", "calibrate"}
    for words in commands:
        main(words)
    assert measured == ["user"] * sum(words[0] == "experiment" for words in commands)
    assert {"plan.json", "here.toml"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "runs" / "as_before" / "plan.json").exists()

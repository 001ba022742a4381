"""The command that repeats a run, from its own options. Loads no torch."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.formats import RunFile


def repeat_command(config: RunFile, folder: Path) -> str:
    """Return a command for a shell that trains this run again into another folder, whatever recipe it came from.

    ``folder``: the run's, whose plan is taken again if there is more than one rank.
    """
    defaults = json.loads(json.dumps(asdict(TrainConfig())))
    words = ["python", "-m", "torchrec_deepfm", "train"]
    if config.world_size > 1:
        words = ["torchrun", "--nproc-per-node", str(config.world_size), "-m", "torchrec_deepfm", "train"]
    words += ["--data", config.data, "--output", f"{folder}-again", "--recipe", "paper"]
    if config.world_size > 1:
        words += ["--plan", str(folder / run_folder.PLAN)]
    for name, value in config.config.items():
        if value != defaults.get(name):
            words += _words(name.replace("_", "-"), value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    """An option as the command line takes it."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]

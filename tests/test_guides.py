"""The commands of the guides, read as they are typed: options of TorchX, of the component and of the command."""

import re
import shlex
from pathlib import Path

import pytest
from torchx.schedulers import get_scheduler_factories
from torchx.specs.builders import materialize_appdef

from tests.launch.test_apps import COMPONENTS, deepfm
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.recipes import DATA

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDES = ["containers.md", "criteo-terabyte.md", "object-storage.md", "preemption.md", "slurm.md", "training.md"]
# What belongs to others, and to the shell.
FOREIGN = {"docker", "hf", "kubectl", "sbatch", "scancel", "sky"}


def commands(page: str) -> list[list[str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [words for line in found.splitlines() if (words := shlex.split(line, comments=True))]


def read(words: list[str]) -> str:
    """Parse a command with everything that would read it; return what it starts."""
    match words:
        case ["python", "-m", "torchrec_deepfm", *rest]:
            cli.parse(rest)
            return rest[0]
        case ["torchx", "run", *rest]:
            at = next(i for i, word in enumerate(rest) if word.startswith("apps/deepfm.py"))
            of_run = dict(zip(rest[:at:2], rest[1:at:2], strict=True))
            assert of_run.keys() <= {"-s", "-cfg", "--workspace"}, of_run
            assert of_run.get("-s", "local_cwd") in get_scheduler_factories()
            component = rest[at].partition(":")[2] or deepfm.DEFAULT_COMPONENT
            assert component in COMPONENTS, component
            separator = rest.index("--")
            materialize_appdef(getattr(deepfm, component), rest[at + 1 :])
            cli.parse([component, *rest[separator + 1 :]])
            return component
        case ["torchx", "status" | "log" | "tracker", *_]:
            return "torchx"
        case [program, *_]:
            assert program in FOREIGN, words
            return program
    raise AssertionError(words)


@pytest.mark.parametrize("page", GUIDES)
def test_every_command_of_a_guide_is_read(page: str) -> None:
    found = [read(words) for words in commands(page)]
    assert len(found) > 3


def test_a_wrong_option_is_seen() -> None:
    with pytest.raises(UserError, match="--batchsize"):
        read(shlex.split("torchx run apps/deepfm.py:train -j 1x8 -- --data x --batchsize 3"))
    with pytest.raises(SystemExit):
        read(shlex.split("torchx run apps/deepfm.py:train -j 1x8 --max-restart 3 -- --data x"))
    with pytest.raises(AssertionError):
        read(["torchx", "run", "-s", "slrum", "apps/deepfm.py", "--"])


def test_the_terabyte_guide_is_the_recipe_that_the_dry_run_follows() -> None:
    """tests/test_dry_runs.py prepares small days and trains on them as the recipe documents it."""
    found = {words[2].partition(":")[2]: words[words.index("--") + 1 :] for words in commands("criteo-terabyte.md")
             if words[:2] == ["torchx", "run"]}  # fmt: skip
    documented = [{"DAYS": "raw"}.get(word, word) for word in DATA["criteo-terabyte"].prepare.split()[1:]]
    assert sorted(found["prepare"]) == sorted(documented)
    assert found["train"][:2] == ["--recipe", "criteo-terabyte"]
    assert DATA["criteo-terabyte"].folder in found["train"]

"""The steps of Dockerfile, run one after the other in an empty folder: no daemon builds images where the tests run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APP = "/opt/torchrec_deepfm"


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def test_the_context_has_what_is_copied_and_not_the_environment() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name, words in instructions((ROOT / "Dockerfile").read_text()):
        if name == "COPY":
            for source in words.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


@pytest.mark.campaign
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image has Python 3.11")
def test_the_steps_of_the_image_give_a_command_that_runs(tmp_path: Path) -> None:
    here = tmp_path / "app"
    home = tmp_path / "home"
    here.mkdir()
    home.mkdir()
    env = {"PATH": f"{Path(sys.executable).resolve().parent}:{os.defpath}", "HOME": str(home), "DEVICE": "cpu"}
    folder = here
    for name, words in instructions((ROOT / "Dockerfile").read_text()):
        if name == "COPY":
            *sources, target = words.split()
            for source in sources:
                copy = here / (target if len(sources) == 1 else f"{target}/{source}")
                copy.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, copy)
        elif name == "RUN" and "useradd" not in words:
            command = words.replace(APP, str(here)).replace("python ", f"{shlex.quote(sys.executable)} ", 1)
            done = subprocess.run(
                ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        elif name == "ENV":
            for one in words.replace(APP, str(here)).split():
                key, _, value = one.partition("=")
                env[key] = value.replace("$PATH", env["PATH"])
        elif name == "WORKDIR":
            folder = here if words == APP else home
    shown = subprocess.run(["torchrec-deepfm", "--help"], cwd=home, env=env, capture_output=True, text=True, check=True)
    assert "usage: " in shown.stdout
    (package,) = {path.parent for path in here.glob(".venv/lib/*/site-packages/torchrec_deepfm/deepfm.py")}
    assert not (package / "deepfm.py").is_symlink()
    asked = ["torchx", "run", "torchrec_deepfm.deepfm:nothing"]
    refused = subprocess.run(asked, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    job = ["torchx", "run", "torchrec_deepfm.deepfm:train", "--", "--help"]
    trained = subprocess.run(job, cwd=home, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert trained.returncode == 0, trained.stderr
    assert "--batch-size" in trained.stderr
    for tool in ("pytest", "mypy"):
        assert not (here / ".venv" / "bin" / tool).exists()

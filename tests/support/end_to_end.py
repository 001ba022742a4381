"""A copy of the repository in which commands run as a user types them."""

import os
import runpy
import shutil
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = (".venv", ".git", "data", "runs", "*_cache", ".hypothesis", "__pycache__", "*.egg-info", ".parts*")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A copy of the repository, as `make setup` leaves it."""

    folder: Path

    @classmethod
    def copy(cls, folder: Path) -> "Workspace":
        def left_out(directory: str, names: list[str]) -> set[str]:
            top = LEFT_OUT if Path(directory) == ROOT else [name for name in LEFT_OUT if name not in ("data", "runs")]
            return shutil.ignore_patterns(*top)(directory, names)

        shutil.copytree(ROOT, folder, ignore=left_out)
        make_environment(folder)
        workspace = cls(folder=folder)
        done = workspace.run("make setup")
        assert (done.returncode, done.stdout) == (0, ""), f"it is not seen as done:\n{done.stdout}{done.stderr}"
        return workspace

    def run(self, command: str, timeout: float = 900.0) -> subprocess.CompletedProcess[str]:
        """Run a line in bash, with the environment on the path and nothing of this test's own settings."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTEST", "TORCH", "OMP", "POLARS", "MAKE", "ARGS"))
        }
        environment["PATH"] = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout
        )


def make_environment(folder: Path) -> None:
    """Make .venv with the packages of the environment that runs the tests, and this copy in place of the repository.

    An environment out of nothing is made by `make setup`, the first step of .ci/run, and by test_container.py.
    """
    here = folder / ".venv"
    venv.create(here, symlinks=True)
    packages = Path(site.getsitepackages([str(here)])[0])
    # Of the packages' own .pth files, which name the repository, none is read: they are not in a site folder here.
    (packages / "tests.pth").write_text(f"{folder}\n{Path(pytest.__file__).parents[1]}\n")
    front = f"#!{sys.prefix}/bin/python"
    for script in (Path(sys.prefix) / "bin").iterdir():
        if script.is_file() and script.read_bytes().startswith(front.encode()):
            (here / "bin" / script.name).write_text(script.read_text().replace(front, f"#!{here}/bin/python", 1))
            (here / "bin" / script.name).chmod(0o755)
    setup = runpy.run_path(str(folder / ".ci" / "setup.py"))
    device = setup["chosen_device"]()
    setup["DEVICE"].write_text(device)
    setup["STAMP"].write_text(setup["fingerprint_of"](device))

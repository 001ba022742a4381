"""A copy of the repository in which commands run as a user types them."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = (".venv", ".git", "data", "runs", "*_cache", ".hypothesis", "__pycache__", "*.egg-info", ".parts*")


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A copy of the repository, with an environment of its own that `make setup` prepared there."""

    folder: Path

    @classmethod
    def copy(cls, folder: Path) -> "Workspace":
        def left_out(directory: str, names: list[str]) -> set[str]:
            top = LEFT_OUT if Path(directory) == ROOT else [name for name in LEFT_OUT if name not in ("data", "runs")]
            return shutil.ignore_patterns(*top)(directory, names)

        shutil.copytree(ROOT, folder, ignore=left_out)
        workspace = cls(folder=folder)
        done = workspace.run("make setup")
        assert done.returncode == 0, done.stdout + done.stderr
        return workspace

    def run(self, command: str, timeout: float = 900.0) -> subprocess.CompletedProcess[str]:
        """Run a line in bash, with the environment on the path and nothing of this test's own settings."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTEST", "TORCH", "OMP", "MAKE", "ARGS"))
        }
        environment["PATH"] = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout
        )

"""Starting and stopping jobs of the tests of faults."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.fork import ROOT, Fork

OPTIONS = [
    "--recipe", "paper",
    "--factor-dim", "4", "--over-arch-layer-sizes", "16", "8", "--dropout", "0.2", "--batch-norm", "--epochs", "2",
    "--data-parallel-rows", "20", "--warmup", "0.1", "--decay", "0.5", "--eval-every", "15", "--checkpoint-every", "4",
    "--ema", "0.9", "--ema-every", "3", "--clip-norm", "0.5", "--max-ne", "inf",
]  # fmt: skip
GLOBAL_BATCH = 100
STEPS = 40


def command(data: Path, run: Path, *, ranks: int = 1, restarts: int = 0, options: tuple[str, ...] = ()) -> list[str]:
    """A training on some ranks; on one without torchrun unless it is to be restarted."""
    front = []
    if restarts or ranks > 1:
        front = ["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", str(ranks)]
        front += ["--max_restarts", str(restarts), "--shutdown_timeout", "3", "-m"]
    words = ["--data", str(data), "--output", str(run), *OPTIONS, "--batch-size", str(GLOBAL_BATCH // ranks)]
    return [*front, "tests.faults.rank", *words, *options]


def environment(logs: Path, faults: list[dict[str, Any]] | None = None, **more: str) -> dict[str, str]:
    """For a job whose ranks log below ``logs``."""
    logs.mkdir(exist_ok=True, parents=True)
    own = {"FAULTS_LOG": str(logs), "FAULTS": json.dumps(faults or []), "OMP_NUM_THREADS": "1"}
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | own | more


class Lines:
    """What a process has written so far, in files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        for path in (self._out, self._err):
            path.touch()

    @property
    def out(self) -> str:
        """All of standard output: of this process, and of those before it in the same folder."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """The same of standard error."""
        return self._err.read_text(errors="replace")


class Job(Lines):
    """A running training: torchrun's process, or that of the only rank."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        super().__init__(Path(self._folder.name))
        self._process = Fork(words, env=env, stdout=self._out, stderr=self._err)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.poll()

    def processes(self) -> list[int]:
        """This process and the ranks that it has started."""
        return self._process.family()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(15)
                raise AssertionError(f"it hangs:\n{self.out[-3000:]}\n{self.err[-3000:]}")
            time.sleep(0.01)
        found = self._process.wait(), self.out, self.err
        self._folder.cleanup()
        return found


def start(words: list[str], env: dict[str, str]) -> Job:
    return Job(words, env)


def run(words: list[str], env: dict[str, str], timeout: float = 240) -> tuple[int, str, str]:
    return start(words, env).finish(timeout)

"""Starting and stopping jobs of the tests of faults."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--factor-dim", "4", "--over-arch-layer-sizes", "16", "8", "--dropout", "0.2", "--batch-norm", "--epochs", "2",
    "--data-parallel-rows", "20", "--warmup", "0.1", "--decay", "0.5", "--eval-every", "15", "--checkpoint-every", "4",
    "--ema", "0.9", "--ema-every", "3", "--clip-norm", "0.5",
]  # fmt: skip
GLOBAL_BATCH = 100
STEPS = 40


def command(data: Path, run: Path, *, ranks: int = 1, restarts: int = 0, options: tuple[str, ...] = ()) -> list[str]:
    """A training on some ranks; on one without torchrun unless it is to be restarted."""
    front = []
    if restarts or ranks > 1:
        front = [sys.executable, "-m", "torchrec_deepfm.launch", "--standalone", "--nproc_per_node", str(ranks)]
        front += ["--max_restarts", str(restarts), "--shutdown_timeout", "3", "-m", "tests.faults.rank"]
    words = ["--data", str(data), "--output", str(run), *OPTIONS, "--batch-size", str(GLOBAL_BATCH // ranks)]
    return [*front, *words, *options]


def environment(logs: Path, faults: list[dict[str, Any]] | None = None, **more: str) -> dict[str, str]:
    """For a job whose ranks log below ``logs``."""
    logs.mkdir(exist_ok=True, parents=True)
    own = {"FAULTS_LOG": str(logs), "FAULTS": json.dumps(faults or []), "OMP_NUM_THREADS": "1"}
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | own | more


class Job:
    """A running training: torchrun's process, or that of the only rank."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._folder.name) / "out", Path(self._folder.name) / "err"
        self._process: subprocess.Popen[bytes] | None = None
        if words[0] == sys.executable:
            with self._out.open("wb") as out, self._err.open("wb") as err:
                self._process = subprocess.Popen(
                    words, stdout=out, stderr=err, cwd=ROOT, env=env, start_new_session=True
                )
            self.pid = self._process.pid
        else:
            job = {"argv": words, "env": env, "out": str(self._out), "err": str(self._err)}
            self.pid = _Zygote.ask({"start": job})["pid"]
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self._code is None:
            if self._process is not None:
                self._code = self._process.poll()
            else:
                self._code = _Zygote.ask({"wait": self.pid, "block": False})["code"]
        return self._code

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
        assert self._code is not None
        found = self._code, self.out, self.err
        self._folder.cleanup()
        return found

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")


class _Zygote:
    process: "subprocess.Popen[str] | None" = None

    @classmethod
    def ask(cls, request: dict[str, Any]) -> dict[str, Any]:
        if cls.process is None:
            cls.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.faults.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            atexit.register(cls.process.terminate)
        assert cls.process.stdin is not None
        assert cls.process.stdout is not None
        cls.process.stdin.write(json.dumps(request) + "\n")
        cls.process.stdin.flush()
        return json.loads(cls.process.stdout.readline())  # type: ignore[no-any-return]


def start(words: list[str], env: dict[str, str]) -> Job:
    return Job(words, env)


def run(words: list[str], env: dict[str, str], timeout: float = 240) -> tuple[int, str, str]:
    return start(words, env).finish(timeout)

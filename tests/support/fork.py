"""Processes that start in milliseconds: forks of a server that has imported torch, TorchRec and this package once.

    job = Fork(["torchrec_deepfm", "train", ...], env=os.environ, stdout=path, stderr=path)  # `python -m`, as a fork
    job = Fork(["script.py", ...], ...)  # `python script.py`

The server is multiprocessing's own. Each fork is a process like any other: with a session of its own, to be killed and
waited for, with its own gloo. The server forks while no thread runs in it that may hold a lock (`preload.py` checks
that), since threads do not survive a fork and their locks are never released. What a fork can not show is how Python
itself starts: `-m`, warnings while importing, `PYTHON...` variables. The tests of these use subprocess.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver, process, spawn
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
# What the server sets once for all, since these are read when torch is loaded.
SERVER_ENV = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LAUNCHER = "FORK_LAUNCHER"  # in the environment of torchelastic's ranks: the process that started them

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])
# A fork needs nothing of the module that its parent runs as `__main__`, which multiprocessing would run again.
_prepare = spawn.get_preparation_data
spawn.get_preparation_data = lambda name: {key: v for key, v in _prepare(name).items() if "main" not in key}
_own_output: tuple[Path, Path] | None = None  # in a fork: its standard output and error, which its own forks inherit


class Fork:
    """``python -m <words>`` or ``python <file> <words>``, with what torchelastic and the tests need of Popen."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: Path | None = None,
        stderr: Path | None = None,
        cwd: Path = ROOT,
    ) -> None:
        own_stdout, own_stderr = _own_output or (Path(os.devnull), Path(os.devnull))
        self.args = list(words)
        self._stdout = (stdout or own_stdout).resolve()
        arguments = (self.args, dict(env), self._stdout, stderr or own_stderr, cwd)
        self._process = _context.Process(target=_run, args=arguments, daemon=True)
        if _own_output is None:
            with mock.patch.dict(os.environ, SERVER_ENV):
                forkserver.ensure_running()
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal, once it is known to have ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def family(self) -> list[int]:
        """This process and all that write into its output: torchelastic's ranks and theirs."""
        found = []
        for link in Path("/proc").glob("[0-9]*/fd/1"):
            try:
                if link.readlink() == self._stdout:
                    found.append(int(link.parent.parent.name))
            except OSError:  # it has ended
                continue
        return found

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # the server has just reaped it
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def end_without_cleaning() -> None:
    """At its end this process frees no memory: that takes seconds, and DuckDB lists what is frozen (``gc.freeze``)."""
    this = os.getpid()
    atexit.register(lambda: os._exit(0) if os.getpid() == this else None)


def _run(words: Sequence[str], env: Mapping[str, str], stdout: Path, stderr: Path, cwd: Path) -> None:
    """Become that process: in the fork."""
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from tests.support.pictures import undrawn

    global _own_output
    _own_output = stdout, stderr
    os.setsid()
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    # This process may have forks of its own, out of the same server: torchelastic's ranks.
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign, assignment]
    sys.argv = list(words)
    sys.modules.pop(words[0], None)  # or runpy warns that it is imported already
    try:
        with undrawn():
            if words[0].endswith(".py"):
                sys.path.insert(0, str(Path(words[0]).resolve().parent))
                runpy.run_path(words[0], run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _fork_rank(handler: "object", args: Sequence[str], env: Mapping[str, str]) -> Fork:
    """Start a rank for torchelastic, in place of ``python -u -m <words>`` or ``python -u <file> <words>``."""
    assert args[:2] == (sys.executable, "-u"), args
    words = args[3:] if args[2] == "-m" else args[2:]
    redirected = {
        name: Path(file.name) for name in ("stdout", "stderr") if (file := getattr(handler, f"_{name}")) is not None
    }
    return Fork(words, env={**env, LAUNCHER: str(os.getpid())}, **redirected)

"""Runs a script of benchmarks/ in this process, with words as on its command line. No test itself.

A fork of ``forked`` that is given a standard input runs this file: the named pipe to read, then a module and its words.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import tyro

from tests.support.fork import Fork
from tests.support.ranks import run_module


def run(script: ModuleType, *words: object) -> None:
    """Read the words as the script does and run its `main`."""
    script.main(tyro.cli(script.Options, args=[str(word) for word in words]))


@contextmanager
def forked(*modules: ModuleType) -> Iterator[None]:
    """Where these modules run ``python -m``, fork a process that has imported torch: it starts in milliseconds."""

    def run_or_fork(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        if command[:2] != [sys.executable, "-m"]:
            return subprocess.run(command, **options)
        done = run_module(command[2:], **options["env"])
        if options.get("check"):
            done.check_returncode()
        return done

    with ExitStack() as stack:
        for module in modules:
            forks = {"run": run_or_fork, "Popen": PipedFork}
            stack.enter_context(mock.patch.object(module, "subprocess", SimpleNamespace(**vars(subprocess) | forks)))
        yield


class PipedFork(Fork):
    """``[env NAME=value ...] python -m <words>``, with pipes to its input and output where a pipe is asked for."""

    def __init__(
        self,
        command: list[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int | None = None,
        **_: Any,
    ) -> None:
        start = command.index(sys.executable)
        assert command[start + 1] == "-m", command
        env = {**env, **dict(word.split("=", 1) for word in command[1:start])}
        words = command[start + 2 :]
        if stdout != subprocess.PIPE:
            super().__init__(words, env=env)
            return
        with tempfile.TemporaryDirectory() as name:
            into, out = Path(name) / "in", Path(name) / "out"
            os.mkfifo(into)
            os.mkfifo(out)
            super().__init__([__file__, str(into), *words], env=env, stdout=out)
            self.stdout = out.open()  # each waits for the fork to open the other end
            self.stdin = into.open("w")


if __name__ == "__main__":
    _, pipe, *sys.argv = sys.argv
    with Path(pipe).open() as sys.stdin:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

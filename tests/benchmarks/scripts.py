"""Runs a script of benchmarks/ in this process, with words as on its command line. No test itself."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import tyro

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
            stack.enter_context(
                mock.patch.object(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": run_or_fork}))
            )
        yield

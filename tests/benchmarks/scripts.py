"""Runs a script of benchmarks/ in this process, with words as on its command line. No test itself."""

from types import ModuleType

import tyro


def run(script: ModuleType, *words: object) -> None:
    """Read the words as the script does and run its `main`."""
    script.main(tyro.cli(script.Options, args=[str(word) for word in words]))

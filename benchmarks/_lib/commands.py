"""Starts modules of benchmarks/ and commands of torchrec_deepfm in processes of their own, and makes their folders."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Not every library derives its number of threads from the process's affinity.
_THREAD_POOLS = ("POLARS_MAX_THREADS", *(f"{name}_NUM_THREADS" for name in ("ARROW", "MKL", "OMP", "OPENBLAS")))


def module_command(module: str, *words: object, python: Path | str = sys.executable) -> list[str]:
    """Return the command line of `python -m MODULE WORDS`; run it with ``environment()``."""
    return [str(word) for word in (python, "-m", module, *words)]


def environment(threads: int | None = None) -> dict[str, str]:
    """Return this process's variables with the repository's root on PYTHONPATH.

    A peer's interpreter finds ``benchmarks`` there too.

    Args:
        threads: Size of the usual thread pools; None leaves them as they are.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    pools = {} if threads is None else dict.fromkeys(_THREAD_POOLS, str(threads))
    return {**os.environ, **pools, "PYTHONPATH": path}


def torchrec_deepfm(*words: object, show: bool = False) -> None:
    """Run a command of the package.

    Args:
        words: Command and options.
        show: Print its output while it runs; otherwise the output is printed only after a failure.

    Raises:
        SystemExit: The command failed.
    """
    command = module_command("torchrec_deepfm", *words)
    done = subprocess.run(command, capture_output=not show, text=True, check=False, env=environment())
    if done.returncode:
        output = "" if show else f"\n{done.stdout}{done.stderr}"
        raise SystemExit(f"{' '.join(command[2:])}: exit code {done.returncode}{output}")


@contextmanager
def working_folder(given: Path | None, prefix: str) -> Iterator[Path]:
    """Yield the given folder, which is kept, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        yield Path(name)

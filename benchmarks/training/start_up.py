"""How long commands take before they do anything: their help, imports, and a training until its first step.

    python -m benchmarks.training.start_up

Processes by turns, so that other load meets all of them; medians of wall and CPU seconds. What `import torch` and
TorchRec take themselves stands beside: the rest is this package's.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks._lib.commands import environment, module_command, torchrec_deepfm, working_folder
from benchmarks._lib.formatting import markdown, versions, versions_line

# Prints what it took itself: beside torch's seconds, a difference of two processes would drown.
OWN_IMPORT = """
import time, torch
wall, cpu = time.perf_counter(), time.process_time()
import torchrec_deepfm
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
LIBRARIES = "import torch, torch.distributed.checkpoint, torchrec, torchrec.distributed.planner"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    runs: int = 5
    """Processes of each kind."""
    first_step_of: Path | None = None
    """Only for a process of its own: train on this prepared folder and end after the first step."""


def main(options: Options) -> None:
    if options.first_step_of is not None:
        end_after_a_step(options.first_step_of)
        return
    with working_folder(None, "start_up_") as folder:
        torchrec_deepfm("synthetic", "--output", folder / "raw", "--rows", 20_000)
        days = sorted((folder / "raw").glob("day_*"))
        torchrec_deepfm("prepare", "--input", *days, "--output", folder / "data")
        first_step = ("--first-step-of", folder / "data")
        kinds = {
            "Python alone": [sys.executable, "-c", "pass"],
            "--help": module_command("torchrec_deepfm", "--help"),
            "train --help": module_command("torchrec_deepfm", "train", "--help"),
            "import torch": [sys.executable, "-c", "import torch"],
            "import torchrec_deepfm, after torch": [sys.executable, "-c", OWN_IMPORT],
            "import torch, TorchRec": [sys.executable, "-W", "ignore", "-c", LIBRARIES],
            "train, until the end of the first step": module_command("benchmarks.training.start_up", *first_step),
        }
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.runs):
            for kind, command in kinds.items():
                taken[kind].append(timed(command))
    rows = [
        (kind, *(f"{statistics.median(each):.3f}" for each in zip(*runs, strict=True))) for kind, runs in taken.items()
    ]
    print(markdown(("process", "wall, s", "CPU, s"), rows))
    print(versions_line(versions("torch", "torchrec")))


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process that has to succeed, or those that it prints."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if command[-1] == OWN_IMPORT:
        wall, cpu = map(float, done.stdout.split())
        return wall, cpu
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def end_after_a_step(data: Path) -> None:
    from torchrec_deepfm.cli.main import main as run_command
    from torchrec_deepfm.training.loop import Loop

    step = Loop._step

    def only(loop: Loop, batches: Any) -> None:
        step(loop, batches)
        os._exit(0)

    Loop._step = only  # type: ignore[method-assign]
    run_command(["train", "--data", str(data), "--output", str(data / "run"), "--recipe", "paper"])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

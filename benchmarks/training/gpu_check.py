"""Everything that only a machine with a GPU can show, in one go, with one report.

    make gpu-check
    python -m benchmarks.training.gpu_check --device cpu --output check.md  # the same steps, small

The doctor, the model against its equations on the device, a training with a rank per GPU through NCCL, the same killed
and resumed, an experiment that measures plans, and the speed of a step. A step that fails does not stop the others.
Exit code 0 if all passed, 1 if one failed, 2 without a GPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks._lib.commands import ROOT, environment, module_command, working_folder
from benchmarks._lib.formatting import markdown, versions_line

CLOSE = 1e-3
"""Largest difference of AUC and logloss after a kill on a GPU, whose sums have no fixed order; 0 on a CPU."""
TAIL = 40  # lines of a step's output in the report


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu runs the same steps, small."""
    ranks: int | None = None
    """Ranks of the trainings and the experiment. Default: a rank per GPU; two on cpu."""
    output: Path = Path("gpu_check.md")
    """The report."""
    folder: Path | None = None
    """Keep data and runs here. Default: a temporary folder."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of the check.

    Attributes:
        title: In the report.
        work: Does it; returns what to show. Raises ``FailedError``.
    """

    title: str
    work: Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        title: Of the step.
        passed: Whether it passed.
        seconds: What it took.
        text: Its output, or what went wrong.
    """

    title: str
    passed: bool
    seconds: float
    text: str


class FailedError(Exception):
    """A step has failed; the text goes into the report."""


@dataclass(kw_only=True)
class Check:
    """The steps on a device.

    Attributes:
        device: ``cuda`` or ``cpu``.
        ranks: Of trainings and experiment.
        folder: For data and runs.
        run: Runs a command to its end; returns its output. Raises ``FailedError``.
        run_and_kill: Runs a command, kills it once a condition holds.
    """

    device: str
    ranks: int
    folder: Path
    run: Callable[[Sequence[str], Mapping[str, str]], str] = field(default_factory=lambda: _run)
    run_and_kill: Callable[[Sequence[str], Mapping[str, str], Callable[[], bool]], str] = field(
        default_factory=lambda: _run_and_kill
    )

    def steps(self) -> Iterator[Step]:
        """Yield the steps in their order."""
        yield Step(title="Doctor", work=lambda: self._command("torchrec_deepfm", "doctor"))
        yield Step(title="The model against its equations", work=self._tests)
        yield Step(title=f"A training on {self.ranks} rank(s)", work=self._train)
        yield Step(title="The same training, killed and resumed", work=self._resume)
        yield Step(title="An experiment", work=self._experiment)
        yield Step(title="Speed of a step", work=self._speed)

    @property
    def _variables(self) -> dict[str, str]:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return environment() | hidden | {"TEST_DEVICE": self.device}

    def _command(self, *words: object) -> str:
        return self.run(module_command(*map(str, words)), self._variables)

    def _tests(self) -> str:
        return self._command("pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_on_device.py")

    def _training(self, output: Path) -> list[str]:
        data = self.folder / "data" / "prepared"
        if not (data / "manifest.json").exists():
            rows = 1_000_000 if self.device == "cuda" else 20_000
            raw = self.folder / "data" / "raw"
            self._command("torchrec_deepfm", "synthetic", "--rows", rows, "--output", raw)
            self._command("torchrec_deepfm", "prepare", "--input", *sorted(raw.glob("day_*.tsv")), "--output", data,
                          "--validation", raw / "validation.tsv", "--test", raw / "test.tsv")  # fmt: skip
        every, size = (20, 8192) if self.device == "cuda" else (10, 256)
        launcher = ("torchrec_deepfm.launch", "--standalone", "--nproc_per_node", str(self.ranks))
        words = ("train", "--data", data, "--output", output, "--recipe", "paper", "--batch-size", size,
                 "--checkpoint-every", every)  # fmt: skip
        return module_command(*launcher, "-m", "torchrec_deepfm", *map(str, words))

    def _train(self) -> str:
        return self.run(self._training(self.folder / "whole"), self._variables)

    def _resume(self) -> str:
        from torchrec_deepfm.training.checkpoint.store import MANIFEST

        whole, killed = self.folder / "whole", self.folder / "killed"
        if not (whole / "summary.json").exists():
            raise FailedError("needs the training before, which did not end")
        command = self._training(killed)
        found = self.run_and_kill(
            command, self._variables, lambda: any((killed / "checkpoints").glob(f"step_*/{MANIFEST}"))
        )
        if (killed / "summary.json").exists():
            raise FailedError("the training ended before it was killed; nothing was resumed")
        found += self.run(command, self._variables)
        if "Resuming from step" not in found:
            raise FailedError(f"{found}\nthe second start did not resume")
        largest = max(
            abs(one[split][metric] - other[split][metric])
            for one, other in [[json.loads((run / "summary.json").read_text()) for run in (whole, killed)]]
            for split in ("validation", "test")
            for metric in ("auc", "logloss")
        )
        if largest > (CLOSE if self.device == "cuda" else 0.0):
            raise FailedError(f"{found}\nAUC or logloss differ by {largest:g} from the training that was not killed")
        return f"{found}\nlargest difference of AUC and logloss from the training that was not killed: {largest:g}"

    def _experiment(self) -> str:
        tables = self.folder / "tables.csv"
        rows, batch = (1_000_000, 8192) if self.device == "cuda" else (1000, 64)
        lines = [f"t{i},{rows // 4**i},16" for i in range(4)]
        tables.write_text("\n".join(["name,num_embeddings,embedding_dim", *lines]) + "\n", encoding="utf-8")
        words = [
            "--tables",
            tables,
            "--batch-size",
            batch,
            "--ranks",
            self.ranks,
            "--output",
            self.folder / "experiment",
        ]
        if self.device == "cpu":
            words += ["--steps", 2, "--turns", 1]
        return self._command("torchrec_deepfm", "experiment", *words)

    def _speed(self) -> str:
        words: list[object] = ["--device", self.device]
        if self.device == "cpu":
            words += ["--rows", 26_000, "--batch-size", 64, "--factor-dim", 3, "--windows", 1, "--seconds", 0.2]
            words += ["--retries", 0, "--sides", "float32", "dlrm-float32", "plain-float32"]
        return self._command("benchmarks.training.speed", *words)


def check(steps: Sequence[Step] | Iterator[Step], say: Callable[[str], None] = print) -> list[Outcome]:
    """Do the steps, each whatever came of those before; return what came of them."""
    outcomes = []
    for step in steps:
        started = time.perf_counter()
        try:
            passed, text = True, step.work()
        except (FailedError, OSError, ValueError, KeyError) as error:
            passed, text = False, str(error) or type(error).__name__
        outcomes.append(
            Outcome(title=step.title, passed=passed, seconds=time.perf_counter() - started, text=text.strip())
        )
        say(f"{step.title}: {'passed' if passed else 'FAILED'} in {outcomes[-1].seconds:.0f} s")
    return outcomes


def report(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> str:
    """Lay out the report, a table of the steps before the end of each one's output."""
    rows = [[one.title, "passed" if one.passed else "**failed**", f"{one.seconds:.0f}"] for one in outcomes]
    parts = ["# GPU check", versions_line({name: str(value) for name, value in about.items()})]
    parts.append(markdown(["step", "outcome", "seconds"], rows))
    for one in outcomes:
        tail = "\n".join(one.text.splitlines()[-TAIL:])
        parts.append(f"## {one.title}\n\n```text\n{tail}\n```")
    return "\n\n".join(parts) + "\n"


def main(options: Options) -> None:
    """Run the check and write the report."""
    import torch

    from torchrec_deepfm.training.run.folder import versions

    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.stderr.write(
            "error: gpu-check: torch finds no GPU here; run it on a machine with one, or add --device cpu\n"
        )
        sys.exit(2)
    ranks = options.ranks or (torch.cuda.device_count() if cuda else 2)
    about = {"device": torch.cuda.get_device_name(0) if cuda else "cpu", "ranks": ranks, **versions()}
    with working_folder(options.folder, "gpu_check_") as folder:
        outcomes = check(Check(device=options.device, ranks=ranks, folder=folder.resolve()).steps())
    options.output.write_text(report(outcomes, about), encoding="utf-8")
    print(f"wrote {options.output}")
    sys.exit(0 if all(one.passed for one in outcomes) else 1)


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=dict(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise FailedError(f"{done.stdout}\nexit code {done.returncode}: {' '.join(command[1:])}")
    return done.stdout


def _run_and_kill(command: Sequence[str], variables: Mapping[str, str], due: Callable[[], bool]) -> str:
    """Kill a command and its ranks, without a warning, once ``due()``; or let it end."""
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not due() and job.poll() is None:
            time.sleep(0.05)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    return f"killed with exit code {job.returncode}\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

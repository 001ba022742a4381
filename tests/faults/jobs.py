"""Starting and stopping jobs of the tests of faults."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--factor-dim", "4", "--over-arch-layer-sizes", "16", "8", "--dropout", "0.2", "--batch-norm", "--epochs", "2",
    "--data-parallel-rows", "20", "--warmup", "0.1", "--decay", "0.5", "--eval-every", "15", "--checkpoint-every", "4",
]  # fmt: skip
GLOBAL_BATCH = 100
STEPS = 40


def command(data: Path, run: Path, *, ranks: int = 1, restarts: int = 0, options: tuple[str, ...] = ()) -> list[str]:
    """A training on some ranks; on one without torchrun unless it is to be restarted."""
    launcher = ["-m", "torchrec_deepfm.launch", "--standalone", "--nproc_per_node", str(ranks)]
    launcher += ["--max_restarts", str(restarts), "-m"] if restarts or ranks > 1 else []
    front = launcher if restarts or ranks > 1 else ["-m"]
    words = [*front, "tests.faults.rank", "--data", str(data), "--output", str(run)]
    return [sys.executable, *words, *OPTIONS, "--batch-size", str(GLOBAL_BATCH // ranks), *options]


def environment(logs: Path, faults: list[dict[str, Any]] | None = None, **more: str) -> dict[str, str]:
    """For a job whose ranks log below ``logs``."""
    logs.mkdir(exist_ok=True, parents=True)
    own = {"FAULTS_LOG": str(logs), "FAULTS": json.dumps(faults or []), "OMP_NUM_THREADS": "1"}
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | own | more


def start(words: list[str], env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env, start_new_session=True
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 240) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"it hangs:\n{out[-3000:]}\n{err[-3000:]}") from None
    return process.returncode, out, err


def run(words: list[str], env: dict[str, str], timeout: float = 240) -> tuple[int, str, str]:
    return finish(start(words, env), timeout)

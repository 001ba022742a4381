"""Runs one training in a process of its own and keeps its result.

A result is in ``OUTPUT/results/<data set>/<model>/<seed>.json`` with its settings and the checksum of its data. An
interrupted benchmark resumes: a training with the same settings and data is not repeated.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._lib.commands import environment, module_command
from benchmarks._lib.peer_environments import peer_python

# Result files keep the names that workers and variants had first, so that old results are still found.
_SAVED_WORKERS = {"train_deepfm": "quality_ours.py", "train_simple_deepfm": "quality_torchrec.py"}
_SAVED_VARIANTS = {
    "published settings": "its own",
    "default settings": "its own",
    "same settings": "as ours",
    "unchanged": "as is",
    "loss corrected": "loss fixed",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training: worker, data, settings and seed.

    ``worker`` is a module beside this one that takes DATA RESULT.json SETTINGS.json SEED. ``environment`` names the
    peer's environment that runs it; if it is empty, the running interpreter does.
    """

    data: Path
    model: str
    worker: str
    settings: dict[str, Any]
    seed: int
    environment: str = ""


def kept_result(job: Job, output: Path) -> dict[str, Any] | None:
    """Return the result of an earlier run of this training; None if there is none."""
    path, asked = _place(job, output)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(kept) if kept.get("asked") == asked else None


def _place(job: Job, output: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path of a training's result, and the description of the training that it holds."""
    base, _, variant = job.model.partition(", ")
    model = ", ".join(filter(None, [base, _SAVED_VARIANTS.get(variant, variant)]))
    name = re.sub(r"[^A-Za-z0-9.]+", "_", model).strip("_")
    manifest = json.loads((job.data / "manifest.json").read_text(encoding="utf-8"))
    worker = _SAVED_WORKERS.get(job.worker, job.worker.replace("train_", "quality_") + ".py")
    asked = json.loads(json.dumps(asdict(job) | {"data": manifest["sha256"], "model": model, "worker": worker}))
    return output / "results" / job.data.name / name / f"{job.seed}.json", asked


def result_of(job: Job, output: Path, *, cores: int = 1) -> dict[str, Any]:
    """Return the result of a training; run it unless an earlier result exists.

    Args:
        job: The training.
        output: The benchmark's folder.
        cores: Threads for it.

    Returns:
        The worker's result: ``validation`` and ``test`` with ``auc`` and ``logloss``, ``seconds``, ``versions``.

    Raises:
        SystemExit: The training failed; the end of its output is in the message.
    """
    kept = kept_result(job, output)
    if kept is not None:
        return kept
    path, asked = _place(job, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings, fresh = path.with_suffix(".settings"), path.with_suffix(".new")
    settings.write_text(json.dumps(job.settings | {"threads": cores}), encoding="utf-8")
    python = peer_python(job.environment) if job.environment else sys.executable
    command = module_command(
        f"benchmarks.quality.workers.{job.worker}", job.data, fresh, settings, job.seed, python=python
    )
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(cores))
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SystemExit(f"{job.model}, seed {job.seed}, on {job.data}: exit code {done.returncode}\n{last}")
    result = json.loads(fresh.read_text(encoding="utf-8")) | {"asked": asked}
    result["process_seconds"] = time.perf_counter() - began
    fresh.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    fresh.rename(path)
    settings.unlink()
    return result

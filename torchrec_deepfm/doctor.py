"""Checks that the installed torch, FBGEMM and TorchRec fit together and run.

The three are built against each other, which pip does not check: a mismatch shows as a missing library, a missing
operator or a crash. `check` compares the versions, then imports the three in a separate process (a library built for
another torch may crash it) and runs one operator of FBGEMM.

Standard library only: this module has to work with a broken installation.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "duckdb", "numpy")
OLDEST_TORCH = (2, 11)
TIMEOUT_SECONDS = 180

# One JSON line per stage: the first missing one has failed.
_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
def done(stage, **facts):
    print(json.dumps({"stage": stage, **facts}), flush=True)
import torch
gpus = torch.cuda.device_count()
names = [torch.cuda.get_device_name(i) for i in range(gpus)]
capabilities = ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(gpus)]
done("torch", version=torch.__version__, cuda=torch.version.cuda, gpus=gpus, names=names, capabilities=capabilities)
import fbgemm_gpu
device = "cuda" if torch.cuda.is_available() else "cpu"
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 1], device=device))
assert offsets.tolist() == [0, 2, 2, 3], offsets
done("fbgemm_gpu", device=device)
import torchrec
done("torchrec")
"""
# Beginnings of the compute capabilities that wheels of fbgemm-gpu 1.8 hold kernels for: sm_80, sm_90, sm_100, no PTX.
_FBGEMM_GENERATIONS = ("8.", "9.", "10.")
_STAGES = ("torch", "fbgemm_gpu", "torchrec")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The result of importing torch, FBGEMM and TorchRec in a separate process.

    Attributes:
        reached: the stages that were passed, of "torch", "fbgemm_gpu" (its operator ran too) and "torchrec".
        torch_version: torch's full version with its build, such as "2.13.0+cpu"; empty if torch did not load.
        cuda: the CUDA version that torch is built for; None for a CPU build.
        gpus: how many GPUs torch sees.
        names: of the GPUs.
        capabilities: of the GPUs, such as "9.0".
        error: the last line of the failing stage's output; empty if all were passed.
    """

    reached: tuple[str, ...] = ()
    torch_version: str = ""
    cuda: str | None = None
    gpus: int = 0
    names: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `check` found: versions by package ("-": not installed), and problems, each with the command to run."""

    versions: Mapping[str, str]
    problems: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 without problems, otherwise 2."""
        return 2 if self.problems else 0

    def __str__(self) -> str:
        """The whole report, a line per version and per problem."""
        width = max(map(len, self.versions))
        lines = [f"{name:<{width}}  {version}" for name, version in self.versions.items()]
        lines += [f"problem: {problem}" for problem in self.problems]
        if not self.problems:
            lines.append("torch, FBGEMM and TorchRec fit together, and an operator of FBGEMM runs.")
        return "\n".join(lines)


def check() -> Diagnosis:
    """Examines this Python's packages.

    Returns the versions and the problems; nothing is raised for a broken installation.
    """
    installed = {name: version for name in DISTRIBUTIONS if (version := _installed(name)) is not None}
    probe = run_probe()
    build = f"CUDA {probe.cuda}, GPUs: {probe.gpus}" if probe.cuda else "CPU build"
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    versions |= {name: installed.get(name, "-") for name in DISTRIBUTIONS}
    if probe.torch_version:
        versions["torch"] = f"{probe.torch_version} ({build})"
    if probe.cuda and not probe.gpus:
        versions["torch"] += "; training runs on the CPU"
    return Diagnosis(versions=versions, problems=tuple(find_problems(installed, probe)))


def find_problems(installed: Mapping[str, str], probe: Probe) -> list[str]:
    """Compares versions by the rules of the three projects.

    FBGEMM 1.X is built for torch 2.(X+5), and TorchRec 1.X for FBGEMM 1.X.

    ``installed``: version by distribution name, of those of `DISTRIBUTIONS` that are installed. Returns one line per
    problem, each with its remedy; fix the first one first.

    Example:
        >>> fine = Probe(reached=("torch", "fbgemm_gpu", "torchrec"), torch_version="2.13.0+cpu")
        >>> rest = {"torchx": "0.7.0", "duckdb": "1.4.0", "numpy": "2.3.0"}
        >>> find_problems({"torch": "2.13.0", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0", **rest}, fine)
        []
    """
    if "torch" not in installed:
        return [f"torch is not installed: {_pip('install', _needs('torch'))}"]
    torch = _numbers(probe.torch_version or installed["torch"])
    if torch < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return [f"torch {installed['torch']} is older than {oldest}: {_pip('install', '--upgrade', _needs('torch'))}"]
    if "torch" not in probe.reached:
        return [f"torch does not load ({probe.error}): {_pip('install', '--force-reinstall', _needs('torch'))}"]

    # FBGEMM's and TorchRec's 1.X for torch 2.(X+5); none is known for a torch 3.
    minor = f"1.{torch[1] - 5}" if torch[0] == 2 else None
    pin = f"=={minor}.*" if minor else ""
    problems = _fbgemm_problems(installed, probe, minor)

    torchrec = installed.get("torchrec")
    install_torchrec = _pip("install", "--no-deps", f"torchrec{pin}")  # its dependencies would install the CUDA FBGEMM
    if torchrec is None:
        if "torchrec" not in probe.reached:
            problems.append(f"torchrec is not installed: {install_torchrec}")
    elif minor and _numbers(torchrec) != _numbers(minor):
        problems.append(f"torchrec {torchrec} does not fit torch {installed['torch']}: {install_torchrec}")
    elif not problems and "torchrec" not in probe.reached:
        problems.append(f"torchrec {torchrec} does not load ({probe.error}): {_pip('install', _needs('torchrec'))}")

    problems += [
        f"{name} is not installed: {_pip('install', _needs(name))}"
        for name in ("torchx", "duckdb", "numpy")
        if name not in installed
    ]
    return problems


def _fbgemm_problems(installed: Mapping[str, str], probe: Probe, minor: str | None) -> list[str]:
    """The problem of FBGEMM, if any. Its CUDA and CPU builds fill the same folder: one problem, one repair."""
    wanted, other = ("fbgemm-gpu", "fbgemm-gpu-cpu") if probe.cuda else ("fbgemm-gpu-cpu", "fbgemm-gpu")
    spec = f"{wanted}=={minor}.*" if minor else wanted
    present = [name for name in (wanted, other) if name in installed]
    replace = f"{_pip('uninstall', '-y', *present)} && {_pip('install', '--no-deps', spec)}"
    torch = probe.torch_version
    if len(present) == 2:
        return [f"fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other: {replace}"]
    if not present:
        # A nightly or a custom build has another name, and is fine if it runs.
        runs = "fbgemm_gpu" in probe.reached
        return [] if runs else [f"FBGEMM is not installed: {_pip('install', '--no-deps', spec)}"]
    (name,) = present
    version = installed[name]
    if name == other and not probe.cuda:
        return [f"fbgemm-gpu {version} needs CUDA, but torch {torch} is a CPU build: {replace}"]
    if name == other and probe.gpus:
        return [f"fbgemm-gpu-cpu {version} has no kernels for the GPU that torch {torch} uses: {replace}"]
    if minor and _numbers(version) != _numbers(minor):
        return [f"{name} {version} is built for another torch than {torch}: {replace}"]
    for gpu, (gpu_name, capability) in enumerate(zip(probe.names, probe.capabilities, strict=True)):
        if name == "fbgemm-gpu" and not capability.startswith(_FBGEMM_GENERATIONS):
            line = f"GPU {gpu} ({gpu_name}) has compute capability {capability}, and the wheels of fbgemm-gpu hold "
            remedy = "hide it with CUDA_VISIBLE_DEVICES, or build FBGEMM from its source for this GPU"
            return [f"{line}kernels for 8.x, 9.0 and 10.x: {remedy}"]
    if "fbgemm_gpu" not in probe.reached and (driver := re.search(r"lib(nvidia-ml|cuda)\.so\.1\b", probe.error)):
        line = f"fbgemm-gpu {version} needs NVIDIA's driver ({driver[0]}), which is not on this machine"
        return [f"{line}: install the driver, or take the CPU builds with DEVICE=cpu make setup"]
    if "fbgemm_gpu" not in probe.reached and (linked := re.search(r"libcudart\.so\.(\d+)", probe.error)):
        index = f"https://download.pytorch.org/whl/cu{(probe.cuda or '').replace('.', '')}"
        line = f"{name} {version} is built for CUDA {linked[1]}, but torch {torch} for CUDA {probe.cuda}"
        repair = _pip("install", "--no-deps", "--force-reinstall", "--index-url", index, spec)
        return [f"{line}; take both from one index: {repair}"]
    if "fbgemm_gpu" not in probe.reached:
        return [f"{name} {version} does not load ({probe.error}): {replace}"]
    return []


def run_probe() -> Probe:
    """Imports the three and runs an operator, in a process of its own, whose crash or hang becomes an `error`."""
    try:
        process = subprocess.run(  # noqa: S603 (our own program, no input)
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        out, complaint = process.stdout, _last_words(process.returncode, process.stderr)
    except subprocess.TimeoutExpired as hang:
        out = (hang.stdout or b"").decode() if isinstance(hang.stdout, bytes) else (hang.stdout or "")
        complaint = f"no answer in {TIMEOUT_SECONDS} s"
    stages: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines() if line.startswith('{"stage"')]
    torch: dict[str, Any] = next((stage for stage in stages if stage["stage"] == "torch"), {})
    reached = tuple(stage["stage"] for stage in stages)
    return Probe(
        reached=reached,
        torch_version=torch.get("version", ""),
        cuda=torch.get("cuda"),
        gpus=torch.get("gpus", 0),
        names=tuple(torch.get("names", ())),
        capabilities=tuple(torch.get("capabilities", ())),
        error="" if reached == _STAGES else complaint,
    )


def _last_words(code: int, stderr: str) -> str:
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"exit code {code}"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needs(name: str) -> str:
    """What torchrec_deepfm itself asks for, such as "torch>=2.11"; the bare name where it is not installed."""
    try:
        declared = metadata.requires("torchrec_deepfm") or []
    except metadata.PackageNotFoundError:
        declared = []
    return next((one for one in declared if re.match(rf"{name}\b(?!-)", one) and "extra" not in one), name)


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor: (2, 13) of "2.13.0+cpu"; () of anything else."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


def _pip(*words: str) -> str:
    """A pip command to copy, with this very Python, as short as its path can be written from here."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = Path(os.curdir) / python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "pip", *words])


if __name__ == "__main__":
    diagnosis = check()
    sys.stdout.write(f"{diagnosis}\n")
    sys.exit(diagnosis.exit_code)

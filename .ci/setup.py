"""Prepares .venv with this package, its pinned dependencies and the tools; `make setup` calls it.

NEWEST=1 prepares .venv-newest instead, for `make newest`: the newest TorchRec and FBGEMM, and the torch that belongs to
them.

    python3 .ci/setup.py           (again at any time: it does nothing when all is up to date)
    python3 .ci/setup.py --lock    (writes what .venv holds now into constraints.txt, to move the pins)
    python3 .ci/setup.py --dependencies    (what the package needs, without the tools and itself: for an image)

pyproject.toml says what is needed, constraints.txt in which version; neither list is repeated here. This script only
knows what pip does not: that TorchRec asks for the CUDA build of FBGEMM wherever it is installed, and that torch for a
machine without a GPU comes from an index of its own.

Where `nvidia-smi` answers, the CUDA builds are taken, otherwise the CPU builds; DEVICE=cpu or DEVICE=cuda decides
instead. TORCH_INDEX_URL names the index to take torch from, and with a GPU FBGEMM too.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (before anything that an older Python could not read)
    sys.exit(
        f"error: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; "
        "name one: make setup PYTHON=python3.11"
    )

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
import urllib.request
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
NEWEST = bool(os.environ.get("NEWEST"))
VENV = ROOT / (".venv-newest" if NEWEST else ".venv")
VENV_PYTHON = VENV / "bin" / "python"
PYPROJECT = ROOT / "pyproject.toml"
PINS = ROOT / "constraints.txt"
CONSTRAINTS = VENV / "constraints.txt" if NEWEST else PINS
# The fingerprint of the finished set-up, and the sign that a set-up is under way (left behind if it is killed).
STAMP = VENV / "setup-done"
UNFINISHED = VENV / "setup-unfinished"
# Which builds are in it. pip takes the CUDA torch for the CPU one, so .venv is made anew when this changes.
DEVICE = VENV / "setup-device"

# Extras that are large and not pinned; their tests are skipped where they are not installed.
ON_DEMAND = ("mlflow", "wandb")

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5


class SetupError(Exception):
    """The set-up stopped; the message is for the user."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", action="store_true", help="write the versions in .venv to constraints.txt")
    parser.add_argument("--dependencies", action="store_true", help="only what the package needs, for an image")
    options = parser.parse_args()
    try:
        if options.lock:
            lock()
        else:
            set_up(dependencies_only=options.dependencies)
    except SetupError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the next `make setup` starts afresh", file=sys.stderr)
        return 130
    return 0


def set_up(*, dependencies_only: bool = False) -> None:
    device = chosen_device()
    fingerprint = fingerprint_of(device)
    if STAMP.is_file() and STAMP.read_text() == fingerprint and VENV_PYTHON.exists():
        return

    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    needed: list[str] = project["project"]["dependencies"] + [
        one
        for name, some in extras.items()
        if name not in ON_DEMAND and (name != "dev" or not dependencies_only)
        for one in some
    ]
    build_tools: list[str] = project["build-system"]["requires"]
    make_venv(device)
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()

    if NEWEST:
        CONSTRAINTS.write_text(loose_pins(), encoding="utf-8")
    pip("pip and build tools", "--upgrade", "pip", *build_tools)
    if NEWEST:
        fbgemm = "fbgemm-gpu-cpu" if device == "cpu" else "fbgemm-gpu"
        pip("the newest FBGEMM", "--no-deps", fbgemm)
        CONSTRAINTS.write_text(loose_pins() + torch_of(version_of(fbgemm)), encoding="utf-8")
    # torch goes in alone: an index of PyTorch's own has few other packages, and old ones.
    pip(f"torch, {device.upper()} build", "--no-deps", "torch", *torch_index(device))
    if device == "cpu":
        needed = [one for one in needed if name_of(one) != "torchrec"]
        pip("torchrec", "--no-deps", "torchrec")
        needed += ["fbgemm-gpu-cpu" if name_of(one) == "fbgemm-gpu" else one for one in requirements_of("torchrec")]
    elif os.environ.get("TORCH_INDEX_URL"):
        # An index is for one version of CUDA; FBGEMM of another one would not load.
        pip("FBGEMM, from the index of torch", "--no-deps", "fbgemm-gpu", *torch_index(device))
    pip("everything else", *needed)
    if not dependencies_only:
        # For tests, their schemas only: they ask for packages that TorchX and this project refuse or do not need.
        pip("Triton's and KServe's schemas", "--no-deps", "tritonclient", "kserve")
    if dependencies_only:
        UNFINISHED.unlink()
        return  # without the stamp: `make setup` in this folder resumes from here
    pip("torchrec_deepfm itself, editable", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    # Last, so that a set-up is never called done that does not work.
    step("check that torch, FBGEMM and TorchRec fit together", [VENV_PYTHON, "-m", "torchrec_deepfm.doctor"])

    UNFINISHED.unlink()
    STAMP.write_text(fingerprint)


def chosen_device() -> str:
    device = os.environ.get("DEVICE") or ("cuda" if has_gpu() else "cpu")
    if device not in ("cpu", "cuda"):
        raise SetupError(f"DEVICE={device}: write DEVICE=cpu or DEVICE=cuda")
    return device


def fingerprint_of(device: str) -> str:
    """All that .venv depends on."""
    files = [path.read_bytes() for path in (PYPROJECT, PINS, Path(__file__))]
    rest = [device, sys.version_info, VENV]  # a moved .venv does not work
    return hashlib.sha256(b"\0".join([*files, *(str(part).encode() for part in rest)])).hexdigest()


def loose_pins() -> str:
    """The pins without torch, TorchRec, FBGEMM and what torch pins itself."""
    lines = PINS.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(one for one in lines if not re.match("(torch|torchrec|fbgemm.*|setuptools|sympy)==", one))


def torch_of(fbgemm: str) -> str:
    """The torch that an FBGEMM is built for: 1.8 belongs to 2.13, 1.9 to 2.14; with another one it does not load."""
    return f"torch~=2.{int(fbgemm.split('.')[1]) + 5}.0\n"


def version_of(distribution: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def make_venv(device: str) -> None:
    """Makes .venv, anew if the one there is for another device or Python, moved, or was killed in the making."""
    ask = "import sys, pip; print(sys.version_info, sys.prefix)"
    usable = VENV_PYTHON.exists() and not UNFINISHED.exists() and DEVICE.is_file() and DEVICE.read_text() == device
    if usable:
        answer = subprocess.run([VENV_PYTHON, "-c", ask], capture_output=True, text=True, check=False)
        usable = answer.stdout.strip() == f"{sys.version_info} {VENV}"
    if not usable:
        shutil.rmtree(VENV, ignore_errors=True)
        step(f"virtual environment {VENV.name}, Python {sys.version.split()[0]}", [sys.executable, "-m", "venv", VENV])
        DEVICE.write_text(device)


def torch_index(device: str) -> list[str]:
    """The options of pip for where to look for torch."""
    index = os.environ.get("TORCH_INDEX_URL")
    if not index and device == "cpu" and sys.platform == "linux":  # elsewhere the usual wheel is the CPU's
        index = TORCH_CPU_INDEX if answers(f"{TORCH_CPU_INDEX}/torch/") else None
        if index is None:
            print(
                "  (PyTorch's CPU index does not answer: pip looks where it is configured to; or set TORCH_INDEX_URL)"
            )
    return ["--index-url", index] if index else []


def answers(url: str) -> bool:
    """Whether an address can be read, known within a few seconds: a look-up of its name alone can hang for minutes."""
    found: list[bool] = []

    def probe() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as reply:
                found.append(reply.status == 200)
        except OSError:
            found.append(False)

    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return found == [True]


def pip(title: str, *words: str) -> None:
    step(title, [VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-c", CONSTRAINTS, *words])


def step(title: str, command: list[str | Path]) -> None:
    """Runs a command in silence; what it said is shown if it fails."""
    print(f"  {title} ...", end="", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, check=False)
    print(f" {time.monotonic() - start:.0f} s" if done.returncode == 0 else " failed")
    if done.returncode > 0 and UNFINISHED.exists():
        UNFINISHED.unlink()  # pip ended by itself and left .venv in order: the next run resumes from here
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        raise SetupError(f"set-up stopped at: {title}; the lines above say why. Then run it again")


def requirements_of(distribution: str) -> list[str]:
    """What an installed distribution asks for, its extras apart."""
    code = f"import importlib.metadata as m, json; print(json.dumps(m.requires({distribution!r}) or []))"
    declared = subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout
    return [one for one in json.loads(declared) if "extra ==" not in one]


def name_of(requirement: str) -> str:
    matched = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert matched, requirement
    return re.sub(r"[._-]+", "-", matched[0]).lower()


def lock() -> None:
    """Writes the versions in .venv to constraints.txt, without torch's build and without this package."""
    frozen = subprocess.run(
        [VENV_PYTHON, "-m", "pip", "freeze", "--all", "--exclude-editable", "--exclude", "torchrec_deepfm"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if frozen.returncode != 0:
        raise SetupError(f"{VENV} cannot be read; run `make setup` first")
    pins = {
        name_of(line): line.partition("==")[2].partition("+")[0] for line in frozen.stdout.splitlines() if "==" in line
    }
    # One FBGEMM is installed here, the other where there is a GPU (or not): they come out together.
    fbgemm = pins.get("fbgemm-gpu-cpu") or pins.get("fbgemm-gpu")
    if fbgemm:
        pins |= {"fbgemm-gpu": fbgemm, "fbgemm-gpu-cpu": fbgemm}
    head = (
        "# The version of everything that `make setup` installs. To move them: edit, make setup, .ci/setup.py --lock\n"
    )
    draft = PINS.with_suffix(".new")
    draft.write_text(head + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())), encoding="utf-8")
    draft.replace(PINS)


if __name__ == "__main__":
    sys.exit(main())

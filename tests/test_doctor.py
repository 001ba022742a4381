"""The doctor's judgement on made-up installations, and on this one."""

import subprocess
import sys
from dataclasses import replace

import pytest

from torchrec_deepfm import doctor
from torchrec_deepfm.doctor import Probe, find_problems

ALL = ("torch", "fbgemm_gpu", "torchrec")
REST = {"torchx": "0.7.0", "duckdb": "2.0.0", "numpy": "2.4.6"}
CPU = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0", **REST}
CUDA = {"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0", **REST}
ON_CPU = Probe(reached=ALL, torch_version="2.13.0+cpu")
ON_GPU = Probe(reached=ALL, torch_version="2.13.0+cu130", cuda="13.0", gpus=1)
BROKEN = "OSError: libtorch_cuda.so: cannot open shared object file"
PIP = doctor._pip()


def without(installed: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in installed.items() if name not in names}


@pytest.mark.parametrize(
    ("installed", "probe"),
    [
        (CPU, ON_CPU),
        (CUDA, ON_GPU),
        (CUDA, replace(ON_GPU, gpus=2, names=("NVIDIA H100", "NVIDIA L4"), capabilities=("9.0", "8.9"))),
        (
            {**CPU, "torch": "2.11.0", "fbgemm-gpu-cpu": "1.6.0", "torchrec": "1.6.1"},
            Probe(reached=ALL, torch_version="2.11.0+cpu"),
        ),
        # Built from source or a nightly: other names, but it runs.
        (without(CPU, "fbgemm-gpu-cpu", "torchrec"), ON_CPU),
        # A CUDA torch on a machine without a GPU does well with the CPU's FBGEMM.
        ({**CPU, "torch": "2.13.0"}, Probe(reached=ALL, torch_version="2.13.0+cu130", cuda="13.0", gpus=0)),
        # A torch whose FBGEMM nobody knows yet is judged by whether it runs.
        ({**CPU, "torch": "3.1.0", "fbgemm-gpu-cpu": "2.4.0"}, Probe(reached=ALL, torch_version="3.1.0+cpu")),
    ],
)
def test_what_fits_is_left_alone(installed: dict[str, str], probe: Probe) -> None:
    assert find_problems(installed, probe) == []


@pytest.mark.parametrize(
    ("installed", "probe", "problem"),
    [
        (
            without(CPU, "torch"),
            Probe(error="ModuleNotFoundError: No module named 'torch'"),
            f"torch is not installed: {PIP} install 'torch>=2.11'",
        ),
        (
            {**CPU, "torch": "2.10.1"},
            Probe(reached=ALL, torch_version="2.10.1+cpu"),
            f"torch 2.10.1 is older than 2.11: {PIP} install --upgrade 'torch>=2.11'",
        ),
        (
            CPU,
            Probe(error="ImportError: libgomp.so.1"),
            f"torch does not load (ImportError: libgomp.so.1): {PIP} install --force-reinstall 'torch>=2.11'",
        ),
        (
            without(CPU, "fbgemm-gpu-cpu"),
            Probe(reached=("torch",), torch_version="2.13.0+cpu", error="ModuleNotFoundError"),
            f"FBGEMM is not installed: {PIP} install --no-deps 'fbgemm-gpu-cpu==1.8.*'",
        ),
        (
            without(CUDA, "fbgemm-gpu"),
            Probe(reached=("torch",), torch_version="2.13.0+cu130", cuda="13.0", gpus=8, error="ModuleNotFoundError"),
            f"FBGEMM is not installed: {PIP} install --no-deps 'fbgemm-gpu==1.8.*'",
        ),
        (
            {**CPU, "fbgemm-gpu-cpu": "1.6.0"},
            ON_CPU,
            (
                "fbgemm-gpu-cpu 1.6.0 is built for another torch than 2.13.0+cpu: "
                f"{PIP} uninstall -y fbgemm-gpu-cpu && {PIP} install --no-deps 'fbgemm-gpu-cpu==1.8.*'"
            ),
        ),
        (
            {**CPU, "fbgemm-gpu": "1.8.0"},
            Probe(reached=("torch",), torch_version="2.13.0+cpu", error=BROKEN),
            (
                "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other: "
                f"{PIP} uninstall -y fbgemm-gpu-cpu fbgemm-gpu && {PIP} install --no-deps 'fbgemm-gpu-cpu==1.8.*'"
            ),
        ),
        (
            {**CUDA, "torch": "2.13.0+cpu"},
            Probe(reached=("torch",), torch_version="2.13.0+cpu", error=BROKEN),
            (
                f"fbgemm-gpu 1.8.0 needs CUDA, but torch 2.13.0+cpu is a CPU build: {PIP} uninstall -y fbgemm-gpu && "
                f"{PIP} install --no-deps 'fbgemm-gpu-cpu==1.8.*'"
            ),
        ),
        (
            CPU,
            ON_GPU,
            (
                "fbgemm-gpu-cpu 1.8.0 has no kernels for the GPU that torch 2.13.0+cu130 uses: "
                f"{PIP} uninstall -y fbgemm-gpu-cpu && {PIP} install --no-deps 'fbgemm-gpu==1.8.*'"
            ),
        ),
        (
            CPU,
            Probe(reached=("torch",), torch_version="2.13.0+cpu", error="crashed with SIGSEGV"),
            (
                f"fbgemm-gpu-cpu 1.8.0 does not load (crashed with SIGSEGV): {PIP} uninstall -y fbgemm-gpu-cpu && "
                f"{PIP} install --no-deps 'fbgemm-gpu-cpu==1.8.*'"
            ),
        ),
        (
            CUDA,
            replace(ON_GPU, reached=("torch",), names=("Tesla T4",), capabilities=("7.5",), error="no kernel image"),
            (
                "GPU 0 (Tesla T4) has compute capability 7.5, and the wheels of fbgemm-gpu hold kernels for 8.x, 9.0 "
                "and 10.x: hide it with CUDA_VISIBLE_DEVICES, or build FBGEMM from its source for this GPU"
            ),
        ),
        (
            CUDA,
            replace(ON_GPU, reached=("torch",), gpus=0, error="OSError: libnvidia-ml.so.1: cannot open shared object"),
            (
                "fbgemm-gpu 1.8.0 needs NVIDIA's driver (libnvidia-ml.so.1), which is not on this machine: install the "
                "driver, or take the CPU builds with DEVICE=cpu make setup"
            ),
        ),
        (
            CUDA,
            Probe(
                reached=("torch",),
                torch_version="2.13.0+cu126",
                cuda="12.6",
                gpus=1,
                error="OSError: libcudart.so.13: cannot open shared object file",
            ),
            (
                "fbgemm-gpu 1.8.0 is built for CUDA 13, but torch 2.13.0+cu126 for CUDA 12.6; take both from one "
                f"index: {PIP} install --no-deps --force-reinstall --index-url https://download.pytorch.org/whl/cu126 "
                "'fbgemm-gpu==1.8.*'"
            ),
        ),
        (
            {**CPU, "torchrec": "1.6.1"},
            ON_CPU,
            f"torchrec 1.6.1 does not fit torch 2.13.0+cpu: {PIP} install --no-deps 'torchrec==1.8.*'",
        ),
        (
            without(CPU, "torchrec"),
            Probe(reached=("torch", "fbgemm_gpu"), torch_version="2.13.0+cpu", error="ModuleNotFoundError"),
            f"torchrec is not installed: {PIP} install --no-deps 'torchrec==1.8.*'",
        ),
        (without(CPU, "duckdb"), ON_CPU, f"duckdb is not installed: {PIP} install 'duckdb>=1.2'"),
        (without(CPU, "torchx"), ON_CPU, f"torchx is not installed: {PIP} install 'torchx>=0.7'"),
    ],
)
def test_one_problem_is_one_line_with_its_remedy(installed: dict[str, str], probe: Probe, problem: str) -> None:
    assert find_problems(installed, probe) == [problem]


def test_several_problems_are_all_reported() -> None:
    problems = find_problems({"torch": "2.13.0+cpu"}, Probe(reached=("torch",), torch_version="2.13.0+cpu", error="x"))
    assert [problem.split(" is not installed")[0] for problem in problems] == [
        "FBGEMM",
        "torchrec",
        "torchx",
        "duckdb",
        "numpy",
    ]


def test_this_installation_is_fine() -> None:
    run = subprocess.run([sys.executable, "-m", "torchrec_deepfm.doctor"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    names = [line.split()[0] for line in run.stdout.splitlines()[:-1]]
    assert names == ["python", *doctor.DISTRIBUTIONS]
    assert run.stdout.splitlines()[-1].startswith("torch, FBGEMM and TorchRec fit together")


def test_a_problem_is_printed_and_counts() -> None:
    report = doctor.Diagnosis(
        versions={"python": "3.11.7", "torch": "-"}, problems=("torch is not installed: pip ...",)
    )
    assert str(report) == "python  3.11.7\ntorch   -\nproblem: torch is not installed: pip ..."
    assert report.exit_code == 2


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os; os.abort()", Probe(error="crashed with SIGABRT")),
        ("raise ImportError('no such library')", Probe(error="ImportError: no such library")),
        ("import time; time.sleep(60)", Probe(error="no answer in 1 s")),
        (
            (
                "import os\n"
                'print(\'{"stage": "torch", "version": "2.13.0+cpu", "cuda": null, "gpus": 0}\', flush=True)\n'
                "os.kill(os.getpid(), 11)"
            ),
            Probe(reached=("torch",), torch_version="2.13.0+cpu", error="crashed with SIGSEGV"),
        ),
    ],
)
def test_a_library_that_takes_its_process_down(program: str, expected: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", program)
    if "sleep" in program:
        monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 1)
    assert doctor.run_probe() == expected

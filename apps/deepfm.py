"""TorchX components of torchrec_deepfm: what `torchx run apps/deepfm.py:<name>` starts.

    torchx run apps/deepfm.py -j 1x2 -- --batch-size 2048

The options before `--` belong to the component (how many ranks, on what hosts), those after it to the command of
`python -m torchrec_deepfm` that every rank runs; `-- --help` lists them.

TorchX executes this file inside its own module. Hence no relative imports, no `from __future__ import annotations`
(it would turn the types that TorchX reads into strings), and `Optional[...]` where `... | None` would be newer style:
TorchX 0.7 does not read the latter.
"""

from typing import Any, Dict, Optional

import torchx
from torchx import specs
from torchx.components.dist import ddp

# What a bare `torchx run apps/deepfm.py` means; torchrec_deepfm.torchx_run reads it.
DEFAULT_COMPONENT = "train"


def train(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "deepfm-train",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    max_restarts: int = 3,
) -> specs.AppDef:
    """Trains a sharded DeepFM, by default on a small synthetic set that it generates.

    Args:
        args: options of `python -m torchrec_deepfm train`, after `--`
        j: {hosts}x{ranks per host}, {fewest}:{most hosts}x{ranks per host}; one rank per GPU, on CPUs as many as pay
        cpu: CPU cores per host (local schedulers ignore it)
        gpu: GPUs per host (local schedulers ignore it)
        memMB: memory per host in MB (local schedulers ignore it)
        h: a named resource of TorchX, instead of cpu, gpu and memMB
        image: the image with torchrec_deepfm in it (local_cwd runs what is installed here)
        name: the job's name
        env: environment variables of the ranks (ENV1=v1,ENV2=v2)
        max_retries: how often the scheduler may start the job again
        rdzv_port: port on the first host where several hosts meet; another one for each job there (one host uses none)
        max_restarts: how often torchelastic may start the ranks again, each time from the last checkpoint
    """
    return _on_ranks(
        "train",
        args,
        max_restarts,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        image=image,
        name=name,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def evaluate(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "deepfm-evaluate",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluates a trained run, or compares two, on a split of a prepared folder: metrics, users, slices, intervals.

    Args:
        args: options of `python -m torchrec_deepfm evaluate`, after `--`
        j: {hosts}x{ranks per host}; one rank per GPU, on CPUs as many as pay
        cpu: CPU cores per host (local schedulers ignore it)
        gpu: GPUs per host (local schedulers ignore it)
        memMB: memory per host in MB (local schedulers ignore it)
        h: a named resource of TorchX, instead of cpu, gpu and memMB
        image: the image with torchrec_deepfm in it (local_cwd runs what is installed here)
        name: the job's name
        env: environment variables of the ranks (ENV1=v1,ENV2=v2)
        max_retries: how often the scheduler may start the job again
        rdzv_port: port on the first host where several hosts meet; another one for each job there (one host uses none)
    """
    return _on_ranks(
        "evaluate",
        args,
        0,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        image=image,
        name=name,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def predict(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "deepfm-predict",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    max_restarts: int = 3,
) -> specs.AppDef:
    """Predicts the click probabilities of files of raw rows; several ranks take turns with pieces of them.

    Args:
        args: options of `python -m torchrec_deepfm predict`, after `--`
        j: {hosts}x{ranks per host}; on CPUs as many ranks as pay
        cpu: CPU cores per host (local schedulers ignore it)
        gpu: GPUs per host (not used)
        memMB: memory per host in MB (local schedulers ignore it)
        h: a named resource of TorchX, instead of cpu, gpu and memMB
        image: the image with torchrec_deepfm in it (local_cwd runs what is installed here)
        name: the job's name
        env: environment variables of the ranks (ENV1=v1,ENV2=v2)
        max_retries: how often the scheduler may start the job again; it resumes
        rdzv_port: port on the first host where several hosts meet; another one for each job there (one host uses none)
        max_restarts: how often torchelastic may start the ranks again
    """
    return _on_ranks(
        "predict",
        args,
        max_restarts,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        image=image,
        name=name,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def prepare(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "deepfm-prepare",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    max_restarts: int = 3,
) -> specs.AppDef:
    """Turns raw click logs into a prepared folder; several ranks share the files, in a folder that all of them see.

    Args:
        args: options of `python -m torchrec_deepfm prepare`, after `--`
        j: {hosts}x{ranks per host}; a rank works on a file at a time
        cpu: CPU cores per host (local schedulers ignore it)
        gpu: GPUs per host (not used)
        memMB: memory per host in MB (local schedulers ignore it)
        h: a named resource of TorchX, instead of cpu, gpu and memMB
        image: the image with torchrec_deepfm in it (local_cwd runs what is installed here)
        name: the job's name
        env: environment variables of the ranks (ENV1=v1,ENV2=v2)
        max_retries: how often the scheduler may start the job again; it resumes
        rdzv_port: port on the first host where several hosts meet; another one for each job there (one host uses none)
        max_restarts: how often torchelastic may start the ranks again
    """
    return _on_ranks(
        "prepare",
        args,
        max_restarts,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        image=image,
        name=name,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def plan(
    *args: str,
    cpu: int = 2,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "deepfm-plan",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Plans the placement of tables on any described hardware, in one process.

    Args:
        args: options of `python -m torchrec_deepfm plan`, after `--`
        cpu: CPU cores (local schedulers ignore it)
        memMB: memory in MB (local schedulers ignore it)
        h: a named resource of TorchX, instead of cpu and memMB
        image: the image with torchrec_deepfm in it (local_cwd runs what is installed here)
        name: the job's name
        env: environment variables (ENV1=v1,ENV2=v2)
        max_retries: how often the scheduler may start the job again
    """
    return _on_ranks(
        "plan",
        args,
        0,
        j="1x1",
        cpu=cpu,
        gpu=0,
        memMB=memMB,
        h=h,
        image=image,
        name=name,
        env=env,
        max_retries=max_retries,
    )


def experiment(
    *args: str,
    j: str = "1x2",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "deepfm-experiment",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Measures sharding plans on real ranks, beside what is predicted of them.

    Args:
        args: options of `python -m torchrec_deepfm experiment`, after `--`
        j: {hosts}x{ranks per host}; one rank per GPU, on CPUs as many as there are cores for
        cpu: CPU cores per host (local schedulers ignore it)
        gpu: GPUs per host (local schedulers ignore it)
        memMB: memory per host in MB (local schedulers ignore it)
        h: a named resource of TorchX, instead of cpu, gpu and memMB
        image: the image with torchrec_deepfm in it (local_cwd runs what is installed here)
        name: the job's name
        env: environment variables of the ranks (ENV1=v1,ENV2=v2)
        max_retries: how often the scheduler may start the job again
        rdzv_port: port on the first host where several hosts meet; another one for each job there (one host uses none)
    """
    return _on_ranks(
        "experiment",
        args,
        0,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        image=image,
        name=name,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def _on_ranks(command: str, args: tuple[str, ...], max_restarts: int, **options: Any) -> specs.AppDef:
    """One role of `dist.ddp` whose ranks run a command of torchrec_deepfm."""
    app = ddp(command, *args, m="torchrec_deepfm", **options)
    (role,) = app.roles
    role.name = command  # the prefix of every output line: "train/0", not "torchrec_deepfm/0"
    # torchrun, behind a launcher that reports the failure of a rank in one line (torchrec_deepfm/launch.py).
    front = f"python -m torchrec_deepfm.launch --max_restarts {max_restarts} "
    role.args = [arg.replace("torchrun ", front, 1) for arg in role.args]
    return app

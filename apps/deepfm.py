"""TorchX components of torchrec_deepfm: what `torchx run apps/deepfm.py:<name>` starts.

    torchx run apps/deepfm.py -j 1x2 -- --batch-size 2048

The options before `--` belong to the component (how many ranks, on what hosts), those after it to the command of
`python -m torchrec_deepfm` that every rank runs; `-- --help` lists them. Where the package is installed without the
repository, `torchrec_deepfm.deepfm` stands for this file: `torchx run torchrec_deepfm.deepfm:train`.

TorchX executes this file inside its own module. Hence no relative imports, no `from __future__ import annotations`
(it would turn the types that TorchX reads into strings), and `Optional[...]` where `... | None` would be newer style:
TorchX 0.7 does not read the latter, nor numbers that are `Optional`.
"""

import functools
import inspect
from typing import Any, Callable, Dict, List, Optional

from torchx import specs
from torchx.components.dist import ddp, parse_nnodes

# What a bare `torchx run apps/deepfm.py` means; torchrec_deepfm.launch.torchx_run reads it.
DEFAULT_COMPONENT = "train"

# Per rank, where neither the options nor a named resource say: what one of eight ranks of a usual GPU host has.
GPU_RANK = specs.Resource(cpu=12, gpu=1, memMB=96 * 1024)
CPU_RANK = specs.Resource(cpu=2, gpu=0, memMB=8 * 1024)


def _launch(
    command: str,
    args: Any,
    *,
    j: str = "1x1",
    cpu: int = 0,
    gpu: int = -1,
    memMB: int = 0,
    h: Optional[str] = None,
    image: str = "torchrec_deepfm",
    name: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    tracker: Optional[str] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """One role whose ranks run a command of torchrec_deepfm.

    Args:
        command: the command
        args: its options, after `--`
        j: {hosts}x{ranks per host}, or {fewest}:{most hosts}x{ranks per host}; one rank per GPU
        cpu: CPU cores per host; 0: 12 per rank with a GPU, else 2 (local_cwd ignores it)
        gpu: GPUs per host; -1: one per rank; write 0 for hosts without (local_cwd ignores it)
        memMB: memory per host in MB; 0: 96 GiB per rank with a GPU, else 8 GiB (local_cwd ignores it)
        h: a named resource instead of cpu, gpu and memMB, such as deepfm_h100x8
        image: the container image, as Dockerfile builds it (local_cwd and slurm run what is installed on the host)
        name: the job's name
        env: environment variables of the ranks (ENV1=v1,ENV2=v2)
        mounts: folders and volumes of a container (type=bind,src=/host/data,dst=/data,readonly)
        tracker: configuration file of TorchX's fsspec tracker, which keeps the run's options, metrics and files
        max_retries: how often the scheduler may start the job again; it resumes
        max_restarts: how often torchelastic may start the ranks again, each time from the last checkpoint
        rdzv_port: port on the first host where several hosts meet; another one for each job there (one host uses none)
    """
    ranks = parse_nnodes(j)[2]
    gpus = gpu if gpu >= 0 else 0 if command in WITHOUT_GPU else ranks
    rank = GPU_RANK if gpus else CPU_RANK
    tracking = {"TORCHX_TRACKERS": "fsspec", "TORCHX_TRACKER_FSSPEC_CONFIG": tracker} if tracker else {}
    app = ddp(
        command,
        *args,
        m="torchrec_deepfm",
        j=j,
        cpu=cpu or rank.cpu * ranks,
        gpu=gpus,
        memMB=memMB or rank.memMB * ranks,
        h=h,
        image=image,
        name=name or f"deepfm-{command}",
        env={**tracking, **(env or {})},
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )
    (role,) = app.roles
    role.name = command  # the prefix of every output line: "train/0", not "torchrec_deepfm/0"
    # torchrun, behind a launcher that reports the failure of a rank in one line (torchrec_deepfm/launch/launcher.py).
    front = f"python -m torchrec_deepfm.launch --max_restarts {max_restarts} "
    role.args = [arg.replace("torchrun ", front, 1) for arg in role.args]
    return app


WITHOUT_GPU = ("prepare", "plan", "export", "serve")
# Options that make no sense for a command that runs in one process.
OF_RANKS = ("j", "gpu", "max_restarts", "rdzv_port")


def _component(*without: str, **defaults: Any) -> Callable[[Callable[..., specs.AppDef]], Callable[..., specs.AppDef]]:
    """Gives a function `_launch`'s options, some left out, some with other defaults.

    TorchX reads a component's options from its signature and their help from its docstring: both are `_launch`'s.
    """

    def component(function: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
        @functools.wraps(function)
        def start(*args: str, **options: Any) -> specs.AppDef:
            return function(*args, **{**defaults, **options})

        options = [
            option.replace(default=defaults.get(key, option.default))
            for key, option in inspect.signature(_launch).parameters.items()
            if option.kind is option.KEYWORD_ONLY and key not in without
        ]
        words = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL, annotation=str)
        start.__signature__ = inspect.Signature([words, *options])  # type: ignore[attr-defined]
        helps = inspect.cleandoc(_launch.__doc__ or "").partition("Args:\n")[2].splitlines()
        kept = [line for line in helps if line.split(":")[0].strip() not in ("command", "args", *without)]
        head = f"    args: options of `python -m torchrec_deepfm {function.__name__}`, after `--`"
        start.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", head, *kept])
        return start

    return component


@_component(max_restarts=3)
def train(*args: str, **options: Any) -> specs.AppDef:
    """Trains a sharded DeepFM, by default on a small synthetic set that it generates."""
    return _launch("train", args, **options)


@_component(max_restarts=3)
def prepare(*args: str, **options: Any) -> specs.AppDef:
    """Turns raw click logs into a prepared folder; several ranks share the files, in a folder that all of them see."""
    return _launch("prepare", args, **options)


@_component()
def evaluate(*args: str, **options: Any) -> specs.AppDef:
    """Evaluates a trained run, or compares two, on a split of a prepared folder: metrics, users, slices, intervals."""
    return _launch("evaluate", args, **options)


@_component(max_restarts=3)
def predict(*args: str, **options: Any) -> specs.AppDef:
    """Predicts the click probabilities of files of raw rows; several ranks take turns with pieces of them."""
    return _launch("predict", args, **options)


@_component(*OF_RANKS)
def export(*args: str, **options: Any) -> specs.AppDef:
    """Writes a run as a folder for onnxruntime, torch.export or AOTInductor, in one process."""
    return _launch("export", args, **options)


@_component(*OF_RANKS)
def serve(*args: str, **options: Any) -> specs.AppDef:
    """Serves a run or a package over HTTP, in one process, until it is stopped."""
    return _launch("serve", args, **options)


@_component(*OF_RANKS)
def plan(*args: str, **options: Any) -> specs.AppDef:
    """Plans the placement of tables on any described hardware, in one process."""
    return _launch("plan", args, **options)


@_component(j="1x2")
def experiment(*args: str, **options: Any) -> specs.AppDef:
    """Measures sharding plans on real ranks, beside what is predicted of them."""
    return _launch("experiment", args, **options)

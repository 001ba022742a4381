"""What TorchX's schedulers need on this machine; what is missing is reported in one line."""

import importlib.util
import subprocess
from typing import Final

from torchrec_deepfm.errors import UserError

# Module to import -> what pip installs; TorchX 0.7 fails with a traceback without them.
PACKAGES: Final = {
    "kubernetes": {"kubernetes": "torchx[kubernetes]"},
    "kubernetes_mcad": {"kubernetes": "torchx[kubernetes]"},
    "aws_batch": {"boto3": "torchx[aws_batch]"},
    "aws_sagemaker": {"boto3": "boto3", "sagemaker": "sagemaker"},
    "gcp_batch": {
        "google.cloud.batch": "torchx[gcp_batch]",
        "google.cloud.logging": "torchx[gcp_batch]",
        "google.cloud.runtimeconfig": "torchx[gcp_batch]",
    },
    "ray": {"ray": "torchx[ray]"},
}
_PROGRAMS: Final = {
    "slurm": ("sacct", "sbatch", "scancel", "scontrol", "squeue"),
    "lsf": ("bhosts", "bjobs", "bkill", "bsub", "lsload", "lshosts"),
}


def check_packages(scheduler: str) -> None:
    """Refuse a scheduler whose Python packages are not installed, with the pip command."""
    missing = {pip for module, pip in PACKAGES.get(scheduler, {}).items() if not _installed(module)}
    if missing:
        names = " ".join(f"'{name}'" if "[" in name else name for name in sorted(missing))
        raise UserError(
            "its Python packages are not installed", where=f"-s {scheduler}", remedy=f"run: pip install {names}"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its parent
        return False


def scheduler_error(error: Exception, scheduler: str) -> UserError | None:
    """The one line for an error of a scheduler whose service or programs cannot be reached; None for another kind."""
    if isinstance(error, FileNotFoundError) and error.filename in _PROGRAMS.get(scheduler, ()):
        return UserError(
            f"{error.filename} is not on this machine",
            where=f"-s {scheduler}",
            remedy="submit from a node of the cluster, or add --dryrun to see the request",
        )
    if isinstance(error, subprocess.CalledProcessError) and error.cmd[0] in _PROGRAMS.get(scheduler, ()):
        program = error.cmd[0]
        if program == "sacct":
            return UserError(
                "the job is submitted, but sacct fails, so TorchX cannot follow it",
                where=f"-s {scheduler}",
                remedy="this cluster may keep no accounting: see squeue, and the files slurm-JOB-ROLE-N.out",
            )
        return UserError(
            f"{program} has refused the request, for the reason that it has printed above", where=f"-s {scheduler}"
        )
    home = type(error).__module__
    if home.startswith("docker."):
        return UserError(
            "no Docker daemon answers, and it builds and starts the image",
            where=f"-s {scheduler}",
            remedy='start one, name an image that exists with --workspace "" and --image, or run on this '
            "machine with -s local_cwd",
        )
    if home.startswith(("kubernetes.config", "urllib3.exceptions")):
        return UserError(
            f"no cluster can be reached ({error})", where=f"-s {scheduler}", remedy="check kubectl get nodes"
        )
    return None

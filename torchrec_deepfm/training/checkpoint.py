"""The weights of a trained model, by ``torch.distributed.checkpoint``: any plan on any number of ranks reads them."""

import shutil
from collections import OrderedDict
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.ranks import is_main


def save_model(model: DistributedModelParallel, folder: Path) -> None:
    """Write the weights, each rank its shards; a collective.

    The folder appears complete or not at all: it is written beside its place and renamed.

    Args:
        model: the sharded model.
        folder: where to; must not exist.
    """
    partial = folder.with_name(folder.name + ".partial")
    if is_main() and partial.exists():
        shutil.rmtree(partial)
    dist.barrier()
    save({"model": model.state_dict()}, checkpoint_id=partial)
    if is_main():
        partial.rename(folder)
    dist.barrier()


def load_model(model: DistributedModelParallel, folder: Path) -> None:
    """Read the weights into a model that may be sharded otherwise, over other ranks; a collective.

    Args:
        model: a model of the same tables and layers.
        folder: what ``save_model`` wrote.

    Raises:
        UserError: the folder is missing, damaged or of another model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no checkpoint; did the training reach its end?")
    state = {"model": model.state_dict()}
    try:
        load(state, checkpoint_id=folder)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"{folder}: the checkpoint can't be read ({_reason(error)}); train again") from error
    model.load_state_dict(OrderedDict(state["model"]))


def _reason(error: BaseException) -> str:
    """What went wrong, in one sentence; torch reports it with the tracebacks of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    sentence = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {sentence}"

"""Evaluation of a sharded model over a whole split."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.training.checkpoint.tensors import averaged_buffers
from torchrec_deepfm.training.metrics import Metrics, gather_metrics


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; one that does nothing unless it is ``bf16``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def evaluate(
    model: DistributedModelParallel,
    loader: Loader,
    device: torch.device,
    precision: str,
    before_step: Callable[[], None] = lambda: None,
    bins: int = 0,
) -> Metrics:
    """Run the model over every row that the loaders of all ranks yield; a collective.

    Args:
        model: ``DeepFMTrain``, sharded, not attached to another pipeline. Left in eval mode.
        loader: this rank's part of the split, ``drop_last=False``.
        device: this rank's device.
        precision: as in ``TrainConfig``.
        before_step: called before each step, equally often on every rank; its exceptions end the evaluation.
        bins: most bins of the reliability curve; 0 for none.

    Returns:
        The exact metrics of the whole split, the same on every rank.
    """
    model.eval()
    logits, labels = [torch.empty(0)], [torch.empty(0)]
    # Evaluation needs no optimizer, although the signature asks for one.
    pipeline: EvalPipelineSparseDist[Batch, tuple[Tensor, Tensor, Tensor]] = EvalPipelineSparseDist(
        model,
        None,  # type: ignore[arg-type]
        device,
    )
    batches = iter(loader)
    with torch.no_grad(), autocast(precision, device), averaged_buffers(model):
        for step in range(len(loader)):
            before_step()
            _, batch_logits, batch_labels = pipeline.progress(batches)
            valid = loader.valid_rows(step)  # the rest is padding: every rank has the same number of batches
            logits.append(batch_logits[:valid].float().cpu())
            labels.append(batch_labels[:valid].float().cpu())
    pipeline.detach()
    return gather_metrics(torch.cat(logits), torch.cat(labels), bins)

"""A plain training loop, and a pipeline run to its end: the two that the tests of pipelines compare."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer


def plain_loop(
    model: DistributedModelParallel, optimizer: Optimizer | KeyedOptimizer, batches: Iterable[Batch]
) -> list[float]:
    """The losses."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through(pipeline: Any, batches: Iterable[Batch]) -> list[Any]:
    """The pipeline's outputs until it runs dry."""
    outputs, source = [], iter(batches)
    while True:
        try:
            outputs.append(pipeline.progress(source))
        except StopIteration:
            return outputs


def pipelined(pipeline: Any) -> list[str]:
    """The modules that a pipeline runs ahead."""
    return [type(module).__name__ for module in getattr(pipeline, "_pipelined_modules", ())]

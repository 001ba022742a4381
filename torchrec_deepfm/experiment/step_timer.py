"""What a training step takes on this rank, and which of its phases takes it.

The phases are those of TorchRec's sharded ``EmbeddingBagCollection`` and what surrounds them:

- ``input_dist``: the ids go to the ranks that hold their rows.
- ``lookup``: rows are read and pooled.
- ``output_dist``: pooled rows go back to the ranks whose samples they belong to.
- ``dense``: all else of the forward pass.
- ``backward``, and of it ``backward_dense``, ``backward_output_dist`` (gradients travel to the rows),
  ``backward_lookup`` (rows change: the fused optimizer is in it) and ``backward_all_reduce`` (what is left to wait for
  of ``DistributedDataParallel``'s all-reduces once everything else is done).
- ``optimizer``: of what is not fused: the dense part and data_parallel tables.

No rank waits for the others at a mark: a wait counts in the phase in which it happens. On a GPU marks are CUDA
events in its stream.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.optim import Optimizer
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

FORWARD = ("input_dist", "lookup", "output_dist", "dense")
BACKWARD = ("backward_dense", "backward_output_dist", "backward_lookup", "backward_all_reduce")
UNTIMED_STEPS = 3  # of a pipeline: one fills it, two empty it
PHASES = (*FORWARD, *BACKWARD, "optimizer")

Mark = float | torch.cuda.Event


class Stopwatch:
    """Marks in the course of a step, each with the name of the phase that it begins."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Mark]] = []

    def begin(self, phase: str) -> None:
        """Mark the beginning of a phase, which ends the one before."""
        if self._marks and self._marks[-1][0] == phase:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Sum the seconds of each phase, the last one, which nothing ends, left out; wait for a GPU first."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(start, float) and isinstance(end, float):
                length = end - start
            else:
                assert isinstance(start, torch.cuda.Event)
                assert isinstance(end, torch.cuda.Event)
                length = start.elapsed_time(end) / 1e3
            sums[phase] = sums.get(phase, 0.0) + length
        return sums


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    """A sharded model, which gives ``(loss, ...)`` for a batch, with the optimizer of all that is not fused."""

    model: nn.Module
    optimizer: Optimizer
    device: torch.device

    def step(self, batch: Batch) -> None:
        """Train one step."""
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.backward()
        self.optimizer.step()


def step_seconds(trained: TrainableModel, batches: Sequence[Batch]) -> float:
    """Train on batches in the pipeline of ``train``: the ids of the next batch travel while one is computed.

    Returns the mean seconds of a step, without the first ``UNTIMED_STEPS``, which fill the pipeline, and the last two,
    which empty it. The model can be used without a pipeline afterwards.
    """
    pipeline: TrainPipelineSparseDist[Batch, Any] = TrainPipelineSparseDist(
        trained.model, trained.optimizer, trained.device, execute_all_batches=True
    )
    left = iter(batches)
    pipeline.progress(left)
    if trained.device.type == "cuda":
        torch.cuda.synchronize(trained.device)
    watch, timed = Stopwatch(trained.device), len(batches) - UNTIMED_STEPS
    watch.begin("steps")
    for _ in range(timed):
        pipeline.progress(left)
    watch.begin("end")
    seconds = watch.seconds()["steps"] / timed
    for _ in range(UNTIMED_STEPS - 1):
        pipeline.progress(left)
    pipeline.detach()
    return seconds


def split_step(trained: TrainableModel, batch: Batch) -> dict[str, float]:
    """Train one step; return the seconds of each of ``PHASES``, which sum up to the step.

    All look-ups come before all output dists here; TorchRec starts the output dist of one type before
    the next look-up: with several types in a plan, the step takes a little longer.
    """
    watch = Stopwatch(trained.device)
    with _phases(trained.model, watch) as looked_up:
        watch.begin("optimizer")
        trained.optimizer.zero_grad()
        watch.begin("dense")
        loss, _ = trained.model(batch)
        watch.begin("hooks")  # not a phase of the step: left out of the sums
        _hook_backward(loss, looked_up, watch)
        watch.begin("backward_dense")
        loss.backward()
        watch.begin("optimizer")
        trained.optimizer.step()
        watch.begin("end")
    sums = watch.seconds()
    return {phase: sums.get(phase, 0.0) for phase in PHASES}


@contextmanager
def _phases(model: nn.Module, watch: Stopwatch) -> Iterator[list[Tensor]]:
    """Let the sharded collections of a model mark their phases; yields the list of what their look-ups give."""
    looked_up: list[Tensor] = []
    collections = [module for module in model.modules() if isinstance(module, ShardedEmbeddingBagCollection)]
    for collection in collections:
        collection.forward = _timed_forward(collection, watch, looked_up)  # type: ignore[method-assign, assignment]
    try:
        yield looked_up
    finally:
        for collection in collections:
            del collection.forward


def _timed_forward(
    collection: ShardedEmbeddingBagCollection, watch: Stopwatch, looked_up: list[Tensor]
) -> Callable[[KeyedJaggedTensor], KeyedTensor]:
    def forward(features: KeyedJaggedTensor) -> KeyedTensor:
        watch.begin("input_dist")
        context = collection.create_context()
        ids = collection.input_dist(context, features).wait().wait()
        watch.begin("lookup")
        rows = collection.compute(context, ids)
        looked_up.extend(rows)
        watch.begin("output_dist")
        pooled = collection.output_dist(context, rows).wait()
        watch.begin("dense")
        assert isinstance(pooled, KeyedTensor)
        return pooled

    return forward


def _hook_backward(loss: Tensor, looked_up: Sequence[Tensor], watch: Stopwatch) -> None:
    """Let each node of the backward graph mark the phase that it belongs to, before it runs."""
    lookups = _nodes([rows.grad_fn for rows in looked_up])
    for node in _nodes([loss.grad_fn]):
        if node in lookups:
            phase = "backward_lookup"
        else:
            function = getattr(node, "_forward_cls", None)
            travels = function is not None and function.__module__ == "torchrec.distributed.comm_ops"
            phase = "backward_output_dist" if travels else "backward_dense"
        node.register_prehook(_begin(phase, watch))
    # Callbacks run after the last node, in the order in which they are queued. This one is queued in the first node,
    # and so before the one of DistributedDataParallel in which it waits for its all-reduces.
    assert loss.grad_fn is not None
    loss.grad_fn.register_prehook(
        lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: watch.begin("backward_all_reduce"))
    )


def _begin(phase: str, watch: Stopwatch) -> Callable[[Any], None]:
    return lambda _: watch.begin(phase)


def _nodes(roots: Sequence[Node | None]) -> set[Node]:
    found: set[Node] = set()
    open_ = [node for node in roots if node is not None]
    while open_:
        node = open_.pop()
        if node not in found:
            found.add(node)
            open_.extend(after for after, _ in node.next_functions if after is not None)
    return found

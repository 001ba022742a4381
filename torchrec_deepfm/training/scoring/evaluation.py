"""Evaluation of a sharded model over a whole split."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from torchrec_deepfm.distributed.process_group import gather, on_main
from torchrec_deepfm.model.arches import check_seen_ids
from torchrec_deepfm.training.checkpoint.tensors import averaged_buffers
from torchrec_deepfm.training.scoring.metrics import Metrics, NotFiniteError, compute_metrics


class Batches(Protocol):
    """One rank's batches: those of all ranks in turn are the rows in order."""

    @property
    def batch_size(self) -> int:
        """Rows of each batch, padding included."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, as many on every rank."""
        ...

    def valid_rows(self, step: int) -> int:
        """Real rows of a batch that was yielded; they come first, the rest is padding."""
        ...


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of all ranks, in the order of the N rows; ``weights`` is None if they are equal."""

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32] | None = None

    def check_finite(self) -> None:
        """Raise NotFiniteError if a logit is NaN or infinite."""
        if not np.isfinite(self.logits).all():
            raise NotFiniteError(
                "the predictions hold a NaN or an infinity, so these weights cannot be used", remedy="train again"
            )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; one that does nothing unless it is ``bf16``."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Take float32 matrix products as a precision says, in the whole process; what held before returns at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def evaluate_split(
    model: DistributedModelParallel,
    batches: Batches,
    device: torch.device,
    precision: str,
    before_step: Callable[[], None] = lambda: None,
    bins: int = 0,
) -> Metrics:
    """Compute the metrics of a model; a collective.

    Args:
        model: as for ``predict_rows``.
        batches: as for ``predict_rows``.
        device: this rank's device.
        precision: as in ``TrainConfig``.
        before_step: as for ``predict_rows``.
        bins: as for ``compute_metrics``.

    Returns:
        The exact metrics of all rows, the same on every rank.

    Raises:
        NotFiniteError: a logit is NaN or infinite.
    """
    found = predict_rows(model, batches, device, precision, before_step)

    def work() -> Metrics:
        assert found is not None
        found.check_finite()
        return compute_metrics(found.logits, found.labels, bins, found.weights)

    return on_main(work)


def predict_rows(
    model: DistributedModelParallel,
    batches: Batches,
    device: torch.device,
    precision: str,
    before_step: Callable[[], None] = lambda: None,
) -> Predictions | None:
    """Run a model over every row that the batches of all ranks hold; a collective.

    Args:
        model: ``DeepFMTrain``, sharded, not attached to another pipeline. Left in eval mode.
        batches: of this rank; a ``Loader`` without shuffle and ``drop_last``.
        device: this rank's device.
        precision: as in ``TrainConfig``.
        before_step: called before each step, equally often on every rank; its exceptions end the evaluation.

    Returns:
        The predictions on rank 0, None on the others.

    Raises:
        UserError: an id is not a row of its table.
    """
    model.eval()
    logits, labels = [torch.empty(0)], [torch.empty(0)]
    # Evaluation needs no optimizer, although the signature asks for one.
    pipeline: EvalPipelineSparseDist[Batch, tuple[Tensor, Tensor, Tensor]] = EvalPipelineSparseDist(
        model,
        None,  # type: ignore[arg-type]
        device,
    )
    iterator = iter(batches)
    with torch.no_grad(), autocast(precision, device), averaged_buffers(model):
        step = 0
        while True:
            before_step()
            try:
                _, batch_logits, batch_labels = pipeline.progress(iterator)
            except StopIteration:
                break
            valid = batches.valid_rows(step)
            # Into pinned memory, without waiting for the GPU at each step.
            logits.append(batch_logits[:valid].float().to("cpu", non_blocking=True))
            labels.append(batch_labels[:valid].float().to("cpu", non_blocking=True))
            step += 1
    pipeline.detach()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        check_seen_ids(model)
    return gather_predictions(torch.cat(logits), torch.cat(labels), batches.batch_size)


def gather_predictions(logits: Tensor, labels: Tensor, batch_size: int) -> Predictions | None:
    """Put the predictions of all ranks into the order of the rows; a collective.

    Args:
        logits: [N_r], this rank's logits on the CPU; N_r may differ between the ranks and may be 0.
        labels: [N_r], their labels, or [N_r, 2], with their weights.
        batch_size: rows of each batch but the last: rank r has rows ``[r B, (r + 1) B)`` of every ``W B`` rows.

    Returns:
        The predictions on rank 0, None on the others.
    """
    counts = gather(len(logits))
    targets = labels.float() if labels.dim() == 2 else labels.float().unsqueeze(1)
    known = torch.cat([logits.float().unsqueeze(1), targets], dim=1)
    mine = torch.zeros(max(counts), known.shape[1])
    mine[: len(logits)] = known
    gathered = [torch.empty_like(mine) for _ in counts] if dist.get_rank() == 0 else None
    dist.gather(mine, gathered, dst=0)
    if gathered is None:
        return None
    places = []
    for rank, count in enumerate(counts):
        step, place = np.divmod(np.arange(count), batch_size)
        places.append((step * len(counts) + rank) * batch_size + place)
    rows = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]).numpy()
    rows = rows[np.argsort(np.concatenate(places))]
    weights = rows[:, 2].copy() if rows.shape[1] == 3 else None
    return Predictions(logits=rows[:, 0].copy(), labels=rows[:, 1].copy(), weights=weights)

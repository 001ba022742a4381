"""Finds a loss that is not finite and reports its step, its batch and its learning rates."""

import io
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Never

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch

from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.distributed.disk_errors import refused
from torchrec_deepfm.distributed.process_group import is_main, on_main
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import write_bytes
from torchrec_deepfm.training.checkpoint.manager import Checkpoints, lower_rates

# More than the batches that are in the pipeline before their step.
_AHEAD = 8


class LossWatch:
    """Keeps where the last batches were read, and their learning rates, until their losses have been checked.

    Args:
        loader: of the training split. A batch is read again when it is needed: kept ones would be pinned memory.
        late: steps after which losses are checked.

    Attributes:
        bad_step: the first step whose loss was not finite on this rank; None without one.
    """

    def __init__(self, loader: Loader, *, late: int) -> None:
        self.bad_step: int | None = None
        self._loader = loader
        self._places: deque[tuple[int, Mapping[str, Any]]] = deque(maxlen=_AHEAD + late)
        self._rates: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=_AHEAD + late)

    def place(self, step: int, place: Mapping[str, Any]) -> None:
        """Keep where the loader is before the batch of a coming step: its ``position``."""
        self._places.append((step, place))

    def rates(self, step: int, rates: Mapping[str, float]) -> None:
        """Keep the learning rates of a step."""
        self._rates.append((step, rates))

    @property
    def newest_rates(self) -> Mapping[str, float]:
        """The learning rates of the last step."""
        return self._rates[-1][1]

    def check(self, first_step: int, losses: Sequence[Tensor]) -> None:
        """Remember the first loss that is not finite."""
        if self.bad_step is None:
            # One copy from the device. Losses of before a resume are on the CPU.
            values = torch.stack([loss.to(losses[-1].device) for loss in losses]).tolist()
            bad = (first_step + i for i, value in enumerate(values) if not math.isfinite(value))
            self.bad_step = next(bad, None)

    def refuse(self, bad_step: int | None, run: Path, checkpoints: Checkpoints) -> None:
        """End the training if a loss is not finite; a collective.

        Args:
            bad_step: the first one over all ranks; None without one.
            run: the run's folder; gets a folder with each rank's batch.
            checkpoints: of the run.

        Raises:
            UserError: ``bad_step`` is given.
        """
        if bad_step is None:
            return
        checkpoints.wait()
        saved = checkpoints.saved
        rates = next((rates for step, rates in self._rates if step == bad_step), {})
        folder = _folder(run, bad_step)
        place = next((place for step, place in self._places if step == bad_step), None)
        try:
            folder.mkdir(exist_ok=True)
            if place is not None:
                self._loader.load_state_dict(place)
                content = io.BytesIO()
                torch.save(_plain(self._loader.batch(0)), content)
                write_bytes(folder / f"rank_{dist.get_rank()}.pt", content.getvalue())
        except OSError as error:
            raise refused(folder, error) from error
        if is_main():
            about = {"step": bad_step, "lr": rates, "checkpoint": saved, "world_size": dist.get_world_size()}
            record_not_finite(run, about)
        dist.barrier()
        shown_rates = " ".join(f"{name} {rate:g}" for name, rate in rates.items())
        raise UserError(
            f"the loss is not finite (learning rates: {shown_rates}); its batch is saved in {folder}",
            where=f"step {bad_step}",
            remedy=lower_rates(saved),
        )


def refuse_predictions(step: int, run: Path, checkpoints: Checkpoints) -> Never:
    """End the training over an evaluation whose predictions are not finite; a collective.

    Args:
        step: steps done.
        run: the run's folder.
        checkpoints: of the run.

    Raises:
        UserError: always.
    """
    checkpoints.wait()
    on_main(lambda: record_not_finite(run, {"step": step, "checkpoint": checkpoints.saved}))
    raise UserError(
        "the predictions of the evaluation hold a NaN or an infinity",
        where=f"step {step}",
        remedy=lower_rates(checkpoints.saved),
    )


def record_not_finite(run: Path, about: Mapping[str, Any]) -> None:
    """Record in ``nonfinite_step_<step>/about.json`` that a run may be resumed with lower learning rates."""
    folder = _folder(run, about["step"])
    try:
        folder.mkdir(exist_ok=True)
        write_bytes(folder / "about.json", (json.dumps(dict(about), indent=2) + "\n").encode())
    except OSError as error:
        raise refused(folder, error) from error


def _folder(run: Path, step: int) -> Path:
    return run / f"nonfinite_step_{step:08d}"


def _plain(batch: Batch) -> dict[str, Any]:
    """Convert a batch to plain tensors, which ``torch.load(weights_only=True)`` reads."""
    sparse = batch.sparse_features
    weights = sparse.weights_or_none()
    return {
        "dense_features": batch.dense_features.cpu(),
        "keys": list(sparse.keys()),
        "values": sparse.values().cpu(),
        "lengths": sparse.lengths().cpu(),
        **({} if weights is None else {"weights": weights.cpu()}),
        "labels": batch.labels.cpu(),
    }

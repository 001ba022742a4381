"""The weights of a run in one unsharded model, whatever plan and number of ranks wrote them."""

from pathlib import Path

import torch

from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.model.deepfm import DeepFM, DeepFMTrain
from torchrec_deepfm.training.build import make_deepfm
from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts
from torchrec_deepfm.training.checkpoint.manager import FinalWeights, read_alone
from torchrec_deepfm.training.checkpoint.store import Damaged, Store
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.formats import SavedFile

CPU = torch.device("cpu")
_CHOICES = ("best", "last")


def load_model(run: Path | str, checkpoint: str | int | None = None) -> DeepFM:
    """Load the trained model of a run: one call, no process group, memory for one copy of the tables.

    Args:
        run: the run's folder.
        checkpoint: ``None`` for the run's own weights, those that ``summary.json`` measures; ``"best"`` for those of
            the best evaluation, ``"last"`` for the newest checkpoint, or the step of a checkpoint. With a moving
            average (``--ema``), its weights.

    Returns:
        The unsharded model on the CPU, in eval mode.

    Raises:
        UserError: the folder holds no run, the checkpoint does not exist, or it is damaged.
    """
    run = Path(run)
    run_folder.check_there(run)
    described = run_folder.read(run)
    averaged = False
    if checkpoint is None:
        store, step = _final(run), 0
    else:
        store, step = _saved(run, checkpoint)
        averaged = described.config.ema > 0.0
    meta = torch.device("meta")
    model = make_deepfm(
        described.config, described.num_embeddings, len(described.numeric), meta, is_weighted=described.weighted
    )
    model.to_empty(device=CPU)
    try:
        read_alone(store, step, _weights(model, averaged=averaged))
    except Damaged as error:
        raise UserError(f"{store.shown(step)}: the checkpoint can't be read ({error}); train again") from error
    return model.eval().requires_grad_(False)


def _weights(model: DeepFM, *, averaged: bool) -> dict[str, TensorCuts]:
    """Name the memory of a model as checkpoints name it."""
    state = {}
    for name, value in DeepFMTrain(model).state_dict().items():
        kind = "average" if averaged and value.is_floating_point() else "model"  # counters are not averaged
        state[f"{kind}.{name}"] = TensorCuts(tuple(value.size()), [Cut((0,) * value.dim(), value)])
    return state


def _final(run: Path) -> Store:
    folder = run / run_folder.CHECKPOINT
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no final weights; finish the training with the same train command, or choose a checkpoint, "
            "such as last"
        )
    return FinalWeights(folder)


def _saved(run: Path, checkpoint: str | int) -> tuple[Store, int]:
    """Find a checkpoint of the training."""
    store = _store(run)
    steps = store.steps()
    listed = f"{store.target} has {'steps ' + ', '.join(map(str, sorted(steps))) if steps else 'none'}"
    if isinstance(checkpoint, bool) or not isinstance(checkpoint, str | int):
        raise UserError(f"checkpoint {checkpoint!r}: give best, last or the number of a step")
    if str(checkpoint).isdecimal():
        step = int(checkpoint)
        if step not in steps:
            raise UserError(f"--checkpoint {checkpoint}: no such checkpoint; {listed}")
        return store, step
    if checkpoint not in _CHOICES:
        raise UserError(f"--checkpoint {checkpoint}: choose {one_of(_CHOICES, checkpoint)}, or the number of a step")
    if not steps:
        raise UserError(f"--checkpoint {checkpoint}: {listed}; leave the option out for the final weights")
    if checkpoint == "last":
        return store, steps[0]
    best = (run_folder.read_summary(run) or {}).get("best", {}).get("step")
    if best is None:
        raise UserError(f"--checkpoint best: {run} has no evaluation on a validation split yet; choose last or a step")
    if best not in steps:
        raise UserError(f"--checkpoint best: the best evaluation was at step {best}, but {listed}; choose one of these")
    return store, best


def _store(run: Path) -> Store:
    """Return the place of the checkpoints: that of ``saved.json``, or the run's own folder if the run was moved."""
    own = run / run_folder.CHECKPOINTS
    saved = run_folder.read_file(run / run_folder.SAVED, SavedFile, "restore it, or train again")
    if own.is_dir() or saved is None:
        return Store(str(own))
    return Store(saved[1].checkpoints)

"""The weights of a run in one unsharded model, whatever plan and number of ranks wrote them."""

from pathlib import Path

import torch

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import as_path
from torchrec_deepfm.model.deepfm import DeepFM, DeepFMTrain
from torchrec_deepfm.training.build import make_deepfm
from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts
from torchrec_deepfm.training.checkpoint.manager import read_alone
from torchrec_deepfm.training.checkpoint.store import Damaged
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.weights import find_weights

CPU = torch.device("cpu")


def load_model(run: Path | str, checkpoint: str | int | None = None) -> DeepFM:
    """Load the trained model of a run: one call, no process group, memory for one copy of the tables.

    Args:
        run: the run's folder.
        checkpoint: ``None`` for the run's own weights, those that ``summary.json`` measures; ``"best"`` for those of
            the best evaluation, ``"last"`` for those of the end, or the step of a checkpoint. With a moving average
            (``--ema``), its weights.

    Returns:
        The unsharded model on the CPU, in eval mode.

    Raises:
        UserError: the folder holds no run, the checkpoint does not exist, or it is damaged.
    """
    run = as_path(run, "a run")
    weights = find_weights(run, checkpoint)
    described = run_folder.read(run)
    meta = torch.device("meta")
    model = make_deepfm(
        described.config,
        described.num_embeddings,
        described.dense_in_features,
        meta,
        dense_widths=described.widths,
        is_weighted=described.weighted,
    )
    model.to_empty(device=CPU)
    try:
        read_alone(weights.store, weights.key, _state(model, averaged=weights.averaged))
    except Damaged as error:
        raise UserError(f"the checkpoint can't be read ({error})", where=weights.shown, remedy="train again") from error
    return model.eval().requires_grad_(False)


def _state(model: DeepFM, *, averaged: bool) -> dict[str, TensorCuts]:
    """Name the memory of a model as checkpoints name it."""
    state = {}
    for name, value in DeepFMTrain(model).state_dict().items():
        kind = "average" if averaged and value.is_floating_point() else "model"  # counters are not averaged
        state[f"{kind}.{name}"] = TensorCuts(tuple(value.size()), [Cut((0,) * value.dim(), value)])
    return state

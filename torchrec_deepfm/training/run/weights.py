"""Where the weights of a run are: its own, the best, the last, or those of a step. No torch.

checkpoint/         the run's own weights: with --patience the best, else the last
checkpoint_best/    the best, unless the run's own are the same
checkpoint_last/    the last, unless the run's own are the same
checkpoints/        the states of single steps, with the optimizers' values; may lie elsewhere
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.training.checkpoint.store import Damaged, FinalWeights, Store
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.formats import KeptWeights, SavedFile, SummaryFile
from torchrec_deepfm.training.run.same_run import check_saved_by

Which = Literal["best", "last"]
_CHOICES = get_args(Which)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights on a disk, to be read with ``checkpoint.manager.restore_model`` or, without ranks, ``inference``.

    Attributes:
        store: the place; ``store.where(key)`` is the path or URL of the folder, ``store.manifest(key)`` its manifest.
        key: the number of the folder in it.
        step: steps of the training that they come from; None if the run does not record it.
        averaged: whether the folder is a checkpoint of a training that keeps a moving average: its weights are
            ``average.<parameter>``, and only what the average leaves out is ``model.<parameter>``.
    """

    store: Store
    key: int
    step: int | None
    averaged: bool = False

    @property
    def shown(self) -> str:
        """The folder for messages."""
        return self.store.shown(self.key)

    def record(self) -> Mapping[str, Any]:
        """What the manifest records of the run that saved them; empty if it is damaged, which reading them tells."""
        try:
            return self.store.manifest(self.key)
        except Damaged:
            return {}


def folder_of(which: Which, own: Which) -> str:
    """Name the folder of the best or the last weights of a run in which they differ."""
    return run_folder.CHECKPOINT if which == own else f"{run_folder.CHECKPOINT}_{which}"


def find_weights(run: Path, checkpoint: str | int | None = None) -> Weights:
    """Find weights of a run; their files are not checked.

    ``None`` for the run's own weights, those that ``summary.json`` measures; ``best`` for those of the best evaluation,
    ``last`` for those of the end (of an unfinished run: the newest), or a number of steps. UserError: there are none,
    or another run has saved them.
    """
    weights = _find(run, checkpoint)
    check_saved_by(run, weights.shown, weights.record())
    return weights


def _find(run: Path, checkpoint: str | int | None) -> Weights:
    run_folder.check_there(run)
    found = run_folder.read_file(run / run_folder.SUMMARY, SummaryFile, "restore it")
    kept = {} if found is None else _kept(found[1])
    if checkpoint is None:
        return _own(run, kept)
    step = _step(run, checkpoint, kept)
    for entry in kept.values():
        if entry is not None and entry.step == step and entry.folder is not None:
            return Weights(store=FinalWeights(run / entry.folder), key=0, step=step)
    store = _checkpoints(run)
    if step not in (steps := store.steps()):
        what = "no such checkpoint" if str(checkpoint) == str(step) else f"these weights are of step {step}"
        raise UserError(what, where=f"--checkpoint {checkpoint}", remedy=_listed(store, steps))
    return Weights(store=store, key=step, step=step, averaged=run_folder.read(run).config.ema > 0.0)


def _own(run: Path, kept: Mapping[str, KeptWeights | None]) -> Weights:
    folder = run / run_folder.CHECKPOINT
    if not folder.is_dir():
        raise UserError(
            "no final weights",
            where=folder,
            remedy="finish the training with the same train command, or choose a checkpoint, such as last",
        )
    steps = [one.step for one in kept.values() if one is not None and one.folder == run_folder.CHECKPOINT]
    return Weights(store=FinalWeights(folder), key=0, step=steps[0] if steps else None)


def _step(run: Path, checkpoint: str | int, kept: Mapping[str, KeptWeights | None]) -> int:
    """The number of steps that a user's choice stands for."""
    if not isinstance(checkpoint, str):
        try:
            if not isinstance(checkpoint, bool):
                return operator.index(checkpoint)  # numpy's integers too
        except TypeError:
            pass
        raise UserError("give best, last or the number of a step", where=f"checkpoint {checkpoint!r}")
    if checkpoint.isascii() and checkpoint.isdecimal():
        return int(checkpoint)
    if checkpoint not in _CHOICES:
        raise UserError(
            f"choose {one_of(_CHOICES, checkpoint)}, or the number of a step", where=f"--checkpoint {checkpoint}"
        )
    entry = kept.get(checkpoint)
    if entry is not None:
        return entry.step
    if kept:
        raise UserError(
            f"{run} keeps no best weights, as no validation named a best",
            where="--checkpoint best",
            remedy="choose last",
        )
    store = _checkpoints(run)
    steps = store.steps()
    if checkpoint == "best" or not steps:
        listed = _listed(store, steps)
        raise UserError(
            f"{run} is not finished; finish it with the same train command",
            where=f"--checkpoint {checkpoint}",
            remedy=listed,
        )
    return steps[0]


def _kept(summary: SummaryFile) -> dict[str, KeptWeights | None]:
    """The best and the last weights; those of a run of an earlier version have a folder only if they are its own."""
    if summary.weights is not None:
        return {"best": summary.weights.best, "last": summary.weights.last}
    best = None if summary.best is None else summary.best.step
    steps = {"best": best, "last": summary.steps}
    own = summary.steps if summary.restored_step is None else summary.restored_step
    return {
        which: None if step is None else KeptWeights(step=step, folder="checkpoint" if step == own else None)
        for which, step in steps.items()
    }


def _checkpoints(run: Path) -> Store:
    """The place of the checkpoints: that of ``saved.json``, or the run's own folder if the run was moved."""
    inside = run / run_folder.CHECKPOINTS
    saved = run_folder.read_file(run / run_folder.SAVED, SavedFile, "restore it, or train again")
    return Store(str(inside) if inside.is_dir() or saved is None else saved[1].checkpoints)


def _listed(store: Store, steps: Sequence[int]) -> str:
    return f"{store.target} has {'steps ' + ', '.join(map(str, sorted(steps))) if steps else 'none'}"

"""Checkpoints by torch.distributed.checkpoint: any plan on any number of ranks reads them.

``Checkpoints`` saves a running training; ``save_model`` and ``restore_model`` handle the weights of a finished one.
"""

import contextlib
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_deepfm.distributed.disk_errors import refused, unreadable
from torchrec_deepfm.distributed.process_group import gather, is_main, on_main
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote.address import as_os_error
from torchrec_deepfm.training.checkpoint.dcp import (
    METADATA,
    CpuStager,
    LoadPlanner,
    Reader,
    SavePlanner,
    State,
    TensorCuts,
    Writer,
    writing,
)
from torchrec_deepfm.training.checkpoint.store import MANIFEST, Damaged, FinalWeights, Store
from torchrec_deepfm.training.checkpoint.tensors import all_finite, average_state, averaged_buffers, model_state, owned
from torchrec_deepfm.training.run.weights import Weights

_AGAIN = "run the same command again"


class Checkpoints:
    """The checkpoints of a run; every method is a collective.

    Args:
        target: a folder or an fsspec URL.
        keep_last: number of newest checkpoints to keep.
        timeout: seconds that ranks wait for each other.
        committing: called on rank 0 before a checkpoint becomes visible.
        committed: called on rank 0 with the step of each committed checkpoint.
        not_finite: called on rank 0 with a step that is not saved and the name of a weight that is not finite.

    Attributes:
        store: the place of the checkpoints.
        saved: the newest step known to be saved.
    """

    def __init__(
        self,
        target: str,
        *,
        keep_last: int,
        timeout: float = 1800.0,
        committing: Callable[[], None] = lambda: None,
        committed: Callable[[int], None] = lambda step: None,
        not_finite: Callable[[int, str], None] = lambda step, name: None,
    ) -> None:
        self.store = Store(target)
        self._committing, self._committed, self._not_finite = committing, committed, not_finite
        self.saved: int | None = None
        self._keep_last = keep_last
        # Saves run in a thread and need their own group: the training uses the others at the same time.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._stager = CpuStager()
        self._pending: Future[int] | None = None

    def save(self, step: int, state: State, meta: Mapping[str, Any], *, keep: Collection[int] = ()) -> None:
        """Save a state: copy it now, write it while the training continues.

        Waits for the previous save first.

        ``keep``: steps whose checkpoints to keep besides the newest ones.
        """
        self.wait()
        writer = Writer(self.store.begin(step), local=self.store.local)
        written = async_save(
            dict(state),
            storage_writer=writer,
            planner=SavePlanner(),
            process_group=self._group,
            async_stager=self._stager,
        )
        assert isinstance(written, Future)
        # A thread for each save: as long as a thread that has computed with torch lives, its OpenMP threads count, and
        # where there are more of them than cores, libgomp lets those of the training sleep at every barrier.
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(self._finish, written, writer, step, dict(meta), frozenset(keep))
        thread.shutdown(wait=False)

    def poll(self) -> None:
        """Raise the error of a finished save, if it failed; not a collective, and does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is saved."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.saved = pending.result()

    def close(self) -> None:
        """Wait for a running save, ignore its errors, and free the memory."""
        with contextlib.suppress(Exception):
            self.wait()
        self._stager.close()

    def intact(self, refusals: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over the intact checkpoints, the newest first.

        Yields the step and the manifest.
        """
        for step in on_main(self.store.steps):
            manifest, reason = on_main(lambda step=step: _read_manifest(self.store, step))  # type: ignore[misc]
            if reason is None:
                reason = verify_together(self.store, step, manifest["files"])
            if reason is None:
                yield step, manifest
            else:
                refusals.append(f"{self.store.shown(step)}: {reason}")

    def read(self, step: int, manifest: Mapping[str, Any], state: State) -> str | None:
        """Read a checkpoint.

        Returns why it can't be read; None on success.
        """
        reason = _try_load(self.store, step, manifest["files"], state)
        if reason is None:
            self.saved = step
        return reason

    def _finish(
        self, written: "Future[Any]", writer: Writer, step: int, meta: dict[str, Any], keep: frozenset[int]
    ) -> int:
        """Wait until the files of all ranks are written, write the manifest, make the checkpoint visible."""
        try:
            written.result()
        except _FAILED as error:
            if is_main():
                self.store.abandon(step)
            raise _as_user_error(error, self.store.shown(step), self._again) from error
        wrong = all_finite(self._stager.staged)
        from_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(from_ranks, (writer.digests, wrong), group=self._group)
        wrong = next((name for _, name in from_ranks if name is not None), None)
        outcome: list[UserError | None] = [None]
        if is_main():
            if wrong is None:
                files = {name: entry for digests, _ in from_ranks for name, entry in sorted(digests.items())}
                outcome = [self._commit(step, files, meta, keep)]
            else:
                self.store.abandon(step)
                outcome = [self._refuse(step, wrong)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise outcome[0]
        return step

    def _commit(
        self, step: int, files: Mapping[str, Any], meta: Mapping[str, Any], keep: frozenset[int]
    ) -> UserError | None:
        try:
            self._committing()
            self.store.commit(step, files, meta)
        except UserError as error:
            self.store.abandon(step)
            return error
        except OSError as error:
            self.store.abandon(step)
            return refused(self.store.shown(step), error, self._again)
        try:
            self._committed(step)
            self.store.retain(self._keep_last, keep)
        except UserError as error:
            return error
        except (OSError, Damaged) as error:
            return UserError(
                f"older checkpoints can't be removed ({error})", where=self.store.target, remedy="check the disk"
            )
        return None

    def _refuse(self, step: int, wrong: str) -> UserError:
        try:
            self._not_finite(step, wrong)
        except UserError as error:
            return error
        return UserError(
            f"{wrong} holds a NaN or an infinity, so this state is not saved",
            where=f"step {step}",
            remedy=lower_rates(self.saved),
        )

    @property
    def _again(self) -> str:
        """The remedy after a failed save."""
        return _AGAIN if self.saved is None else f"{_AGAIN} to resume from the checkpoint of step {self.saved}"


def lower_rates(saved: int | None) -> str:
    """Return the remedy for a loss or a weight that is not finite; ``saved`` is the newest saved step, if any."""
    again = "start again from step 0" if saved is None else f"resume from the checkpoint of step {saved}"
    return f"run the same command with a lower --sparse-lr or --dense-lr to {again}"


def verify_together(store: Store, step: int, files: Mapping[str, Any]) -> str | None:
    """Compare a checkpoint's files with its manifest, each rank a share of them; a collective.

    Args:
        store: the place of the checkpoint.
        step: its step.
        files: of its manifest.

    Returns:
        The damage, the same on every rank; None if intact.

    Raises:
        UserError: a file can't be read on some rank.
    """
    share = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    found: Exception | None = None
    try:
        store.verify(step, {name: files[name] for name in share})
    except (Damaged, UserError) as error:
        found = error
    return _error_of_any_rank(found)


def _error_of_any_rank(error: Exception | None) -> str | None:
    """Return the first error of any rank, the same on all; raise a UserError. A collective."""
    errors = [each for each in gather(error) if each is not None]
    found = sorted(errors, key=lambda each: not isinstance(each, UserError))
    if found and isinstance(found[0], UserError):
        raise found[0]
    return str(found[0]) if found else None


def save_model(model: DistributedModelParallel, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the weights, each rank its shards; a collective.

    The folder appears complete or not at all: it is written beside its place and renamed.

    Args:
        model: the sharded model.
        folder: the target; an existing one is replaced.
        about: what its manifest records of the run.

    Raises:
        UserError: the disk refused.
    """
    store = FinalWeights(folder)
    if is_main():
        store.abandon(0)
    dist.barrier()
    writer = Writer(store.begin(0), local=True)
    try:
        with averaged_buffers(model):
            save(owned(model_state(model)), storage_writer=writer, planner=SavePlanner())
    except _FAILED as error:
        raise _as_user_error(error, str(folder), _AGAIN) from error
    files = {name: entry for digests in gather(writer.digests) for name, entry in sorted(digests.items())}

    def commit() -> None:
        try:
            store.commit(0, files, about)
        except OSError as error:
            raise refused(folder, error, _AGAIN) from error

    on_main(commit)


def restore_model(model: DistributedModelParallel, weights: Weights) -> None:
    """Read weights into a model with any plan, on any number of ranks; a collective.

    Args:
        model: a model of the same tables and layers.
        weights: of ``find_weights``.

    Raises:
        UserError: the folder is missing, damaged or belongs to another model.
    """
    reason = try_load_model(model, weights)
    if reason is not None:
        raise UserError(f"the checkpoint can't be read ({reason})", where=weights.shown, remedy="train again")


def try_load_model(model: DistributedModelParallel, weights: Weights) -> str | None:
    """Read weights into a model as ``restore_model`` does; return the damage instead of raising an error for it."""
    store, key = weights.store, weights.key
    manifest, reason = on_main(lambda: _read_manifest(store, key))
    if reason is None:
        reason = verify_together(store, key, manifest["files"])
    if reason is not None:
        return reason
    state = model_state(model)
    return _try_load(store, key, manifest["files"], average_state(state) if weights.averaged else state)


# CheckpointException is a BaseException. DCP wraps an error of any rank in one, on every rank.
_FAILED = (CheckpointException, Exception)
_UNREADABLE = (CheckpointException, Damaged, OSError, RuntimeError, ValueError)


def _reason(error: BaseException, where: str) -> str:
    """Describe the damage of a checkpoint in a sentence. A UserError if it can't be read: that proves no damage."""
    cause = _first_cause(error)
    if isinstance(cause, UserError):
        raise cause
    if isinstance(cause, OSError):
        raise unreadable(where, cause) from error
    if isinstance(cause, Damaged):
        return str(cause)
    sentence = (str(cause).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(cause).__name__}: {sentence}"


def _try_load(store: Store, step: int, files: Mapping[str, Any], state: Mapping[str, TensorCuts]) -> str | None:
    try:
        _load(store, step, files, state)
    except _UNREADABLE as error:
        return _reason(error, store.shown(step))
    return None


def _load(store: Store, step: int, files: Mapping[str, Any], state: Mapping[str, TensorCuts]) -> None:
    found: Exception | None = None
    try:
        reader = _reader(store, step, files)
    except (Damaged, UserError) as error:
        found = error
    reason = _error_of_any_rank(found)
    if reason is not None:
        raise Damaged(reason)
    with writing(state):
        load(dict(state), storage_reader=reader, planner=LoadPlanner())


def _reader(store: Store, step: int, files: Mapping[str, Any]) -> Reader:
    if METADATA not in files:
        raise Damaged(f"{MANIFEST} does not name {METADATA}")
    reader = Reader(store.where(step), local=store.local, files=list(files))
    try:
        reader.read_metadata()  # before DCP does it, which logs errors as tracebacks
    except pickle.UnpicklingError as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        raise unreadable(f"{store.shown(step)}/{METADATA}", error) from error
    return reader


def read_alone(store: Store, step: int, state: State) -> None:
    """Read a checkpoint into the cuts of ``state``, in this process alone; needs no process group.

    Damaged: a file is missing or does not match the manifest, or the checkpoint is of another model.
    """
    files = store.manifest(step)["files"]
    store.verify(step, files)
    reader = _reader(store, step, files)
    try:
        with writing(state):
            load(dict(state), storage_reader=reader, planner=LoadPlanner(), no_dist=True)
    except _UNREADABLE as error:
        raise Damaged(_reason(error, store.shown(step))) from error


def _read_manifest(store: Store, step: int) -> tuple[dict[str, Any], str | None]:
    try:
        return store.manifest(step), None
    except Damaged as error:
        return {}, str(error)


def _first_cause(error: BaseException) -> BaseException:
    """Return the error of a rank that a CheckpointException wraps; one of a driver of addresses as an OSError."""
    if isinstance(error, CheckpointException) and error.failures:
        causes = [as_os_error(failure[0]) for failure in error.failures.values()]
        return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    return as_os_error(error)


def _as_user_error(error: BaseException, where: str, again: str) -> BaseException:
    """Convert an error of the disk to a UserError; return other errors unchanged."""
    cause = _first_cause(error)
    return refused(where, cause, again) if isinstance(cause, OSError) else error

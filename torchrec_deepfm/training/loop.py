"""The steps of a training: what happens at each of them, and what it takes to go on from any of them."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.distributed.health import DataFiles, longest_wait
from torchrec_deepfm.distributed.health import Progress as Signs
from torchrec_deepfm.distributed.step_sync import Control
from torchrec_deepfm.distributed.stop_signals import Preempted, Requests
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.checkpoint.dcp import Pieces
from torchrec_deepfm.training.checkpoint.manager import Checkpoints
from torchrec_deepfm.training.checkpoint.rank_state import RankState
from torchrec_deepfm.training.checkpoint.tensors import TrainingTensors
from torchrec_deepfm.training.config import Metric, TrainConfig
from torchrec_deepfm.training.early_stopping import Tracker, Verdict
from torchrec_deepfm.training.ema import MovingAverage
from torchrec_deepfm.training.evaluation import autocast, evaluate
from torchrec_deepfm.training.metrics import Metrics, NotFiniteError
from torchrec_deepfm.training.nonfinite import LossWatch, refuse_predictions
from torchrec_deepfm.training.optimizers import make_optimizer, make_scheduler, set_rates
from torchrec_deepfm.training.run.formats import RECORD_EVERY, Manifest, TrainingPoint
from torchrec_deepfm.training.run.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a loop works with and does not make itself.

    Attributes:
        config: the options.
        device: of this rank.
        train: loader of the training split.
        validation: loader of the validation split; None where there is none.
        checkpoints: where to save.
        about: what every manifest says of the run: options, data, plan, versions.
        requests: of the user and the scheduler.
        signs: what the other ranks see of this one.
        files: the data files.
        folder: of the run.
        timeout: seconds after which a step may count as stalled.
    """

    config: TrainConfig
    device: torch.device
    train: Loader
    validation: Loader | None
    checkpoints: Checkpoints
    about: Mapping[str, Any]
    requests: Requests
    signs: Signs
    files: DataFiles
    folder: Path
    timeout: float


class Loop:
    """Steps, records, evaluations and checkpoints of one training.

    Args:
        model: the sharded model.
        surroundings: all else.

    Attributes:
        point: how far it has come.
        tracker: the best evaluation, and patience.
        average: the moving average of the weights; None without.
        progress: what tells of it; rank 0 sets it once it is known where the training begins.
    """

    def __init__(self, model: DistributedModelParallel, surroundings: Surroundings) -> None:
        self._model, self._s = model, surroundings
        config = surroundings.config
        self._config = config
        self.point = TrainingPoint(dropped=0)
        self.tracker = Tracker(
            metric=config.metric, patience=config.patience, lr_patience=config.lr_patience, lr_factor=config.lr_factor
        )
        self.progress: Progress | None = None
        self._rows = int(surroundings.train.state_dict()["rows"])
        self._global_batch = config.batch_size * dist.get_world_size()
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(
            self._optimizer, config, config.epochs * len(surroundings.train), lambda: self.tracker.factor
        )
        self._tensors = TrainingTensors(model, self._optimizer, config.sparse_optimizer)
        self._own = RankState(model, surroundings.device, config.seed)
        self.average = MovingAverage(model, config.ema, config.ema_every) if config.ema else None
        self._pipeline: TrainPipelineSparseDist[Batch, tuple[Tensor, Tensor, Tensor]] = TrainPipelineSparseDist(
            model, self._optimizer, surroundings.device, execute_all_batches=True, custom_model_fwd=self._forward
        )
        self._control = Control(longest_wait(surroundings.timeout))
        self._stretch: list[Tensor] = []  # losses since the last record
        # On a GPU the losses of a stretch are looked at together.
        self._watch = LossWatch(late=RECORD_EVERY if surroundings.device.type == "cuda" else 0)
        self._started = 0.0

    @property
    def total_samples(self) -> int:
        """Samples of the whole training, at today's batch size and number of ranks."""
        return self._config.epochs * len(self._s.train) * self._global_batch

    @property
    def samples(self) -> int:
        """Samples that stand for how far the training has come, out of ``total_samples``."""
        return self.point.epoch * len(self._s.train) * self._global_batch + self.point.row

    def resume(self, manifest: Manifest) -> tuple[dict[str, Pieces], Callable[[], None]]:
        """Prepare to resume from a checkpoint.

        Args:
            manifest: its manifest.

        Returns:
            What to read of it, and what to call once it has been read.

        Raises:
            ValueError: two values of the manifest contradict each other.
            UserError: the checkpoint is of other data or another order.
        """
        point = manifest.point
        position = self._position(point)
        if manifest.position != position:
            raise UserError(
                f"{self._s.folder}: the checkpoint of step {manifest.step} is at {manifest.position} of the data, "
                f"these data have {position}; name the data that the run was trained on"
            )
        manifest.check(self._config, rows=self._rows, widths=self._tensors.widths)
        state, finish = self._tensors.to_read(manifest.columns)
        own, finish_own = self._own.to_read(
            ranks=manifest.world_size, random_bytes=manifest.random, losses=manifest.losses
        )
        averages, finish_averages = ({}, None) if self.average is None else self.average.to_read(manifest.world_size)

        def go_on() -> None:
            finish()
            if finish_averages is not None:
                finish_averages()
            self._stretch = finish_own(point.step)
            self.point = point
            self.tracker.state = manifest.tracker
            self._s.train.load_state_dict(position)
            # The same number, unless batches have another size now: then how far, in today's steps.
            exact, rest = divmod(self.samples, self._global_batch)
            set_rates(self._scheduler, exact if rest == 0 else self.samples / self._global_batch)

        return state | own | averages, go_on

    def run(self) -> None:
        """Train to the end, with the evaluations and checkpoints on the way.

        Raises:
            UserError: the loss is no number, the data have changed, or a disk refuses.
            Preempted: the training was asked to stop; its state is saved.
        """
        point, loader = self.point, self._s.train
        if not point.evaluated:
            self._evaluate()
            self._save()
        self._model.train()
        batches = self._batches()
        steps, done = (loader.steps_left if point.row else len(loader)), 0
        self._started = time.perf_counter()
        trained = False
        while point.epoch < self._config.epochs and not self.tracker.stopped:
            if done == steps:  # at once, where what is left of an epoch is less than a batch of today
                self._end_epoch()
                steps, done = len(loader), 0
                continue
            self._step(batches)
            trained = True
            done += 1
            ends = done == steps
            point.row += self._global_batch
            if ends:
                self._end_epoch()
                steps, done = len(loader), 0
            last = ends and point.epoch == self._config.epochs
            if self.average is not None:
                self.average.update(point.step, last=last)
            self._after(ends, last=last)
        self.point.seconds += time.perf_counter() - self._started
        # The silent fallback of a model that cannot be traced: it would train as well, and overlap nothing.
        assert not trained or self._pipeline._pipelined_modules, "the sparse arch is not pipelined"
        self._pipeline.detach()

    def averaged(self) -> AbstractContextManager[None]:
        """Let the model have the weights that count: their moving average, where one is kept."""
        return nullcontext() if self.average is None else self.average.in_place()

    def heed(self) -> None:
        """Look after the data, and for requests to stop, where nothing else does: before each step of an evaluation.

        Raises:
            UserError: the data have changed.
            Preempted: the training was asked to stop.
        """
        self._s.signs.at("evaluation", self.point.step)
        self._s.files.check()
        signum, _ = self._control.exchange(self._s.requests.signum, None)
        if signum:
            raise Preempted(signum, "")

    def refuse_predictions(self) -> Never:
        """End the training over an evaluation whose predictions are not finite; a collective.

        Raises:
            UserError: always.
        """
        refuse_predictions(self.point.step, self._s.folder, self._s.checkpoints)

    def stop(self, signum: int, *, save: bool = True) -> None:
        """Save the state, unless it is saved, and end.

        Args:
            signum: the signal that asked for it.
            save: False where the model holds other weights than those of this step, which is saved.

        Raises:
            Preempted: always.
        """
        checkpoints, step = self._s.checkpoints, self.point.step
        checkpoints.wait()
        if save and checkpoints.saved != step:
            self._save()
            checkpoints.wait()
        dist.barrier()
        name = signal.Signals(signum).name
        where = checkpoints.store.shown(step)
        raise Preempted(
            signum, f"stopped by {name} after step {step}, saved in {where}; the same command goes on from there"
        )

    def _end_epoch(self) -> None:
        point = self.point
        if point.dropped is not None:
            point.dropped += self._rows - point.row
        point.epoch, point.row = point.epoch + 1, 0

    def _step(self, batches: Iterator[Batch]) -> None:
        point = self.point
        self._s.signs.at("training", point.step + 1)
        loss, _, _ = self._pipeline.progress(batches)
        loss = loss.detach()
        point.step += 1
        point.samples += self._global_batch
        self._stretch.append(loss)
        self._watch.rates(point.step, self._learning_rates())
        if loss.device.type == "cpu":
            self._watch.look_at(point.step, [loss])
        self._scheduler.step()

    def _after(self, ends: bool, *, last: bool) -> None:
        """Everything that follows a step but is no part of it."""
        point, config = self.point, self._config
        if point.step % RECORD_EVERY == 0 or last:
            self._record(ends)
        signum, bad = self._control.exchange(self._s.requests.signum, self._watch.bad_step)
        due = self._s.validation is not None and (point.step % config.eval_every == 0 if config.eval_every else ends)
        point.evaluated = not due or last  # the last one comes after the loop
        self._watch.refuse(bad, self._s.folder, self._s.checkpoints)
        if signum:
            self._pause()
            self.stop(signum)
        best = False
        if due and not last:
            self._pause()
            best = self._evaluate()
            self._started = time.perf_counter()
        self._s.checkpoints.poll()
        if (
            best
            or last
            or self.tracker.stopped
            or (point.step % config.checkpoint_every == 0 if config.checkpoint_every else ends)
        ):
            self._pause()
            self._save()
            self._started = time.perf_counter()

    def _pause(self) -> None:
        now = time.perf_counter()
        self.point.seconds += now - self._started
        self._started = now

    def _forward(self, batch: Batch | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        with autocast(self._config.precision, self._s.device):
            return self._model(batch)  # type: ignore[no-any-return]

    def _batches(self) -> Iterator[Batch]:
        """Every epoch's batches in one stream, so that the pipeline need not run dry in between."""
        step = self.point.step
        for epoch in range(self.point.epoch, self._config.epochs):
            if epoch > self.point.epoch or self.point.row == 0:
                self._s.train.set_epoch(epoch)
            batches = iter(self._s.train)
            while True:
                self._s.files.check()
                self._s.signs.at("reading data", self.point.step + 1)
                batch = next(batches, None)
                self._s.signs.at("training", self.point.step + 1)
                if batch is None:
                    break
                step += 1
                self._watch.batch(step, batch)
                yield batch

    def _position(self, point: TrainingPoint) -> dict[str, Any]:
        return self._s.train.state_dict() | {"epoch": point.epoch, "row": point.row}

    def _save(self) -> None:
        self._s.signs.at("checkpoint", self.point.step)
        if self._stretch:
            self._watch.look_at(self.point.step - len(self._stretch) + 1, self._stretch)
        signum, bad = self._control.now(self._s.requests.signum, self._watch.bad_step)
        del signum  # heard again at the next step
        self._watch.refuse(bad, self._s.folder, self._s.checkpoints)
        state = self._tensors.to_save()
        if self.average is not None:
            state |= self.average.to_save()
        own, counts = self._own.to_save(self._stretch)
        meta = {
            **self._s.about,
            **counts,
            "point": msgspec.to_builtins(self.point),
            "position": self._position(self.point),
            "tracker": msgspec.to_builtins(self.tracker.state),
            "columns": self._tensors.columns,
        }
        best = self.tracker.best_step
        self._s.checkpoints.save(self.point.step, state | own, meta, keep=() if best is None else (best,))

    def _learning_rates(self) -> dict[str, float]:
        groups = list(self._optimizer.param_groups)  # the fused ones first; without any, all are Adam's
        return {"sparse": float(groups[0]["lr"]), "dense": float(groups[-1]["lr"])}

    def _record(self, ends: bool) -> None:
        stretch, self._stretch = self._stretch, []
        self._watch.look_at(self.point.step - len(stretch) + 1, stretch)
        total = torch.stack([loss.to(self._s.device) for loss in stretch]).mean()
        dist.all_reduce(total)
        if self.progress is not None:
            point = self.point
            self.progress.train(
                step=point.step,
                epoch=point.epoch if ends else point.epoch + 1,
                loss=total.item() / dist.get_world_size(),
                lr=self._watch.newest_rates,
                samples=self.samples,
                rate=point.samples / (point.seconds + time.perf_counter() - self._started),
            )

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; say whether it is the best so far."""
        assert self._s.validation is not None
        step = self.point.step
        self._s.signs.at("evaluation", step)
        self._pipeline.detach()  # batches in flight stay there, and the next step attaches again
        try:
            with self.averaged():
                metrics = evaluate(self._model, self._s.validation, self._s.device, self._config.precision, self.heed)
        except Preempted as request:
            self.stop(request.signum)
        except NotFiniteError:
            self.refuse_predictions()
        self._model.train()
        self.point.evaluated = True
        verdict = self.judge(metrics)
        if self.progress is not None:
            self.progress.evaluation(step=step, split="validation", metrics=metrics)
            if verdict.drop:
                self.progress.say(f"step {step}  learning rates drop to {self.tracker.factor:g} of the schedule's")
            if verdict.stop:
                self.progress.say(f"step {step}  no better {self._config.metric} since step {self.tracker.best_step}")
        if verdict.drop:
            set_rates(self._scheduler, self._scheduler.last_epoch)
        return verdict.best

    def judge(self, metrics: Metrics) -> Verdict:
        """Tell the tracker of an evaluation on the validation split.

        Returns:
            Its verdict.
        """
        return self.tracker.update(self.point.step, monitored(metrics, self._config.metric))


def monitored(metrics: Metrics, metric: Metric) -> float | None:
    """The value of an evaluation by which it is judged; None where it has none.

    Example:
        >>> monitored(Metrics(rows=9, logloss=0.25, auc=0.75, ne=None, calibration=None), "auc-logloss")
        0.5
    """
    if metric == "auc-logloss":
        return None if metrics.auc is None else metrics.auc - metrics.logloss
    value: float | None = getattr(metrics, metric)
    return value

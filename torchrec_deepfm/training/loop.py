"""The training loop: steps, records, evaluations, checkpoints, and how to resume from any step."""

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.distributed.health import DataFiles, Heartbeat, longest_wait
from torchrec_deepfm.distributed.step_sync import Control
from torchrec_deepfm.distributed.stop_signals import Preempted, Requests
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.arches import check_seen_ids
from torchrec_deepfm.training.checkpoint.dcp import TensorCuts
from torchrec_deepfm.training.checkpoint.manager import Checkpoints
from torchrec_deepfm.training.checkpoint.rank_state import RankState
from torchrec_deepfm.training.checkpoint.tensors import TrainingTensors
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.monitoring.early_stopping import Tracker, Verdict
from torchrec_deepfm.training.monitoring.nonfinite import LossWatch, refuse_predictions
from torchrec_deepfm.training.monitoring.step_profile import StepProfiler
from torchrec_deepfm.training.optim.ema import MovingAverage
from torchrec_deepfm.training.optim.optimizers import make_optimizer, make_scheduler, set_rates
from torchrec_deepfm.training.run.formats import RECORD_EVERY, Manifest, TrainingPosition
from torchrec_deepfm.training.run.tracking.progress import Progress
from torchrec_deepfm.training.scoring.evaluation import autocast, evaluate_split
from torchrec_deepfm.training.scoring.metrics import Metrics, NotFiniteError

EXCHANGE_EVERY = 4  # steps on a GPU: an exchange takes 0.15 ms of the thread that launches kernels, a step some 3 ms


@dataclass(frozen=True, kw_only=True)
class LoopContext:
    """What a ``Loop`` gets from its owner.

    ``about`` is what every manifest records of the run. ``timeout``: seconds after which a step may count as stalled.
    ``prefetch``: the plan caches rows on the device.
    """

    config: TrainConfig
    device: torch.device
    train: Loader
    validation: Loader | None
    checkpoints: Checkpoints
    about: Mapping[str, Any]
    requests: Requests
    heartbeat: Heartbeat
    files: DataFiles
    folder: Path
    timeout: float
    profiler: StepProfiler
    prefetch: bool = False


class Loop:
    """Steps, records, evaluations and checkpoints of one training.

    ``progress`` prints and records them; rank 0 sets it once the first step is known.
    """

    def __init__(self, model: DistributedModelParallel, context: LoopContext) -> None:
        self._model, self._context = model, context
        config = context.config
        self._config = config
        self.position = TrainingPosition(dropped=0)
        self.tracker = Tracker(
            metric=config.metric, patience=config.patience, lr_patience=config.lr_patience, lr_factor=config.lr_factor
        )
        self.progress: Progress | None = None
        self._rows = int(context.train.state_dict()["rows"])
        self._global_batch = config.batch_size * dist.get_world_size()
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(
            self._optimizer, config, config.epochs * len(context.train), lambda: self.tracker.factor
        )
        self._tensors = TrainingTensors(model, self._optimizer, config.sparse_optimizer)
        self._rank_state = RankState(model, context.device, config.seed)
        self.average = MovingAverage(model, config.ema, config.ema_every) if config.ema else None
        self._pipeline = self._make_pipeline()
        on_gpu = context.device.type == "cuda"
        self._control = Control(longest_wait(context.timeout), every=EXCHANGE_EVERY if on_gpu else 1)
        self._pending_losses: list[Tensor] = []  # since the last record
        # On a GPU the pending losses are checked together: reading each would wait for the GPU.
        self._watch = LossWatch(context.train, late=RECORD_EVERY if on_gpu else 0)
        self._started = 0.0

    @property
    def total_samples(self) -> int:
        """Samples of the whole training, at today's batch size and number of ranks."""
        return self._config.epochs * len(self._context.train) * self._global_batch

    @property
    def samples(self) -> int:
        """Samples done, out of ``total_samples``, at today's batch size."""
        return self.position.epoch * len(self._context.train) * self._global_batch + self.position.row

    def resume(self, manifest: Manifest) -> tuple[dict[str, TensorCuts], Callable[[], None]]:
        """Prepare to resume from a checkpoint.

        Returns the state to read into, and a function to call once it has been read. Raises ``ValueError``: two values
        of the manifest contradict each other.
        """
        position = manifest.point
        loader_state = self._loader_state(position)
        if manifest.position != loader_state:
            raise UserError(
                f"the checkpoint of step {manifest.step} is at {manifest.position} of its data, but --data "
                f"has {loader_state}",
                where=self._context.folder,
                remedy="name the data that the run was trained on",
            )
        manifest.check(self._config, rows=self._rows, widths=self._tensors.widths)
        state, finish = self._tensors.to_read(manifest.columns)
        rank_state, finish_rank_state = self._rank_state.to_read(
            ranks=manifest.world_size, random_bytes=manifest.random, losses=manifest.losses
        )
        averages, finish_averages = ({}, None) if self.average is None else self.average.to_read(manifest.world_size)

        def restore() -> None:
            finish()
            if finish_averages is not None:
                finish_averages()
            self._pending_losses = finish_rank_state(position.step)
            self.position = position
            self.tracker.state = manifest.tracker
            self._context.train.load_state_dict(loader_state)
            # The manifest's step, unless the batch size has changed: then the progress in steps of today's size.
            exact, rest = divmod(self.samples, self._global_batch)
            set_rates(self._scheduler, exact if rest == 0 else self.samples / self._global_batch)

        return state | rank_state | averages, restore

    def run(self) -> None:
        """Train to the end, with the evaluations and checkpoints on the way.

        Raises ``Preempted``: the training was asked to stop; its state is saved.
        """
        position, loader = self.position, self._context.train
        if not position.evaluated:
            self._evaluate()
            self._save()
        self._model.train()
        batches = self._batches()
        steps, done = (loader.steps_left if position.row else len(loader)), 0
        self._started = time.perf_counter()
        trained = False
        while position.epoch < self._config.epochs and not self.tracker.stopped:
            if done == steps:  # right after a resume, if the rest of the epoch is less than one batch
                self._end_epoch()
                steps, done = len(loader), 0
                continue
            self._step(batches)
            trained = True
            done += 1
            ends = done == steps
            position.row += self._global_batch
            if ends:
                self._end_epoch()
                steps, done = len(loader), 0
            last = ends and position.epoch == self._config.epochs
            if self.average is not None:
                self.average.update(position.step, last=last)
            self._after(ends, last=last)
            goes_on = not last and not self.tracker.stopped
            if goes_on and self._context.prefetch and self._is_evaluated(position.step, ends):
                if position.row:
                    loader.load_state_dict(self._loader_state(position))
                batches = self._batches()
                self._pipeline = self._make_pipeline()  # an empty one of this kind can't be attached again
        self.position.seconds += time.perf_counter() - self._started
        # TorchRec silently falls back for a model that cannot be traced: it trains too, but overlaps nothing.
        assert not trained or self._pipeline._pipelined_modules, "the sparse arch is not pipelined"
        self._pipeline.detach()

    def averaged(self) -> AbstractContextManager[None]:
        """Swap in the weights to evaluate: their moving average, if one is kept."""
        return nullcontext() if self.average is None else self.average.in_place()

    def check_between_steps(self) -> None:
        """Check the data files and the requests to stop, before each step of an evaluation; a collective.

        Raises:
            UserError: the data have changed.
            Preempted: the training was asked to stop.
        """
        self._context.heartbeat.at("evaluation", self.position.step)
        self._context.files.check()
        signum, _ = self._control.exchange(self._context.requests.signum, None)
        if signum:
            raise Preempted(signum, "")

    def refuse_predictions(self) -> Never:
        """End the training over an evaluation whose predictions are not finite; a collective.

        Raises:
            UserError: always.
        """
        refuse_predictions(self.position.step, self._context.folder, self._context.checkpoints)

    def stop(self, signum: int, *, save: bool = True) -> None:
        """Save the state, unless this step is saved already, and end the training.

        Args:
            signum: the signal that asked for it.
            save: False if the model holds restored weights; this step is saved then.

        Raises:
            Preempted: always.
        """
        checkpoints, step = self._context.checkpoints, self.position.step
        checkpoints.wait()
        if save and checkpoints.saved != step:
            self._save()
            checkpoints.wait()
        dist.barrier()
        name = signal.Signals(signum).name
        where = checkpoints.store.shown(step)
        raise Preempted(
            signum, f"stopped by {name} after step {step}, saved in {where}; run the same command to resume"
        )

    def _end_epoch(self) -> None:
        position = self.position
        if position.dropped is not None:
            position.dropped += self._rows - position.row
        position.epoch, position.row = position.epoch + 1, 0

    def _step(self, batches: Iterator[Batch]) -> None:
        position = self.position
        self._context.heartbeat.at("training", position.step + 1)
        loss, _, _ = self._pipeline.progress(batches)
        loss = loss.detach()
        position.step += 1
        position.samples += self._global_batch
        self._pending_losses.append(loss)
        self._watch.rates(position.step, self._learning_rates())
        if loss.device.type == "cpu":
            self._watch.check(position.step, [loss])
        self._scheduler.step()
        self._context.profiler.after_step()

    def _after(self, ends: bool, *, last: bool) -> None:
        """Record, evaluate, save and stop after a step, as far as each is due."""
        position, config = self.position, self._config
        if position.step % RECORD_EVERY == 0 or last:
            self._record(ends)
        signum, bad = self._control.after_step(position.step, self._context.requests.signum, self._watch.bad_step)
        due = self._is_evaluated(position.step, ends)
        position.evaluated = not due or last  # the last evaluation comes after the loop
        self._watch.refuse(bad, self._context.folder, self._context.checkpoints)
        if signum:
            self._pause()
            self.stop(signum)
        best = False
        if due and not last:
            self._pause()
            best = self._evaluate()
            self._started = time.perf_counter()
        self._context.checkpoints.poll()
        if (
            best
            or last
            or self.tracker.stopped
            or (position.step % config.checkpoint_every == 0 if config.checkpoint_every else ends)
        ):
            self._pause()
            self._save()
            self._started = time.perf_counter()

    def _make_pipeline(self) -> "TrainPipelineSparseDist[Batch, tuple[Tensor, Tensor, Tensor]]":
        # Rows that a plan caches on the GPU are fetched one batch ahead.
        kind = PrefetchTrainPipelineSparseDist if self._context.prefetch else TrainPipelineSparseDist
        return kind(
            self._model,
            self._optimizer,
            self._context.device,
            execute_all_batches=True,
            custom_model_fwd=self._forward,
        )

    def _is_evaluated(self, step: int, ends: bool) -> bool:
        """Whether an evaluation comes after a step, which may end its epoch."""
        every = self._config.eval_every
        return self._context.validation is not None and (step % every == 0 if every else ends)

    def _pause(self) -> None:
        now = time.perf_counter()
        self.position.seconds += now - self._started
        self._started = now

    def _forward(self, batch: Batch | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        with autocast(self._config.precision, self._context.device):
            return self._model(batch)  # type: ignore[no-any-return]

    def _batches(self) -> Iterator[Batch]:
        """The batches of all epochs in one stream, so that the pipeline stays full between epochs.

        With rows fetched ahead it ends before each evaluation: a look-up takes the rows that were fetched first, and
        those of the evaluation would be the next step's.
        """
        step = self.position.step
        for epoch in range(self.position.epoch, self._config.epochs):
            if epoch > self.position.epoch or self.position.row == 0:
                self._context.train.set_epoch(epoch)
            batches = iter(self._context.train)
            for number in itertools.count():
                self._context.files.check()
                self._context.heartbeat.at("reading data", self.position.step + 1)
                batch = next(batches, None)
                self._context.heartbeat.at("training", self.position.step + 1)
                if batch is None:
                    break
                step += 1
                self._watch.place(step, self._context.train.position(number))
                yield batch
                ends = number + 1 == self._context.train.steps_left
                if self._context.prefetch and self._is_evaluated(step, ends):
                    return

    def _loader_state(self, position: TrainingPosition) -> dict[str, Any]:
        return self._context.train.state_dict() | {"epoch": position.epoch, "row": position.row}

    def _save(self) -> None:
        self._context.heartbeat.at("checkpoint", self.position.step)
        if self._pending_losses:
            self._check_losses(self._pending_losses)
        signum, bad = self._control.now(self._context.requests.signum, self._watch.bad_step)
        del signum  # read again at the next step
        self._watch.refuse(bad, self._context.folder, self._context.checkpoints)
        state = self._tensors.to_save()
        if self.average is not None:
            state |= self.average.to_save()
        rank_state, counts = self._rank_state.to_save(self._pending_losses)
        meta = {
            **self._context.about,
            **counts,
            "point": msgspec.to_builtins(self.position),
            "position": self._loader_state(self.position),
            "tracker": msgspec.to_builtins(self.tracker.state),
            "columns": self._tensors.columns,
        }
        best = self.tracker.best_step
        self._context.checkpoints.save(
            self.position.step, state | rank_state, meta, keep=() if best is None else (best,)
        )

    def _learning_rates(self) -> dict[str, float]:
        # Not the tables' own group: a rank without tables has none.
        factor = self._scheduler.lr_lambdas[-1](self._scheduler.last_epoch)
        return {"sparse": self._config.sparse_lr * factor, "dense": self._config.dense_lr * factor}

    def _record(self, ends: bool) -> None:
        losses, self._pending_losses = self._pending_losses, []
        self._check_losses(losses)
        total = torch.stack([loss.to(self._context.device) for loss in losses]).mean()
        dist.all_reduce(total)
        if self.progress is not None:
            position = self.position
            seconds = position.seconds + time.perf_counter() - self._started
            self.progress.train(
                step=position.step,
                epoch=position.epoch if ends else position.epoch + 1,
                loss=total.item() / dist.get_world_size(),
                lr=self._watch.newest_rates,
                samples=self.samples,
                rate=position.samples / seconds,
                seconds=seconds,
            )

    def _check_losses(self, losses: Sequence[Tensor]) -> None:
        """Check the losses of the last steps; on a GPU their ids too, since it is waited for here anyway."""
        self._watch.check(self.position.step - len(losses) + 1, losses)
        if self._context.device.type == "cuda":
            check_seen_ids(self._model)

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; return whether it is the best so far."""
        assert self._context.validation is not None
        step = self.position.step
        self._context.heartbeat.at("evaluation", step)
        self._pipeline.detach()  # batches in flight stay; the next step attaches again
        try:
            with self.averaged():
                metrics = evaluate_split(
                    self._model,
                    self._context.validation,
                    self._context.device,
                    self._config.precision,
                    self.check_between_steps,
                )
        except Preempted as request:
            self.stop(request.signum)
        except NotFiniteError:
            self.refuse_predictions()
        self._model.train()
        self.position.evaluated = True
        verdict = self.record_validation(metrics)
        if self.progress is not None:
            self.progress.evaluation(step=step, split="validation", metrics=metrics)
            if verdict.drop:
                self.progress.say(f"step {step}  learning rates drop to {self.tracker.factor:g} of the schedule's")
            if verdict.stop:
                self.progress.say(f"step {step}  no better {self._config.metric} since step {self.tracker.best_step}")
        if verdict.drop:
            set_rates(self._scheduler, self._scheduler.last_epoch)
        return verdict.best

    def record_validation(self, metrics: Metrics) -> Verdict:
        """Pass an evaluation on the validation split to the tracker."""
        return self.tracker.update(self.position.step, metrics.monitored(self._config.metric))

"""The steps of a training: what happens at each of them, and what it takes to go on from any of them."""

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_deepfm.data.loader import Loader
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.checkpoint import Checkpoints
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.control import Control
from torchrec_deepfm.training.dcp import Pieces
from torchrec_deepfm.training.disk import refused
from torchrec_deepfm.training.evaluation import autocast, evaluate
from torchrec_deepfm.training.metrics import Metrics
from torchrec_deepfm.training.optimizers import make_optimizer, make_scheduler, set_rates
from torchrec_deepfm.training.progress import Progress
from torchrec_deepfm.training.ranks import is_main
from torchrec_deepfm.training.signals import Preempted, Requests
from torchrec_deepfm.training.state import TrainingTensors, local_buffers, rank_rows, read_rank_rows
from torchrec_deepfm.training.stopping import Tracker, Verdict
from torchrec_deepfm.training.watch import DataFiles
from torchrec_deepfm.training.watch import Progress as Signs

# Steps between two records of the running loss. Reading the loss off a GPU waits for it, so not at each step.
RECORD_EVERY = 20
# Batches that are in the pipeline, and not trained on yet, with some to spare.
_AHEAD = 8


@dataclass(kw_only=True)
class Point:
    """How far a training has come.

    Attributes:
        step: optimizer steps done.
        epoch: the current epoch, from 0; the number of epochs at the end.
        row: rows of the current epoch's order that all ranks together have seen.
        samples: samples seen by all ranks since the start.
        seconds: spent on training, without evaluations.
        evaluated: False if the evaluation that is due after this step has not been done.
    """

    step: int = 0
    epoch: int = 0
    row: int = 0
    samples: int = 0
    seconds: float = 0.0
    evaluated: bool = True


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
        timeout: seconds that ranks wait for each other.
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
        progress: what tells of it; rank 0 sets it once it is known where the training begins.
    """

    def __init__(self, model: DistributedModelParallel, surroundings: Surroundings) -> None:
        self._model, self._s = model, surroundings
        config = surroundings.config
        self._config = config
        self.point = Point()
        self.tracker = Tracker(
            metric=config.metric, patience=config.patience, lr_patience=config.lr_patience, lr_factor=config.lr_factor
        )
        self.progress: Progress | None = None
        self._global_batch = config.batch_size * dist.get_world_size()
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(
            self._optimizer, config, config.epochs * len(surroundings.train), lambda: self.tracker.factor
        )
        self._tensors = TrainingTensors(model, self._optimizer, config.sparse_optimizer)
        self._pipeline: TrainPipelineSparseDist[Batch, tuple[Tensor, Tensor, Tensor]] = TrainPipelineSparseDist(
            model, self._optimizer, surroundings.device, execute_all_batches=True, custom_model_fwd=self._forward
        )
        self._control = Control(surroundings.timeout)
        self._stretch: list[Tensor] = []  # losses since the last record
        self._bad_step: int | None = None
        on_gpu = surroundings.device.type == "cuda"
        self._recent: deque[tuple[int, Batch]] = deque(maxlen=_AHEAD + (RECORD_EVERY if on_gpu else 0))
        self._rates: deque[tuple[int, dict[str, float]]] = deque(maxlen=self._recent.maxlen)
        self._started = 0.0

    @property
    def total_samples(self) -> int:
        """Samples of the whole training, at today's batch size and number of ranks."""
        return self._config.epochs * len(self._s.train) * self._global_batch

    @property
    def samples(self) -> int:
        """Samples that stand for how far the training has come, out of ``total_samples``."""
        return self.point.epoch * len(self._s.train) * self._global_batch + self.point.row

    def resume(self, manifest: Mapping[str, Any]) -> tuple[dict[str, Pieces], Callable[[], None]]:
        """Prepare to go on from a checkpoint.

        Args:
            manifest: its manifest.

        Returns:
            What to read of it, and what to call once it has been read.

        Raises:
            KeyError, TypeError, ValueError: the manifest lacks something, or it has another type.
            UserError: the checkpoint is of other data or another order.
        """
        state, finish = self._tensors.to_read(manifest["columns"])
        ranks = int(manifest["world_size"])
        if not 1 <= ranks <= 2**20 or not 0 <= int(manifest["random"]) <= 2**20 or not 0 <= manifest["losses"] <= 2**20:
            raise ValueError("numbers that no training has")
        key, state[key], random = read_rank_rows("random", ranks, [int(manifest["random"])], torch.uint8)
        key, state[key], losses = read_rank_rows("losses", ranks, [int(manifest["losses"])], torch.float32)
        buffers = local_buffers(self._model)
        own = {}
        for name, buffer in buffers.items():
            key, state[key], own[name] = read_rank_rows(f"model.{name}", ranks, buffer.shape, buffer.dtype)
        point = Point(**manifest["point"])
        position = self._position(point)
        if manifest["position"] != position:
            raise UserError(
                f"{self._s.folder}: the checkpoint of step {point.step} is at {manifest['position']} of the data, "
                f"these data have {position}; name the data that the run was trained on"
            )

        def go_on() -> None:
            finish()
            self.point = point
            self.tracker.load_json(manifest["tracker"])
            self._s.train.load_state_dict(position)
            # The same number, unless batches have another size now: then how far, in today's steps.
            exact, rest = divmod(self.samples, self._global_batch)
            set_rates(self._scheduler, exact if rest == 0 else self.samples / self._global_batch)
            rank = dist.get_rank()
            self._stretch = list((losses[rank] if ranks == dist.get_world_size() else losses.mean(0)).unbind())
            if ranks == dist.get_world_size():
                _set_random_state(random[rank], self._s.device)
                for name, values in own.items():
                    buffers[name].copy_(values[rank])
            else:
                torch.manual_seed(self._config.seed + 1 + rank + 1_000_003 * point.step)

        return state, go_on

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
                point.epoch, point.row, steps, done = point.epoch + 1, 0, len(loader), 0
                continue
            self._step(batches)
            trained = True
            done += 1
            ends = done == steps
            if ends:
                point.epoch, point.row, steps, done = point.epoch + 1, 0, len(loader), 0
            else:
                point.row += self._global_batch
            self._after(ends, last=ends and point.epoch == self._config.epochs)
        self.point.seconds += time.perf_counter() - self._started
        # The silent fallback of a model that cannot be traced: it would train as well, and overlap nothing.
        assert not trained or self._pipeline._pipelined_modules, "the sparse arch is not pipelined"
        self._pipeline.detach()

    def heed(self) -> None:
        """Look after the data, and for requests to stop, where nothing else does: before each step of an evaluation.

        Raises:
            UserError: the data have changed.
            Preempted: the training was asked to stop.
        """
        self._s.files.check()
        signum, _ = self._control.exchange(self._s.requests.signum, None)
        if signum:
            raise Preempted(signum, "")

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

    def _step(self, batches: Iterator[Batch]) -> None:
        point = self.point
        self._s.signs.at("training", point.step + 1)
        loss, _, _ = self._pipeline.progress(batches)
        loss = loss.detach()
        point.step += 1
        point.samples += self._global_batch
        self._stretch.append(loss)
        self._rates.append((point.step, self._learning_rates()))
        if loss.device.type == "cpu":
            self._look_at(point.step, [loss])
        self._scheduler.step()

    def _after(self, ends: bool, *, last: bool) -> None:
        """Everything that follows a step but is no part of it."""
        point, config = self.point, self._config
        if point.step % RECORD_EVERY == 0 or last:
            self._record(ends)
        signum, bad = self._control.exchange(self._s.requests.signum, self._bad_step)
        due = self._s.validation is not None and (point.step % config.eval_every == 0 if config.eval_every else ends)
        point.evaluated = not due or last  # the last one comes after the loop
        self._refuse(bad)
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
                self._recent.append((step, batch))
                yield batch

    def _position(self, point: Point) -> dict[str, Any]:
        return self._s.train.state_dict() | {"epoch": point.epoch, "row": point.row}

    def _save(self) -> None:
        if self._stretch:
            self._look_at(self.point.step - len(self._stretch) + 1, self._stretch)
        signum, bad = self._control.now(self._s.requests.signum, self._bad_step)
        del signum  # heard again at the next step
        self._refuse(bad)
        state = self._tensors.to_save()
        losses = torch.stack([loss.float().cpu() for loss in self._stretch]) if self._stretch else torch.empty(0)
        own = {f"model.{name}": value for name, value in local_buffers(self._model).items()}
        for name, mine in {"random": _random_state(self._s.device), "losses": losses, **own}.items():
            key, pieces = rank_rows(name, mine)
            state[key] = pieces
        meta = {
            **self._s.about,
            "world_size": dist.get_world_size(),
            "point": asdict(self.point),
            "position": self._position(self.point),
            "tracker": self.tracker.to_json(),
            "columns": self._tensors.columns,
            "random": len(_random_state(self._s.device)),
            "losses": len(self._stretch),
        }
        best = self.tracker.best_step
        self._s.checkpoints.save(self.point.step, state, meta, keep=() if best is None else (best,))

    def _look_at(self, first_step: int, losses: list[Tensor]) -> None:
        """Remember the first loss that is no number."""
        if self._bad_step is None:
            values = [loss.item() for loss in losses]
            bad = (first_step + i for i, value in enumerate(values) if not math.isfinite(value))
            self._bad_step = next(bad, None)

    def _refuse(self, bad_step: int | None) -> None:
        if bad_step is None:
            return
        self._s.checkpoints.wait()
        saved = self._s.checkpoints.saved
        rates = next((rates for step, rates in self._rates if step == bad_step), {})
        folder = self._s.folder / f"nonfinite_step_{bad_step:08d}"
        batch = next((batch for step, batch in self._recent if step == bad_step), None)
        try:
            folder.mkdir(exist_ok=True)
            if batch is not None:
                torch.save(_plain(batch), folder / f"rank_{dist.get_rank()}.pt")
            if is_main():
                about = {"step": bad_step, "lr": rates, "checkpoint": saved, "world_size": dist.get_world_size()}
                (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise refused(folder, error) from error
        dist.barrier()
        told = " ".join(f"{name} {rate:g}" for name, rate in rates.items())
        stands = "no checkpoint" if saved is None else f"the checkpoint {self._s.checkpoints.store.shown(saved)}"
        raise UserError(
            f"step {bad_step}: the loss is not finite (learning rates: {told}); its batch is saved in {folder}, before "
            f"it stands {stands}; lower --sparse-lr or --dense-lr and train into another folder"
        )

    def _learning_rates(self) -> dict[str, float]:
        groups = list(self._optimizer.param_groups)  # the fused ones first; without any, all are Adam's
        return {"sparse": float(groups[0]["lr"]), "dense": float(groups[-1]["lr"])}

    def _record(self, ends: bool) -> None:
        stretch, self._stretch = self._stretch, []
        self._look_at(self.point.step - len(stretch) + 1, stretch)
        total = torch.stack([loss.to(self._s.device) for loss in stretch]).mean()
        dist.all_reduce(total)
        if self.progress is not None:
            point = self.point
            self.progress.train(
                step=point.step,
                epoch=point.epoch if ends else point.epoch + 1,
                loss=total.item() / dist.get_world_size(),
                lr=self._rates[-1][1],
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
            metrics = evaluate(self._model, self._s.validation, self._s.device, self._config.precision, self.heed)
        except Preempted as request:
            self.stop(request.signum)
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
        return self.tracker.update(self.point.step, getattr(metrics, self._config.metric))


def _random_state(device: torch.device) -> Tensor:
    """The state of this rank's random numbers, uint8 [n]: the CPU's, then the GPU's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    count = len(torch.get_rng_state())
    torch.set_rng_state(state[:count].clone())
    if device.type == "cuda" and len(state) > count:
        torch.cuda.set_rng_state(state[count:].clone(), device)


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch as plain tensors, which ``torch.load(weights_only=True)`` reads."""
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

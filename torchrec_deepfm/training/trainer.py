"""The training loop: loaders, sharded model, pipeline, evaluations, and the files that they leave."""

import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_deepfm.data.loader import Loader
from torchrec_deepfm.data.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training import run_folder
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.checkpoint import load_model, save_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.evaluation import autocast, evaluate
from torchrec_deepfm.training.metrics import Metrics, lift
from torchrec_deepfm.training.optimizers import make_optimizer, make_scheduler
from torchrec_deepfm.training.progress import Progress
from torchrec_deepfm.training.ranks import is_main, on_main, shared_mistakes

# Steps between two records of the running loss. Reading the loss off a GPU waits for it, so not at each step.
RECORD_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training, the same on every rank.

    Attributes:
        folder: the run's folder.
        summary: the content of ``summary.json``.
    """

    folder: Path
    summary: dict[str, Any]


def train(config: TrainConfig, data: PreparedData, output: Path, device: torch.device) -> Result:
    """Train a sharded DeepFM and evaluate it; a collective over the current process group.

    Args:
        config: model and training options.
        data: the prepared data.
        output: the run's folder; must be free.
        device: this rank's device.

    Returns:
        The folder and the summary of the run.

    Raises:
        UserError: the folder is taken, the data do not fit the options or hold bad values, or the tables fit no plan.
    """
    on_main(lambda: run_folder.check_free(output))
    train_loader = _loader(data, "train", config, shuffle=True, drop_last=True, device=device)
    eval_loaders = {
        split: _loader(data, split, config, shuffle=False, drop_last=False, device=device)
        for split in ("validation", "test")
    }
    torch.set_float32_matmul_precision("medium" if config.precision == "medium" else "highest")
    num_embeddings = {name: data.num_embeddings[name] for name in data.schema.categorical}
    is_weighted = bool(data.schema.weighted)
    sharded = build_model(config, num_embeddings, len(data.schema.numeric), device, is_weighted=is_weighted)
    run = run_folder.Run(config=config, num_embeddings=num_embeddings, numeric=data.schema.numeric)
    world_size = dist.get_world_size()
    on_main(lambda: run_folder.create(output, run, sharded.plan, data=data.folder, world_size=world_size))

    progress = None
    if is_main():
        progress = Progress(output, config.epochs * len(train_loader) * config.batch_size * world_size)
    loop = _Loop(config, sharded.model, train_loader, eval_loaders["validation"], device, progress)
    try:
        with shared_mistakes():
            loop.run()
            metrics = {
                split: evaluate(sharded.model, loader, device, config.precision)
                for split, loader in eval_loaders.items()
            }
        if progress is not None:
            for split, result in metrics.items():
                progress.evaluation(step=loop.total_steps, split=split, metrics=result, tell=False)
    except UserError:
        # Bad values in the data. There is nothing yet to keep, and a run that has no end would be in the way of the
        # next one. Every rank removes it, as rank 0 may be stopped, over the loss of its peer, before it gets here.
        shutil.rmtree(output, ignore_errors=True)
        raise
    finally:
        if progress is not None:
            progress.close()
    save_model(sharded.model, output / run_folder.CHECKPOINT)
    summary = _summary(config, data, metrics, loop)
    on_main(lambda: run_folder.write_json(output / "summary.json", summary))
    return Result(folder=output, summary=summary)


def evaluate_run(folder: Path, data: PreparedData, split: str, device: torch.device) -> dict[str, Any]:
    """Evaluate a trained run on a split, on any number of ranks; a collective.

    Args:
        folder: the run's folder.
        data: prepared data with the columns and ids of the run.
        split: the split to evaluate.
        device: this rank's device.

    Returns:
        The metrics, with the best reachable AUC and the lift where they are known; also written to
        ``evaluate_<split>.json`` in the run's folder.

    Raises:
        UserError: there is no run, or it does not fit the data.
    """
    run = run_folder.read(folder)
    _check_fits(run, data, folder)
    loader = _loader(data, split, run.config, shuffle=False, drop_last=False, device=device)
    torch.set_float32_matmul_precision("medium" if run.config.precision == "medium" else "highest")
    is_weighted = bool(data.schema.weighted)
    model = build_model(run.config, run.num_embeddings, len(run.numeric), device, is_weighted=is_weighted).model
    load_model(model, folder / run_folder.CHECKPOINT)
    values = _with_lift(evaluate(model, loader, device, run.config.precision), data, split)
    on_main(lambda: run_folder.write_json(folder / f"evaluate_{split}.json", values))
    return values


def _check_fits(run: run_folder.Run, data: PreparedData, folder: Path) -> None:
    if run.numeric != data.schema.numeric:
        raise UserError(f"--data {data.folder}: numeric columns {data.schema.numeric}, but the run has {run.numeric}")
    for name in sorted(set(run.num_embeddings) | set(data.num_embeddings)):
        mine, theirs = run.num_embeddings.get(name), data.num_embeddings.get(name)
        if mine != theirs:
            raise UserError(
                f"--data {data.folder}: column {name!r} has {theirs} ids, but {folder} was trained on {mine}; "
                "name the data that it was trained on, or data prepared with the same vocabulary"
            )


def _loader(
    data: PreparedData, split: str, config: TrainConfig, *, shuffle: bool, drop_last: bool, device: torch.device
) -> Loader:
    return Loader(
        data,
        split,
        batch_size=config.batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        shuffle=shuffle,
        seed=config.seed,
        drop_last=drop_last,
        pin_memory=device.type == "cuda",
    )


class _Loop:
    """Steps, records and evaluations of one training."""

    def __init__(
        self,
        config: TrainConfig,
        model: DistributedModelParallel,
        loader: Loader,
        validation: Loader,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._config = config
        self._model = model
        self._loader = loader
        self._validation = validation
        self._device = device
        self._progress = progress
        self.steps_per_epoch = len(loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.train_seconds = 0.0
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(self._optimizer, config, self.total_steps)
        self._pipeline: TrainPipelineSparseDist[Batch, tuple[Tensor, Tensor, Tensor]] = TrainPipelineSparseDist(
            model, self._optimizer, device, execute_all_batches=True, custom_model_fwd=self._forward
        )

    def run(self) -> None:
        """Train to the end, with the evaluations on the way."""
        self._model.train()
        batches = self._batches()
        stretch: list[Tensor] = []
        started = time.perf_counter()
        for step in range(1, self.total_steps + 1):
            loss, _, _ = self._pipeline.progress(batches)
            stretch.append(loss)
            lr = self._learning_rates()
            self._scheduler.step()
            last = step == self.total_steps
            if step % RECORD_EVERY == 0 or last:
                mean = self._mean(stretch)
                stretch = []
                self._record(step, mean, lr, self.train_seconds + time.perf_counter() - started)
            if self._evaluates_after(step) and not last:
                self.train_seconds += time.perf_counter() - started
                self._evaluate(step)
                started = time.perf_counter()
        self.train_seconds += time.perf_counter() - started
        # The silent fallback of a model that cannot be traced: it would train as well, and overlap nothing.
        assert self._pipeline._pipelined_modules, "the sparse arch is not pipelined"
        self._pipeline.detach()

    def samples(self, step: int) -> int:
        """Samples that all ranks have seen after ``step`` steps."""
        return step * self._config.batch_size * dist.get_world_size()

    def _forward(self, batch: Batch | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        with autocast(self._config.precision, self._device):
            return self._model(batch)  # type: ignore[no-any-return]

    def _batches(self) -> Iterator[Batch]:
        """Every epoch's batches in one stream, so that the pipeline need not run dry in between."""
        for epoch in itertools.count():
            self._loader.set_epoch(epoch)
            yield from self._loader
            if epoch + 1 == self._config.epochs:
                return

    def _mean(self, losses: list[Tensor]) -> float:
        total = torch.stack(losses).mean()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def _learning_rates(self) -> dict[str, float]:
        groups = list(self._optimizer.param_groups)  # the fused ones first; without any, all are Adam's
        return {"sparse": float(groups[0]["lr"]), "dense": float(groups[-1]["lr"])}

    def _record(self, step: int, loss: float, lr: dict[str, float], seconds: float) -> None:
        if self._progress is not None:
            epoch = (step - 1) // self.steps_per_epoch + 1
            samples = self.samples(step)
            self._progress.train(step=step, epoch=epoch, loss=loss, lr=lr, samples=samples, rate=samples / seconds)

    def _evaluates_after(self, step: int) -> bool:
        return step % (self._config.eval_every or self.steps_per_epoch) == 0

    def _evaluate(self, step: int) -> None:
        self._pipeline.detach()  # batches in flight stay there, and the next step attaches again
        metrics = evaluate(self._model, self._validation, self._device, self._config.precision)
        self._model.train()
        if self._progress is not None:
            self._progress.evaluation(step=step, split="validation", metrics=metrics)


def _with_lift(metrics: Metrics, data: PreparedData, split: str) -> dict[str, Any]:
    values: dict[str, Any] = metrics.to_json()
    best = data.optimum.get(split)
    if best is not None and metrics.auc is not None:
        values["best_reachable_auc"] = best["auc"]
        values["lift"] = lift(metrics.auc, best["auc"])
    return values


def _summary(config: TrainConfig, data: PreparedData, metrics: dict[str, Metrics], loop: _Loop) -> dict[str, Any]:
    return {
        **{split: _with_lift(result, data, split) for split, result in metrics.items()},
        "samples_per_second": loop.samples(loop.total_steps) / loop.train_seconds,
        "train_seconds": loop.train_seconds,
        "steps": loop.total_steps,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "world_size": dist.get_world_size(),
    }

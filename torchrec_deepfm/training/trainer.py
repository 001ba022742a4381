"""A whole training: loaders, sharded model, loop, evaluations, and the files they write."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.distributed.health import DataFiles, Heartbeat, explained, longest_wait
from torchrec_deepfm.distributed.process_group import is_main, on_main, raise_on_all_ranks
from torchrec_deepfm.distributed.run_lock import RunLock
from torchrec_deepfm.distributed.stop_signals import Preempted, Requests, requests_to_stop
from torchrec_deepfm.distributed.time_limit import stop_before_limit
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.build import Sharded, build_model
from torchrec_deepfm.training.checkpoint.manager import Checkpoints, save_model, try_load_model
from torchrec_deepfm.training.checkpoint.store import MANIFEST
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.loop import Loop, LoopContext
from torchrec_deepfm.training.monitoring.nonfinite import record_not_finite
from torchrec_deepfm.training.monitoring.quality import click_rate, first_loss_warnings, input_warnings, result_warnings
from torchrec_deepfm.training.monitoring.step_profile import StepProfiler
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run import metrics_log, progress
from torchrec_deepfm.training.run.data_summary import write_data_summary
from torchrec_deepfm.training.run.formats import Manifest, convert
from torchrec_deepfm.training.run.report import report_is_drawn, write_run_report
from torchrec_deepfm.training.run.run_files import CALIBRATION, CURVES
from torchrec_deepfm.training.run.weights import Weights, Which, folder_of
from torchrec_deepfm.training.scoring.evaluation import evaluate_split
from torchrec_deepfm.training.scoring.metrics import RELIABILITY_BINS, Metrics, NotFiniteError, lift


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training, the same on every rank.

    Attributes:
        folder: the run's folder.
        summary: the content of ``summary.json``.
        before: it was already finished; this call trained nothing.
    """

    folder: Path
    summary: dict[str, Any]
    before: bool = False


def train(
    config: TrainConfig,
    data: PreparedData,
    output: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
    *,
    say: Callable[[str], None] = lambda line: None,
    measure: Callable[[Path, PreparedData], None] = lambda folder, data: None,
    show: bool = True,
    report: bool = True,
) -> Result:
    """Train a sharded DeepFM and evaluate it; a collective over the current process group.

    If ``output`` holds a run of the same options and data, it resumes from the newest intact checkpoint.

    Args:
        config: model and training options.
        data: the prepared data.
        output: the run's folder.
        device: this rank's device.
        options: how this start runs.
        say: called on rank 0 with a line for the user.
        measure: called on rank 0 with the finished run, to write more figures for its report.
        show: print the progress.
        report: draw the report at the end; it can be drawn later too.

    Returns:
        The folder and the summary of the run.

    Raises:
        UserError: the folder is taken or in use, the data do not fit the options or hold bad values, the tables fit no
            plan, the plan or a constraint does not fit the tables, a disk refuses, or the loss is not finite. Saved
            checkpoints stay.
        Preempted: SIGTERM or Ctrl-C asked it to stop; its state is saved.
    """
    run = on_main(lambda: run_folder.describe(config, data))
    summary = on_main(lambda: _check_output(output, run, data, options))
    if summary is not None:
        on_main(lambda: None if report_is_drawn(output) else _draw(output, say))
        return Result(folder=output, summary=summary, before=True)
    lock: RunLock | None = None

    def take() -> tuple[dict[str, Any] | None, bool, bool]:
        nonlocal lock
        made = not output.exists()
        lock = RunLock(output)
        summary = _check_output(output, run, data, options)  # the previous holder may have finished it
        return summary, made, run_folder.is_empty(output)

    try:
        summary, made, empty = on_main(take)
        if summary is not None:
            return Result(folder=output, summary=summary, before=True)
        stopping = requests_to_stop(lambda: lock.stopping() if lock else None)
        in_time = stop_before_limit(options.stop_before_limit if is_main() else 0)
        with stopping as requests, in_time, closing(Heartbeat(options.timeout)) as heartbeat:
            training = _Training(run, data, output, device, options, say, measure, show, report, requests, heartbeat)
            try:
                return training.run()
            except UserError:
                if empty and training.saved_nothing():
                    # On every rank: rank 0 may end over a lost peer before it gets here.
                    run_folder.remove_new(output, made=made)
                raise
    finally:
        if lock is not None:
            lock.release()


def _check_output(
    output: Path, run: run_folder.RunDescription, data: PreparedData, options: RunOptions
) -> dict[str, Any] | None:
    """Check that ``output`` can be written; return the summary if its run is finished."""
    if options.resume == "never" or not (output / "config.json").exists():
        run_folder.check_no_run(output)
        return None
    run_folder.check_same(output, run, data)
    return run_folder.read_summary(output)


class _Training:
    """One start of a training: from step 0 or a checkpoint to its end or the next fault."""

    def __init__(
        self,
        run: run_folder.RunDescription,
        data: PreparedData,
        output: Path,
        device: torch.device,
        options: RunOptions,
        say: Callable[[str], None],
        measure: Callable[[Path, PreparedData], None],
        show: bool,
        report: bool,
        requests: Requests,
        heartbeat: Heartbeat,
    ) -> None:
        self._run, self._data, self._output, self._device = run, data, output, device
        self._target = options.checkpoints or str(output / run_folder.CHECKPOINTS)
        self._options, self._say, self._measure = options, say, measure
        self._show, self._report = show, report
        self._requests, self._heartbeat = requests, heartbeat
        self._checkpoints: Checkpoints | None = None
        self._lowered = ""

    def run(self) -> Result:
        config, data, device = self._run.config, self._data, self._device
        _check_options(config, data)
        train_loader = _loader(data, "train", config, shuffle=True, drop_last=True, device=device)
        if config.ema_every > len(train_loader):
            raise UserError(
                f"--ema-every {config.ema_every}: an epoch of {data.folder} has {len(train_loader)} steps, so it would "
                "be evaluated before the first update; take at most as many"
            )
        eval_loaders = {
            split: _loader(data, split, config, shuffle=False, drop_last=False, device=device)
            for split in ("validation", "test")
            if data.rows(split)
        }
        torch.set_float32_matmul_precision("medium" if config.precision == "medium" else "highest")
        sharded = build_model(
            config,
            self._run.num_embeddings,
            len(self._run.numeric),
            device,
            is_weighted=self._run.weighted,
            constraints=self._options.rules,
            plan=self._options.plan,
            hardware=self._options.hardware,
            negative_rate=self._data.made.get("negative_rate", 1.0),
            compile_dense=self._options.compile_dense,
        )
        checkpoints = self._checkpoints = Checkpoints(
            self._target,
            keep_last=config.keep_last,
            timeout=longest_wait(self._options.timeout),
            committed=lambda step: run_folder.write_saved(self._output, self._target, step),
            not_finite=lambda step, name: record_not_finite(self._output, {"step": step, "weight": name}),
        )
        profiler = StepProfiler(self._options.profile, self._output / "profile", dist.get_rank(), device, self._say)
        loop = Loop(
            sharded.model,
            LoopContext(
                config=config,
                device=device,
                train=train_loader,
                validation=eval_loaders.get("validation"),
                checkpoints=checkpoints,
                about=self._about(sharded),
                requests=self._requests,
                heartbeat=self._heartbeat,
                files=DataFiles(data.folder),
                folder=self._output,
                timeout=self._options.timeout,
                profiler=profiler,
                prefetch=sharded.prefetch,
            ),
        )
        try:
            with raise_on_all_ranks(), explained(self._heartbeat):
                resumed = self._resume(loop, checkpoints)
                on_main(checkpoints.store.clean)
                on_main(lambda: run_folder.write_saved(self._output, self._target, checkpoints.saved))
                world_size = dist.get_world_size()
                on_main(
                    lambda: run_folder.create(
                        self._output, self._run, sharded.plan_file, data=data, world_size=world_size
                    )
                )
                on_main(lambda: write_data_summary(self._output, data))
                if is_main():
                    if world_size > 1:
                        self._say(_planner_line(sharded.plan_file, self._options.plan))
                    step, samples = loop.position.step, loop.samples
                    for line in metrics_log.forget_after(self._output, step, evaluated=loop.position.evaluated):
                        self._say(line)
                    loop.progress = progress.Progress(
                        self._output,
                        loop.total_samples,
                        done_step=step,
                        done_samples=samples,
                        click_rate=click_rate(data),
                        show=self._show,
                    )
                    for line in input_warnings(data):
                        self._say(f"warning: {line}")
                    if resumed:
                        self._say(f"Resuming from step {step} of {self._output}")
                    if self._lowered:
                        self._say(f"learning rates after step {step}: {self._lowered}")
                loop.run()
                profiler.close()
                return self._finish(loop, sharded, checkpoints, eval_loaders)
        finally:
            profiler.close(wrote=False)
            checkpoints.close()
            if loop.progress is not None:
                loop.progress.close()

    def _about(self, sharded: Sharded) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self._run.config),
            "num_embeddings": dict(self._run.num_embeddings),
            "numeric": list(self._run.numeric),
            "weighted": self._run.weighted,
            "data_sha256": self._run.data_sha256,
            "schema_sha256": run_folder.digest_of_schema(self._data),
            "plan": sharded.plan_file.without_predictions().to_json(),
            "versions": run_folder.versions(),
        }

    def _was_not_finite(self) -> bool:
        return run_folder.was_not_finite(self._output)

    def _resume(self, loop: Loop, checkpoints: Checkpoints) -> bool:
        """Restore the newest intact checkpoint; return whether there was one."""
        refusals: list[str] = []
        try:
            for step, manifest in checkpoints.intact(refusals):
                try:
                    found = convert(manifest, Manifest)
                    there = run_folder.from_file(found)
                    where, may_lower = f"--checkpoints {self._target}", on_main(self._was_not_finite)
                    run_folder.check_same_run(where, there, self._run, self._data, may_lower=may_lower)
                    state, restore = loop.resume(found)
                except UserError:
                    raise
                except ValueError as error:
                    refusals.append(f"{checkpoints.store.shown(step)}: {MANIFEST}: {error}")
                    continue
                if self._options.resume == "never":
                    raise UserError(
                        f"--checkpoints {self._target}: holds checkpoints already; name another place, or remove them"
                    )
                reason = checkpoints.read(step, manifest, state)
                if reason is None:
                    restore()
                    on_main(lambda step=step: checkpoints.store.forget_newer(step))  # type: ignore[misc]
                    self._lowered = run_folder.lowered_rates(there, self._run)
                    return True
                refusals.append(f"{checkpoints.store.shown(step)}: {reason}")
        finally:
            if is_main():
                for refusal in refusals:
                    self._say(f"not used: {refusal}")
        if refusals:
            raise UserError(f"{refusals[-1]}; no checkpoint is intact: name another --output to train from the start")
        line = on_main(lambda: run_folder.check_nothing_lost(self._output, self._target))
        if line is not None and is_main():
            self._say(line)
        return False

    def _finish(self, loop: Loop, sharded: Sharded, checkpoints: Checkpoints, loaders: Mapping[str, Loader]) -> Result:
        """Evaluate and save the last and the best weights, write the files of a finished run."""
        config, step = self._run.config, loop.position.step

        def evaluate_all() -> dict[str, Metrics]:
            return {
                split: evaluate_split(
                    sharded.model, loader, self._device, config.precision, loop.check_between_steps, RELIABILITY_BINS
                )
                for split, loader in loaders.items()
            }

        own: Which = "last"
        best, saved = None, False
        try:
            with loop.averaged():
                metrics = {"last": evaluate_all()}
            if "validation" in metrics["last"] and not loop.tracker.stopped:
                loop.record_validation(metrics["last"]["validation"])
            checkpoints.wait()
            best = loop.tracker.best_step
            if best is not None and best != step:
                own = "best" if config.patience else "last"
                with loop.averaged():
                    save_model(sharded.model, self._output / folder_of("last", own))
                saved = True
                if self._restore(loop, sharded, checkpoints, best, needed=own == "best"):
                    metrics["best"] = evaluate_all()
        except Preempted as request:
            loop.stop(request.signum, save=not saved)
            raise
        except NotFiniteError:
            loop.refuse_predictions()
        if "best" in metrics:
            save_model(sharded.model, self._output / folder_of("best", own))
        elif not saved:
            with loop.averaged():
                save_model(sharded.model, self._output / folder_of("last", own))
        if loop.progress is not None:
            at = best if own == "best" and best is not None else step
            for split, result in metrics[own].items():
                loop.progress.evaluation(step=at, split=split, metrics=result, show=False)
        figures = {
            which: {split: _with_lift(result, self._data, split) for split, result in results.items()}
            for which, results in metrics.items()
        }
        summary = _summary(config, figures, loop, own)
        summary["warnings"] = on_main(lambda: self._warnings(summary))
        on_main(lambda: _write_curves(self._output, metrics[own]))
        on_main(lambda: run_folder.write_json(self._output / run_folder.SUMMARY, summary))
        measure = partial(self._measure, self._output, self._data)
        on_main(lambda: _draw(self._output, self._say, measure, report=self._report))
        return Result(folder=self._output, summary=summary)

    def _warnings(self, summary: Mapping[str, Any]) -> list[str]:
        log = metrics_log.read_log(self._output / metrics_log.NAME)
        first = next((one for one in log.records if one["split"] == "train"), None) if log else None
        return [
            *input_warnings(self._data),
            *(first_loss_warnings(first["step"], first["loss"], click_rate(self._data)) if first else []),
            *result_warnings(summary),
        ]

    def _restore(self, loop: Loop, sharded: Sharded, checkpoints: Checkpoints, step: int, *, needed: bool) -> bool:
        """Read the best weights back; return whether they could be read."""
        weights = Weights(store=checkpoints.store, key=step, step=step, averaged=loop.average is not None)
        reason = try_load_model(sharded.model, weights)
        if reason is None:
            return True
        if needed:
            raise UserError(
                f"{weights.shown}: {reason}; this was the best state, so the training can't end in it; train "
                "again, or without --patience"
            )
        if is_main():
            self._say(f"{weights.shown}: {reason}; the best weights can't be kept, only the last ones")
        return False

    def saved_nothing(self) -> bool:
        """Whether this start left nothing to keep: no checkpoint, no record of a loss that is not finite."""
        try:
            steps = self._checkpoints.store.steps() if self._checkpoints is not None else []
            return not steps and not self._was_not_finite()
        except (UserError, OSError):
            return False


def _write_curves(folder: Path, metrics: Mapping[str, Metrics]) -> None:
    """Write what the report draws of each split."""
    bins = {split: [dataclasses.asdict(one) for one in result.reliability] for split, result in metrics.items()}
    run_folder.write_json(folder / CALIBRATION, {"format_version": 1, "splits": bins})
    curves = {split: dataclasses.asdict(one.curves) for split, one in metrics.items() if one.curves is not None}
    run_folder.write_json(folder / CURVES, {"format_version": 1, "splits": curves})


def _draw(
    folder: Path, say: Callable[[str], None], measure: Callable[[], object] = lambda: None, *, report: bool = True
) -> None:
    """Write the report; a failure is reported and does not fail the run."""
    steps: dict[str, Callable[[], object]] = {"fields could not be measured": measure}
    if report:
        steps["report could not be drawn"] = partial(write_run_report, folder)
    for failed, work in steps.items():
        try:
            work()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"the {failed} ({reason}); python -m torchrec_deepfm report tries again")


def _check_options(config: TrainConfig, data: PreparedData) -> None:
    """Refuse options that these data do not support."""
    for option in ("patience", "lr_patience"):
        if getattr(config, option) and not data.rows("validation"):
            raise UserError(
                f"--{option.replace('_', '-')}: {data.folder} has no validation split; leave the option "
                "out, or prepare the data with --validation"
            )
    for option in ("touched_embedding_l2", "touched_linear_l2"):
        if getattr(config, option) and data.schema.multi_hot:
            name = option.replace("_", "-")
            raise UserError(
                f"--{name}: column {data.schema.multi_hot[0]!r} of {data.folder} holds lists, whose rows are summed "
                f"before this penalty sees them; take --{name.removeprefix('touched-')} with --sparse-optimizer adam"
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


def _with_lift(metrics: Metrics, data: PreparedData, split: str) -> dict[str, Any]:
    values: dict[str, Any] = metrics.to_json()
    best = data.optimum.get(split)
    if best is not None and metrics.auc is not None:
        values["best_reachable_auc"] = best["auc"]
        values["lift"] = lift(metrics.auc, best["auc"])
    return values


def _summary(config: TrainConfig, figures: Mapping[str, Mapping[str, Any]], loop: Loop, own: Which) -> dict[str, Any]:
    """The content of ``summary.json``; ``figures`` by weights and split, the best only if they are not the last."""
    tracker, step = loop.tracker, loop.position.step
    best = {"metric": config.metric, "value": tracker.best_value, "step": tracker.best_step}
    weights: dict[str, Any] = {
        "own": own,
        "last": {"step": step, "folder": folder_of("last", own), **figures["last"]},
    }
    if "best" in figures:
        weights["best"] = {"step": tracker.best_step, "folder": folder_of("best", own), **figures["best"]}
    elif tracker.best_step == step:
        weights["best"] = weights["last"]
    return {
        **figures[own],
        **({} if tracker.best_step is None else {"best": best}),
        **({"restored_step": tracker.best_step} if own == "best" else {}),
        "weights": weights,
        "samples_per_second": loop.position.samples / max(loop.position.seconds, 1e-9),
        "train_seconds": loop.position.seconds,
        "steps": step,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "world_size": dist.get_world_size(),
    }


def _planner_line(plan: PlanFile, file: Path | None) -> str:
    """Whose plan places the tables."""
    who = f"the plan {file}" if file else "the balanced planner" if plan.search == "balanced" else "TorchRec's planner"
    line = f"Tables placed by {who}"
    if plan.predicted is not None and plan.hardware is not None and file is None:
        line += f", {plan.predicted.critical_path_ms:.2f} ms per step predicted for {plan.hardware.name}"
    return line

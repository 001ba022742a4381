"""A whole training: loaders, sharded model, loop, evaluations, and the files they write."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.distributed.health import DataFiles, Heartbeat, explained, longest_wait
from torchrec_deepfm.distributed.process_group import is_main, on_main, raise_on_all_ranks
from torchrec_deepfm.distributed.run_lock import RunLock
from torchrec_deepfm.distributed.stop_signals import Requests, requests_to_stop
from torchrec_deepfm.distributed.time_limit import stop_before_limit
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.checkpoint.manager import Checkpoints
from torchrec_deepfm.training.checkpoint.store import MANIFEST
from torchrec_deepfm.training.config import RunOptions, TrainConfig
from torchrec_deepfm.training.finish import draw_report, finish
from torchrec_deepfm.training.loop import Loop, LoopContext
from torchrec_deepfm.training.monitoring.nonfinite import record_not_finite
from torchrec_deepfm.training.monitoring.quality import (
    batch_warnings,
    click_rate,
    input_warnings,
    unknown_warnings,
)
from torchrec_deepfm.training.monitoring.step_profile import StepProfiler
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.data_summary import write_data_summary
from torchrec_deepfm.training.run.formats import Manifest, convert
from torchrec_deepfm.training.run.report import report_is_drawn
from torchrec_deepfm.training.run.same_run import check_same, check_same_run, lowered_rates
from torchrec_deepfm.training.run.tracking import metrics_log, progress
from torchrec_deepfm.training.run.tracking.watchers import check_installed, open_watchers
from torchrec_deepfm.training.scoring.evaluation import float32_products
from torchrec_deepfm.training.start import Start


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training, the same on every rank; ``before``: it was finished already, this call trained nothing."""

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
    publish: Callable[[], None] = lambda: None,
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
        publish: called on rank 0 before and after each checkpoint becomes visible, to store the run's files elsewhere.

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
        on_main(lambda: None if report_is_drawn(output) else draw_report(output, say))
        return Result(folder=output, summary=summary, before=True)
    check_installed(options.watch)
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
        products = float32_products(config.precision)
        in_time = stop_before_limit(options.stop_before_limit if is_main() else 0)
        with products, stopping as requests, in_time, closing(Heartbeat(options.timeout)) as heartbeat:
            start = Start(run=run, data=data, output=output, device=device, options=options, say=say, publish=publish)
            ended = partial(draw_report, output, say, partial(measure, output, data), report=report)
            training = _Training(start, requests, heartbeat, ended, show=show)
            try:
                return Result(folder=output, summary=training.run())
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
    check_same(output, run, data)
    return run_folder.read_summary(output)


class _Training:
    """One start of a training: from step 0 or a checkpoint to its end or the next fault."""

    def __init__(
        self, start: Start, requests: Requests, heartbeat: Heartbeat, ended: Callable[[], None], *, show: bool
    ) -> None:
        self._start, self._requests, self._heartbeat, self._ended, self._show = start, requests, heartbeat, ended, show
        self._checkpoints: Checkpoints | None = None
        self._lowered = ""

    def run(self) -> dict[str, Any]:
        """Train to the end; return the summary."""
        start = self._start
        config, output, options = start.run.config, start.output, start.options
        loaders = start.loaders()
        sharded = start.build()
        checkpoints = self._checkpoints = Checkpoints(
            start.checkpoints,
            keep_last=config.keep_last,
            timeout=longest_wait(options.timeout),
            committing=start.publish,
            committed=start.committed,
            not_finite=lambda step, name: record_not_finite(output, {"step": step, "weight": name}),
        )
        profiler = StepProfiler(options.profile, output / "profile", dist.get_rank(), start.device, start.say)
        loop = Loop(
            sharded.model,
            LoopContext(
                config=config,
                device=start.device,
                train=loaders.pop("train"),
                validation=loaders.get("validation"),
                checkpoints=checkpoints,
                about=start.about(sharded),
                requests=self._requests,
                heartbeat=self._heartbeat,
                files=DataFiles(start.data.folder),
                folder=output,
                timeout=options.timeout,
                profiler=profiler,
                prefetch=sharded.prefetch,
            ),
        )
        finished = False
        try:
            with raise_on_all_ranks(), explained(self._heartbeat):
                resumed = self._resume(loop, checkpoints)
                on_main(checkpoints.store.clean)
                on_main(lambda: run_folder.write_saved(output, start.checkpoints, checkpoints.saved))
                world_size = dist.get_world_size()
                on_main(
                    lambda: run_folder.create(
                        output, start.run, sharded.plan_file, data=start.data, world_size=world_size
                    )
                )
                about_data = on_main(lambda: write_data_summary(output, start.data))
                if is_main():
                    if world_size > 1:
                        start.say(_planner_line(sharded.plan_file, options.plan))
                    self._show_start(loop, about_data, resumed=resumed)
                loop.run()
                profiler.close()
                summary = finish(start, loop, sharded, checkpoints, loaders)
                on_main(self._ended)
                finished = True
                return summary
        finally:
            profiler.close(wrote=False)
            checkpoints.close()
            if loop.progress is not None:
                loop.progress.close(finished=finished)

    def _show_start(self, loop: Loop, about_data: dict[str, Any], *, resumed: bool) -> None:
        """Open the log and the progress, and print where the training begins."""
        start, step = self._start, loop.position.step
        for line in metrics_log.forget_after(start.output, step, evaluated=loop.position.evaluated):
            start.say(line)
        loop.progress = progress.Progress(
            start.output,
            loop.total_samples,
            done_step=step,
            done_samples=loop.samples,
            click_rate=click_rate(start.data),
            show=self._show,
            watchers=open_watchers(start.options.watch, start.output, start.run.config, resumed=resumed),
        )
        size = start.run.config.batch_size
        on_gpu = start.device.type == "cuda"
        slow = batch_warnings(size, start.data.rows("train") // dist.get_world_size()) if on_gpu else []
        for line in (*input_warnings(start.data), *unknown_warnings(about_data), *slow):
            start.say(f"warning: {line}")
        if resumed:
            start.say(f"Resuming from step {step} of {start.output}")
        if self._lowered:
            start.say(f"learning rates after step {step}: {self._lowered}")

    def _was_not_finite(self) -> bool:
        return run_folder.was_not_finite(self._start.output)

    def _resume(self, loop: Loop, checkpoints: Checkpoints) -> bool:
        """Restore the newest intact checkpoint; return whether there was one."""
        refusals: list[str] = []
        try:
            for step, manifest in checkpoints.intact(refusals):
                try:
                    found = convert(manifest, Manifest)
                    there = run_folder.from_file(found)
                    where, may_lower = f"--checkpoints {self._start.checkpoints}", on_main(self._was_not_finite)
                    check_same_run(where, there, self._start.run, self._start.data, may_lower=may_lower)
                    state, restore = loop.resume(found)
                except UserError:
                    raise
                except ValueError as error:
                    refusals.append(f"{checkpoints.store.shown(step)}: {MANIFEST}: {error}")
                    continue
                if self._start.options.resume == "never":
                    raise UserError(
                        "holds checkpoints already",
                        where=f"--checkpoints {self._start.checkpoints}",
                        remedy="name another place, or remove them",
                    )
                reason = checkpoints.read(step, manifest, state)
                if reason is None:
                    restore()
                    on_main(lambda step=step: checkpoints.store.forget_newer(step))  # type: ignore[misc]
                    self._lowered = lowered_rates(there, self._start.run)
                    return True
                refusals.append(f"{checkpoints.store.shown(step)}: {reason}")
        finally:
            if is_main():
                for refusal in refusals:
                    self._start.say(f"not used: {refusal}")
        if refusals:
            raise UserError(
                f"{refusals[-1]}", remedy="no checkpoint is intact: name another --output to train from the start"
            )
        line = on_main(lambda: run_folder.check_nothing_lost(self._start.output, self._start.checkpoints))
        if line is not None and is_main():
            self._start.say(line)
        return False

    def saved_nothing(self) -> bool:
        """Whether this start left nothing to keep: no checkpoint, no record of a loss that is not finite."""
        try:
            steps = self._checkpoints.store.steps() if self._checkpoints is not None else []
            return not steps and not self._was_not_finite()
        except (UserError, OSError):
            return False


def _planner_line(plan: PlanFile, file: Path | None) -> str:
    """Whose plan places the tables."""
    who = f"the plan {file}" if file else "the balanced planner" if plan.search == "balanced" else "TorchRec's planner"
    line = f"Tables placed by {who}"
    if plan.predicted is not None and plan.hardware is not None and file is None:
        line += f", {plan.predicted.critical_path_ms:.2f} ms per step predicted for {plan.hardware.name}"
    return line

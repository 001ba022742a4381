"""The end of a training: its last and its best weights are evaluated and saved, its summary and report written."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.distributed.process_group import is_main, on_main
from torchrec_deepfm.distributed.stop_signals import Preempted
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.build import Sharded
from torchrec_deepfm.training.checkpoint.manager import Checkpoints, save_model, try_load_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.loop import Loop
from torchrec_deepfm.training.monitoring.quality import (
    click_rate,
    first_loss_warnings,
    input_warnings,
    result_warnings,
    unknown_warnings,
)
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.data_summary import data_summary
from torchrec_deepfm.training.run.report import write_run_report
from torchrec_deepfm.training.run.run_files import CALIBRATION, CURVES
from torchrec_deepfm.training.run.tracking import metrics_log
from torchrec_deepfm.training.run.weights import Weights, Which, folder_of
from torchrec_deepfm.training.scoring.evaluation import evaluate_split
from torchrec_deepfm.training.scoring.metrics import RELIABILITY_BINS, Metrics, NotFiniteError, lift
from torchrec_deepfm.training.start import Start


def finish(
    start: Start,
    loop: Loop,
    sharded: Sharded,
    checkpoints: Checkpoints,
    loaders: Mapping[str, Loader],
) -> dict[str, Any]:
    """Evaluate and save the last and the best weights, and write the files of a finished run; a collective.

    Args:
        start: what was trained.
        loop: the loop that has ended.
        sharded: its model.
        checkpoints: where the best weights are.
        loaders: of the splits to evaluate, by name.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: the best weights are damaged and the run is to end in them, or predictions are not finite.
        Preempted: the training was asked to stop; its state is saved.
    """
    config, step = start.run.config, loop.position.step
    about = start.about(sharded)

    def evaluate_all() -> dict[str, Metrics]:
        return {
            split: evaluate_split(
                sharded.model, loader, start.device, config.precision, loop.check_between_steps, RELIABILITY_BINS
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
                save_model(sharded.model, start.output / folder_of("last", own), about)
            saved = True
            weights = Weights(store=checkpoints.store, key=best, step=best, averaged=loop.average is not None)
            if _restore(sharded, weights, start.say, needed=own == "best"):
                metrics["best"] = evaluate_all()
    except Preempted as request:
        loop.stop(request.signum, save=not saved)
        raise
    except NotFiniteError:
        loop.refuse_predictions()
    if "best" in metrics:
        save_model(sharded.model, start.output / folder_of("best", own), about)
    elif not saved:
        with loop.averaged():
            save_model(sharded.model, start.output / folder_of("last", own), about)
    if loop.progress is not None:
        at = best if own == "best" and best is not None else step
        for split, result in metrics[own].items():
            loop.progress.evaluation(step=at, split=split, metrics=result, show=False)
    figures = {
        which: {split: _with_lift(result, start.data, split) for split, result in results.items()}
        for which, results in metrics.items()
    }
    summary = _summary(config, figures, loop, own)
    summary["warnings"] = on_main(lambda: _warnings(start, summary))
    on_main(lambda: _write_curves(start.output, metrics[own]))
    on_main(lambda: run_folder.write_json(start.output / run_folder.SUMMARY, summary))
    return summary


def draw_report(
    folder: Path, say: Callable[[str], None], measure: Callable[[], object] = lambda: None, *, report: bool = True
) -> None:
    """Write the report of a finished run; a failure is reported and does not fail the run.

    ``measure`` is called first, to write more figures for the report; without ``report`` it is all that is done.
    """
    steps: dict[str, Callable[[], object]] = {"fields could not be measured": measure}
    if report:
        steps["report could not be drawn"] = partial(write_run_report, folder)
    for failed, work in steps.items():
        try:
            work()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"the {failed} ({reason}); python -m torchrec_deepfm report tries again")


def _restore(sharded: Sharded, weights: Weights, say: Callable[[str], None], *, needed: bool) -> bool:
    """Read the best weights back; return whether they could be read."""
    reason = try_load_model(sharded.model, weights)
    if reason is None:
        return True
    if needed:
        raise UserError(
            f"{reason}; this was the best state, so the training can't end in it",
            where=weights.shown,
            remedy="train again, or without --patience",
        )
    if is_main():
        say(f"{weights.shown}: {reason}; the best weights can't be kept, only the last ones")
    return False


def _warnings(start: Start, summary: Mapping[str, Any]) -> list[str]:
    log = metrics_log.read_log(start.output / metrics_log.NAME)
    first = next((one for one in log.records if one["split"] == "train"), None) if log else None
    return [
        *input_warnings(start.data),
        *unknown_warnings(data_summary(start.data)),
        *(first_loss_warnings(first["step"], first["loss"], click_rate(start.data)) if first else []),
        *result_warnings(summary),
    ]


def _write_curves(folder: Path, metrics: Mapping[str, Metrics]) -> None:
    """Write what the report draws of each split."""
    bins = {split: [dataclasses.asdict(one) for one in result.reliability] for split, result in metrics.items()}
    run_folder.write_json(folder / CALIBRATION, {"format_version": 1, "splits": bins})
    curves = {split: dataclasses.asdict(one.curves) for split, one in metrics.items() if one.curves is not None}
    run_folder.write_json(folder / CURVES, {"format_version": 1, "splits": curves})


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

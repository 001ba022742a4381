"""Evaluates a trained run, or two, on labelled rows."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.distributed.process_group import on_main
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.evaluation.bootstrap import Bootstrap
from torchrec_deepfm.evaluation.figures import Keys, Sample, figures, slices
from torchrec_deepfm.evaluation.options import EvaluateOptions
from torchrec_deepfm.evaluation.prepared_rows import PreparedRows
from torchrec_deepfm.evaluation.raw_rows import RawRows
from torchrec_deepfm.files import check_target, read_bytes, write_text
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.checkpoint.manager import restore_model
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.formats import JSON_LIMIT
from torchrec_deepfm.training.run.weights import Weights, find_weights
from torchrec_deepfm.training.scoring.evaluation import Predictions, float32_products, predict_rows
from torchrec_deepfm.training.scoring.metrics import lift

FORMAT_VERSION = 1
Rows = PreparedRows | RawRows
_ASKED = ("data", "weights", "options", "compare_weights")  # what two evaluations of the same question share


def evaluate_run(
    folder: Path, data: PreparedData | Sequence[str], device: torch.device, options: EvaluateOptions = EvaluateOptions()
) -> dict[str, Any]:
    """Evaluate a trained run on labelled rows, on any number of ranks; a collective.

    Args:
        folder: the run's folder.
        data: prepared data with the columns and ids of the run, or raw files with labels, as for ``open_sources``.
        device: this rank's device.
        options: what to evaluate.

    Returns:
        The content of the JSON file that is written, and its path as ``file``. ``data``, ``weights`` and ``options``
        name what was evaluated. The metrics are those of ``figures``, with the best reachable AUC and the lift if they
        are known; ``slices`` has those by column.

    Raises:
        UserError: the folder holds no run or no such weights, the run does not fit the data, an option names no
            column, or the file holds another evaluation.
    """
    folders = [folder, *([] if options.compare is None else [options.compare])]
    checkpoints = (options.checkpoint, options.compare_checkpoint)
    if options.compare is not None and not (options.compare / run_folder.CONFIG).is_file():
        raise UserError(
            "not a run folder (no config.json)",
            where=f"--compare {options.compare}",
            remedy="name one that train wrote",
        )
    runs = [run_folder.read(one) for one in folders]
    weights = [
        on_main(lambda one=one, asked=asked: find_weights(one, asked))  # type: ignore[misc]
        for one, asked in zip(folders, checkpoints, strict=False)
    ]
    columns = [("--by", name) for name in options.by]
    columns += [] if options.by_user is None else [("--by-user", options.by_user)]
    rows: Rows
    if isinstance(data, PreparedData):
        rows = PreparedRows(data, options.split or "test", columns)
        for run, one in zip(runs, folders, strict=True):
            rows.check(run, one)
    else:
        rows = RawRows(data, folders, columns)
    asked = on_main(lambda: _asked(options, rows, folders, weights))
    target = on_main(lambda: _target(folder, options, rows.name, asked))
    predictions = [
        _predict(one, run, found, rows, device) for one, run, found in zip(folders, runs, weights, strict=True)
    ]

    def work() -> dict[str, Any]:
        result = {"format_version": FORMAT_VERSION, **asked, **_figures(rows, predictions, options)}
        write_text(target, json.dumps(result, indent=2) + "\n", what="evaluation")
        return {**result, "file": str(target)}

    return on_main(work)


def _predict(
    folder: Path, run: run_folder.RunDescription, weights: Weights, rows: Rows, device: torch.device
) -> Predictions | None:
    # Quantised communication needs GPUs; a run trained with it can be evaluated on CPU ranks too.
    config = run.config if device.type == "cuda" else dataclasses.replace(run.config, qcomms=("fp32",))
    model = build_model(
        config,
        run.num_embeddings,
        run.dense_in_features,
        device,
        dense_widths=run.widths,
        is_weighted=run.weighted,
    ).model
    restore_model(model, weights)
    with float32_products(config.precision):
        return predict_rows(model, rows.loader(folder, config.batch_size, device), device, config.precision)


def _figures(rows: Rows, predictions: list[Predictions | None], options: EvaluateOptions) -> dict[str, Any]:
    known = [one for one in predictions if one is not None]
    for one in known:
        one.check_finite()
    users = None if options.by_user is None else rows.column(options.by_user)
    sample = Sample(
        labels=known[0].labels, logits=tuple(one.logits for one in known), users=users, weights=known[0].weights
    )
    how = None
    if options.bootstrap:
        how = Bootstrap(resamples=options.bootstrap, confidence=options.confidence, seed=options.seed)
    ks = sorted(set(options.k))
    found = figures(sample, ks, how)
    if rows.optimum is not None and found["auc"] is not None:
        found["best_reachable_auc"] = rows.optimum["auc"]
        found["lift"] = lift(found["auc"], rows.optimum["auc"])
    columns: dict[str, Keys] = {name: rows.column(name) for name in options.by}
    if columns:
        found["slices"] = {name: slices(sample, keys, ks, how, options.slices) for name, keys in columns.items()}
    return found


def _asked(options: EvaluateOptions, rows: Rows, folders: list[Path], weights: list[Weights]) -> dict[str, Any]:
    """What is evaluated, as the file records it."""
    chosen = dataclasses.asdict(options)
    left_out = ("split", "checkpoint", "compare", "compare_checkpoint", "output", "overwrite")
    described = [
        {"run": str(one), "folder": found.shown, "step": found.step}
        for one, found in zip(folders, weights, strict=True)
    ]
    return {
        "data": rows.describe(),
        "weights": described[0],
        **({"compare_weights": described[1]} if len(described) > 1 else {}),
        "options": {name: value for name, value in chosen.items() if name not in left_out},
    }


def _target(folder: Path, options: EvaluateOptions, name: str, asked: Mapping[str, Any]) -> Path:
    """The file to write; refused before the work if it holds something else."""
    chosen = "" if options.checkpoint is None else f"_{options.checkpoint}"
    path = options.output or folder / f"evaluate_{name}{chosen}.json"
    check_target("--output", path, like="evaluation.json")
    if options.overwrite or not path.exists():
        return path
    try:
        found = json.loads(read_bytes(path, most=JSON_LIMIT))
    except (OSError, ValueError, RecursionError):
        found = None
    same = json.loads(json.dumps(asked))
    if isinstance(found, dict) and {key: found.get(key) for key in _ASKED} == {key: same.get(key) for key in _ASKED}:
        return path  # the same figures are written again
    raise UserError(
        "holds another evaluation", where=path, remedy="name another file with --output, or replace it with --overwrite"
    )

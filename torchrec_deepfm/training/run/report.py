"""A run's report, ``report.html``: metrics, learning curves, calibration, options and plan.

It is drawn from the JSON files in the run's folder alone, so it can be drawn again at any time, also while the training
runs. It loads no torch.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.report.page import Block, Data, Link, PageTable, Paragraph, Picture, Section, Terms, write_page
from torchrec_deepfm.report.training_curves import learning_curves, points, reliability_curves, thinned
from torchrec_deepfm.sharding.plan.io import load_plan
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run import metrics_log
from torchrec_deepfm.training.run.formats import CalibrationFile, RunFile

REPORT = "report.html"
CALIBRATION = "calibration.json"
_SPLITS = ("validation", "test")
_NO_REPORT = "no report can be made of this run"
# Raised here, in matplotlib or in the page for values of the wrong kind or size.
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def write_run_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not.

    ``folder``: the run's folder, with ``config.json``; ``metrics.jsonl``, ``summary.json``, ``plan.json`` and
    ``calibration.json`` are used if present.
    """
    config = run_folder.read_config(folder, _NO_REPORT)
    summary = run_folder.read_summary(folder, _NO_REPORT)
    plan = load_plan(folder / run_folder.PLAN) if (folder / run_folder.PLAN).exists() else None
    found = run_folder.read_file(folder / CALIBRATION, CalibrationFile, _NO_REPORT)
    calibration = {} if found is None else found[0]
    records = _records(folder / metrics_log.NAME)
    try:
        sections = [
            _result(summary, records, calibration),
            _learning(records, summary, dropout=bool(config.config.get("dropout"))),
            _calibration(calibration),
            _options(config),
            *_plan(plan),
            _origin(config),
        ]
        path = folder / REPORT
        name = os.fsencode(folder.resolve().name).decode("utf-8", "replace")
        subtitle = f"DeepFM, {name}, drawn {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        write_page(path, f"Run {name}", sections, subtitle=subtitle)  # pictures and numbers are drawn only here
    except UserError:
        raise
    except _DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{folder}: no report can be made of these files ({reason:.300}); they have another version, or are damaged"
        ) from error
    return path


def report_is_drawn(folder: Path) -> bool:
    """Whether the report of a finished run exists and was drawn after its end.

    ``folder``: the run's folder, with ``summary.json``.
    """
    try:
        drawn = (folder / REPORT).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return drawn >= (folder / run_folder.SUMMARY).stat().st_mtime_ns


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float | None:
    """Return the expected calibration error: the mean distance of prediction and click rate, weighted by samples.

    ``bins``: with ``rows``, ``predicted`` and ``observed``. Returns the error; None without bins.

    Example:
        >>> bins = [{"rows": 3, "predicted": 0.25, "observed": 0.5}, {"rows": 1, "predicted": 1, "observed": 1}]
        >>> calibration_error(bins)
        0.1875
    """
    rows = sum(one["rows"] for one in bins)
    return sum(one["rows"] * abs(one["predicted"] - one["observed"]) for one in bins) / rows if rows else None


def _records(path: Path) -> list[dict[str, Any]]:
    """The complete lines; the last one of a running training may be cut."""
    log = metrics_log.read(path)
    if log is None:
        return []
    if log.damaged:
        raise UserError(f"{path}, line {log.damaged[0]}: not a record of a training; restore the file; {_NO_REPORT}")
    return log.records


def _result(
    summary: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]], calibration: Mapping[str, Any]
) -> Section:
    if summary is None:
        step = max((record["step"] for record in records), default=0)
        return Section("Result", Paragraph(f"This run is not finished. Its last record is of step {step:,}."))
    blocks: list[Block] = []
    splits = [split for split in _SPLITS if split in summary]
    if splits:
        curves = calibration.get("splits", {})
        known = any("lift" in summary[split] for split in splits)
        head = ["split", "AUC", "log loss", "NE", "calibration", "ECE", "samples"]
        names = ["auc", "logloss", "ne", "calibration"]
        rows = [
            [
                split,
                *(summary[split].get(name) for name in names),
                calibration_error(curves.get(split, [])),
                summary[split].get("rows"),
                *([summary[split].get("best_reachable_auc"), summary[split].get("lift")] if known else []),
            ]
            for split in splits
        ]
        five = dict.fromkeys(["AUC", "log loss", "NE", "calibration", "ECE"], ".5f")
        lift = {"best reachable AUC": ".5f", "share of the best possible lift": ".1%"} if known else {}
        blocks.append(PageTable([*head, *lift], rows, formats=five | lift))
        blocks.append(
            Paragraph(
                "NE is the log loss divided by the entropy of the click rate; below 1 the model is better than the "
                "base rate. Calibration is the mean prediction divided by the click rate. ECE, the expected "
                "calibration error, is the mean distance of the two over the bins below. A dash: the split has one "
                "class only."
            )
        )
    else:
        blocks.append(Paragraph("The data have neither a validation nor a test split, so nothing was evaluated."))
    blocks += _weights(summary.get("weights"))
    best = summary.get("best") or {}
    terms = {
        "steps": summary.get("steps"),
        "epochs": summary.get("epochs"),
        "samples per step": f"{summary['world_size']} x {summary['batch_size']:,}",
        "training": f"{summary['train_seconds']:,.1f} s",
        "samples/s": f"{summary['samples_per_second']:,.0f}",
    }
    if best.get("value") is not None:
        terms["best evaluation"] = f"step {best['step']:,}: {best['metric']} {best['value']:.5f}"
    if "restored_step" in summary:
        terms["weights kept"] = f"step {summary['restored_step']:,}, the best one"
    return Section("Result", *blocks, Terms(terms), Data("summary", summary))


def _weights(weights: Mapping[str, Any] | None) -> list[Block]:
    """The best and the last weights, where these differ."""
    if weights is None or weights.get("best") in (None, weights["last"]):
        return []
    names = {"AUC": "auc", "log loss": "logloss"}
    splits = [split for split in _SPLITS if split in weights["last"]]
    rows = [
        [
            f"{which}, the run's own" if which == weights["own"] else which,
            weights[which]["step"],
            weights[which]["folder"],
            *(weights[which][split][name] for split in splits for name in names.values()),
        ]
        for which in ("best", "last")
    ]
    figures = [f"{split} {name}" for split in splits for name in names]
    caption = "The weights that are kept. The table above, predict and export use the run's own."
    return [
        PageTable(["weights", "step", "folder", *figures], rows, caption=caption, formats=dict.fromkeys(figures, ".5f"))
    ]


def _learning(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None, *, dropout: bool) -> Section:
    best = ((summary or {}).get("best") or {}).get("step")
    figure = learning_curves(records, best)
    if figure is None:
        return Section("Learning curves", Paragraph("Nothing has been recorded."))
    train = [record for record in records if record["split"] == "train"]
    evaluations = [record for record in records if record["split"] in _SPLITS]
    loss = thinned(points(train, "loss"))
    sentences = [f"The training loss goes from {loss[0][1]:.4f} to {loss[-1][1]:.4f}."] if loss else []
    for split in _SPLITS:
        auc = points([record for record in evaluations if record["split"] == split], "auc")
        sentences += [f"The {split} AUC ends at {auc[-1][1]:.4f}."] if auc else []
    caption = "The training loss is a mean over the steps since the last record"
    caption += ", with dropout, and so above the loss of evaluations." if dropout else "."
    return Section(
        "Learning curves",
        Picture(figure, alt=" ".join(sentences) or "Learning curves.", caption=caption),
        Data("curves", {"train_loss": loss, "evaluations": evaluations}),
    )


def _calibration(calibration: Mapping[str, Any]) -> Section:
    splits = {split: bins for split, bins in calibration.get("splits", {}).items() if split in _SPLITS and bins}
    figure = reliability_curves(splits)
    if figure is None:
        return Section("Calibration", Paragraph("No reliability curve: the run has no final evaluation."))
    caption = (
        "Samples are sorted by predicted probability into bins of equal size; equal predictions share a bin. "
        "Below the dashed line the model predicts too many clicks. The bars are Wilson's 95% intervals."
    )
    errors = [f"{split}: expected calibration error {calibration_error(bins):.4f}" for split, bins in splits.items()]
    rows = [
        [split, one["low"], one["high"], one["rows"], one["predicted"], one["observed"]]
        for split, bins in splits.items()
        for one in bins
    ]
    head = ["split", "from", "to", "samples", "mean prediction", "share of clicks"]
    formats = dict.fromkeys(["from", "to", "mean prediction", "share of clicks"], ".4f")
    return Section(
        "Calibration",
        Picture(figure, alt=f"Share of clicks against prediction. {'; '.join(errors)}.", caption=caption),
        PageTable(head, rows, formats=formats),
        Data("calibration", splits),
    )


def _options(config: RunFile) -> Section:
    defaults = json.loads(json.dumps(asdict(TrainConfig())))
    rows = [
        [
            f"--{name.replace('_', '-')}",
            _words(value),
            "" if value == defaults.get(name) else _words(defaults.get(name)),
        ]
        for name, value in config.config.items()
    ]
    changed = sorted(rows, key=lambda row: row[2] == "")  # changed options first
    return Section("Options", PageTable(["option", "value", "default, where it differs"], changed))


def _plan(plan: PlanFile | None) -> list[Section]:
    if plan is None or not plan.tables:
        return []
    rows: list[list[str | int | float | bool | Link | None]] = [
        [
            table.name,
            table.num_embeddings,
            table.num_embeddings * table.embedding_dim * 4 / 2**20,
            table.sharding_type,
            table.compute_kernel,
            _ranks(table.ranks),
        ]
        for table in plan.tables
    ]
    total = sum(table.num_embeddings for table in plan.tables)
    return [
        Section(
            "Plan",
            Paragraph(
                f"{len(rows)} tables with {total:,} rows of {plan.tables[0].embedding_dim} numbers (latent vector, "
                f"first-order weight, padding), on {plan.world_size} rank(s)."
            ),
            PageTable(["table", "rows", "MiB", "sharding", "kernel", "ranks"], rows, formats={"MiB": ",.2f"}),
        )
    ]


def _origin(config: RunFile) -> Section:
    terms = {"data": config.data, "digest of the data": config.data_sha256, **config.versions}
    return Section("Data and versions", Terms({name: _words(value) for name, value in terms.items()}))


def _ranks(ranks: Sequence[int]) -> str:
    several = len(ranks) > 8 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]} to {ranks[-1]}" if several else " ".join(map(str, ranks))


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.encode("utf-8", "replace").decode()  # the data's path may not be valid UTF-8

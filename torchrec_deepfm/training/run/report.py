"""A run's report, ``report.html``: figures, curves, fields, speed, data, plan, options, and how to repeat the run.

It is drawn from the JSON files in the run's folder alone, so it can be drawn again at any time, also while the training
runs; files that earlier versions did not write are left out. It loads no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchrec_deepfm.errors import UserError, flag
from torchrec_deepfm.report.page import (
    Block,
    Code,
    Data,
    Link,
    PageTable,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Terms,
    write_page,
)
from torchrec_deepfm.report.score_figures import (
    histogram_figure,
    importance_figure,
    precision_recall_figure,
    reliability_figure,
    roc_figure,
)
from torchrec_deepfm.report.training_curves import (
    SPLITS,
    last_per_step,
    learning_curves,
    points,
    speed,
    speed_curves,
    thinned,
)
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.formats import RunFile
from torchrec_deepfm.training.run.repeat_command import repeat_command
from torchrec_deepfm.training.run.run_files import RunFiles, read_run

REPORT = "report.html"
_MANY = 8  # rows of a table from which on it is folded
# Raised here, in matplotlib or in the page for values of the wrong kind or size.
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def write_run_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not, from those of its files that exist."""
    run = read_run(folder)
    try:
        sections = [
            _result(run),
            _learning(run),
            *_scores(run),
            _calibration(run),
            *_fields(run),
            *_speed(run),
            *_data(run),
            *_plan(run.plan),
            _options(run.config),
            _origin(run),
        ]
        path = folder / REPORT
        subtitle = f"DeepFM, {run.name}, drawn {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        write_page(path, f"Run {run.name}", sections, subtitle=subtitle)  # pictures and numbers are drawn only here
    except UserError:
        raise
    except DAMAGED as error:
        raise damaged(folder, error) from error
    return path


def damaged(folder: Path, error: Exception) -> UserError:
    """Return the line for a run whose files no report can be drawn from."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(
        f"no report can be made of these files ({reason:.300})",
        where=folder,
        remedy="they have another version, or are damaged",
    )


def report_is_drawn(folder: Path) -> bool:
    """Whether the report of a finished run exists and was drawn after its end."""
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


def words(value: Any) -> str:
    """Return the value of an option as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.encode("utf-8", "replace").decode()  # the data's path may not be valid UTF-8


def _result(run: RunFiles) -> Section:
    summary = run.summary
    if summary is None:
        step = max((record["step"] for record in run.records), default=0)
        return Section("Result", Paragraph(f"This run is not finished. Its last record is of step {step:,}."))
    blocks: list[Block] = []
    splits = [split for split in SPLITS if split in summary]
    if splits:
        first = splits[-1]
        large = {
            f"{first} AUC": _five(summary[first].get("auc")),
            f"{first} log loss": _five(summary[first].get("logloss")),
            f"{first} NE": _five(summary[first].get("ne")),
            "samples/s": f"{summary['samples_per_second']:,.0f}",
        }
        known = any("lift" in summary[split] for split in splits)
        head = ["split", "AUC", "log loss", "NE", "calibration", "ECE", "samples"]
        names = ["auc", "logloss", "ne", "calibration"]
        rows = [
            [
                split,
                *(summary[split].get(name) for name in names),
                calibration_error(run.calibration.get(split, [])),
                summary[split].get("rows"),
                *([summary[split].get("best_reachable_auc"), summary[split].get("lift")] if known else []),
            ]
            for split in splits
        ]
        five = dict.fromkeys(["AUC", "log loss", "NE", "calibration", "ECE"], ".5f")
        lift = {"best reachable AUC": ".5f", "share of the best possible lift": ".1%"} if known else {}
        blocks += [Terms(large, large=True), PageTable([*head, *lift], rows, formats=five | lift)]
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
    blocks += [Paragraph(f"Warning: {line}.") for line in summary.get("warnings", ())]
    blocks += _weights(summary.get("weights"))
    best = summary.get("best") or {}
    terms = {
        "steps": summary.get("steps"),
        "epochs": summary.get("epochs"),
        "samples per step": f"{summary['world_size']} x {summary['batch_size']:,}",
        "training": f"{summary['train_seconds']:,.1f} s",
    }
    if best.get("value") is not None:
        terms["best evaluation"] = f"step {best['step']:,}: {best['metric']} {best['value']:.5f}"
    if "restored_step" in summary:
        terms["weights kept"] = f"step {summary['restored_step']:,}, the best one"
    return Section("Result", *blocks, Terms(terms), Data("summary", summary))


def _five(value: float | None) -> str | None:
    return None if value is None else f"{value:.5f}"


def _weights(weights: Mapping[str, Any] | None) -> list[Block]:
    """The best and the last weights, where these differ."""
    if weights is None or weights.get("best") in (None, weights["last"]):
        return []
    names = {"AUC": "auc", "log loss": "logloss"}
    splits = [split for split in SPLITS if split in weights["last"]]
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


def _learning(run: RunFiles) -> Section:
    best = ((run.summary or {}).get("best") or {}).get("step")
    entropy = run.entropy
    figures = learning_curves(run.records, best, entropy)
    if "log loss" not in figures:
        return Section("Learning curves", Paragraph("Nothing has been recorded."))
    loss = thinned(points(run.train_records, "loss"))
    evaluations = [record for record in run.records if record["split"] in SPLITS]
    aucs = {split: points(last_per_step(run.records, split), "auc") for split in SPLITS}
    said = {
        "log loss": f"The training loss goes from {loss[0][1]:.4f} to {loss[-1][1]:.4f}." if loss else "",
        "AUC": " ".join(f"The {split} AUC ends at {auc[-1][1]:.4f}." for split, auc in aucs.items() if auc),
        "learning rate": "The learning rates by step.",
    }
    caption = "The training loss is a mean over the steps since the last record"
    caption += ", with dropout, and so above the loss of evaluations." if run.config.config.get("dropout") else "."
    if entropy is not None:
        caption += f" A constant prediction of the click rate has the loss {entropy:.4f}, its entropy."
    captions = {"log loss": caption}
    pictures = [
        Picture(figure, alt=said[name] or f"{name} by step.", caption=captions.get(name, ""))
        for name, figure in figures.items()
    ]
    curves = {"train_loss": loss, "evaluations": evaluations}
    return Section("Learning curves", Pictures(pictures), Data("curves", curves))


def _scores(run: RunFiles) -> list[Section]:
    if not run.curves:
        return []
    pictures = []
    areas = {split: (run.summary or {}).get(split, {}).get("auc") for split in run.curves}
    if (roc := roc_figure(run.curves)) is not None:
        said = ", ".join(f"{split} {area:.4f}" for split, area in areas.items() if area is not None)
        caption = "The dashed line is a model that knows nothing. The points are exact; a line between two may be off "
        caption += "by 1/256 in either rate."
        pictures.append(Picture(roc, alt=f"ROC curves; area below: {said}.", caption=caption))
    if (curve := precision_recall_figure(run.curves)) is not None:
        said = ", ".join(
            f"{split} {one['average_precision']:.4f}"
            for split, one in run.curves.items()
            if one["average_precision"] is not None
        )
        caption = "Precision by recall, from the tenth click on; the dashed line is the click rate."
        pictures.append(Picture(curve, alt=f"Precision against recall; average precision: {said}.", caption=caption))
    for split, one in run.curves.items():
        caption = "Shares of each class by score, even in the logit. The outermost bins hold what lies beyond."
        alt = f"Histogram of the scores of {split}: {one['positives']:,} of label 1, {one['negatives']:,} of label 0."
        pictures.append(Picture(histogram_figure(split, one), alt=alt, caption=caption))
    return [Section("Scores", Pictures(pictures), Data("scores", run.curves))]


def _calibration(run: RunFiles) -> Section:
    splits = {split: bins for split, bins in run.calibration.items() if split in SPLITS and bins}
    if not splits:
        return Section("Calibration", Paragraph("No reliability curve: the run has no final evaluation."))
    errors = {split: f"expected calibration error {calibration_error(bins):.4f}" for split, bins in splits.items()}
    rows: list[list[Any]] = [
        [split, one["low"], one["high"], one["rows"], one["predicted"], one["observed"]]
        for split, bins in splits.items()
        for one in bins
    ]
    head = ["split", "from", "to", "samples", "mean prediction", "share of clicks"]
    formats = dict.fromkeys(["from", "to", "mean prediction", "share of clicks"], ".4f")
    pictures = [
        Picture(
            reliability_figure(split, bins),
            alt=f"Share of clicks against prediction. {split}: {errors[split]}.",
            caption=f"{errors[split][0].upper()}{errors[split][1:]}.",
        )
        for split, bins in splits.items()
    ]
    return Section(
        "Calibration",
        Paragraph(
            "Samples are sorted by predicted probability into bins of equal size; equal predictions share a bin. "
            "Below the dashed line the model predicts too many clicks. The bars are Wilson's 95% intervals."
        ),
        Pictures(pictures),
        PageTable(head, rows, formats=formats, caption="The bins", folded=True),
        Data("calibration", splits),
    )


def _fields(run: RunFiles) -> list[Section]:
    found = run.importance
    if found is None:
        line = f"Not measured; python -m torchrec_deepfm report --run {run.shown_folder} --importance measures it."
        return [Section("Fields", Paragraph(line))] if run.summary is not None else []
    fields = found["fields"]
    names = [words(one["field"]) for one in fields]
    rows = [[name, one["auc_loss"], one["contribution"]] for name, one in zip(names, fields, strict=True)]
    text = f"Measured on {found['rows']:,} rows of the {found['split']} split. "
    text += "The loss of AUC is that of this model if the values of one field are shuffled among the rows; "
    text += "a field that carries the same as another one loses little. "
    text += "The contribution is what first order and pairs add to the logit, as a mean of absolute values."
    formats = {"loss of AUC": ".5f", "contribution": ".4f"}
    shown = {"loss of AUC if shuffled": "auc_loss", "mean absolute contribution to the logit": "contribution"}
    pictures = [
        Picture(
            importance_figure(names, [one[key] for one in fields], what),
            alt=f"The fields by importance, {names[0]} first: {what}.",
        )
        for what, key in shown.items()
        if all(one[key] is not None for one in fields)
    ]
    table = PageTable(["field", *formats], rows, formats=formats, caption=f"All {len(fields)} fields", folded=True)
    return [Section("Fields", Paragraph(text), Pictures(pictures), table, Data("importance", found))]


def _speed(run: RunFiles) -> list[Section]:
    figures = speed_curves(run.records, run.samples_per_step)
    if not figures:
        return []
    found = speed(run.records, run.samples_per_step)
    pictures = [Picture(figure, alt=f"{name} by step.") for name, figure in figures.items()]
    text = "Between two records of the training, of all ranks together, without evaluations and saving."
    return [Section("Speed", Paragraph(text), Pictures(pictures), Data("speed", found))]


def _data(run: RunFiles) -> list[Section]:
    config, data = run.config, run.data
    blocks: list[Block] = []
    splits = {} if data is None else data["splits"]
    if splits:
        rows: list[list[Any]] = [
            [split, one["rows"], one["positives"], _share(one["positives"], one["rows"])]
            for split, one in splits.items()
        ]
        blocks.append(PageTable(["split", "rows", "clicks", "click rate"], rows, formats={"click rate": ".2%"}))
    fields = f"{len(config.numeric)} numeric and {len(config.num_embeddings)} categorical columns"
    blocks.append(Paragraph(f"{fields}, {sum(config.num_embeddings.values()):,} ids in all."))
    known = data is not None and data["mode"] == "vocabulary"
    zeros = [f"{split}: id 0" for split in splits] if known else []
    table: list[list[Any]] = [
        [words(name), count, *(splits[split]["zero"].get(name) for split in splits if known)]
        for name, count in config.num_embeddings.items()
    ]
    if known:
        sampled = ", ".join(f"{one['sampled']:,} of {split}" for split, one in splits.items())
        text = f"Id 0 stands for rare values and for those that the training rows do not have; shares of {sampled}."
        blocks.append(Paragraph(text))
    caption = "Ids of each categorical column" + (", and the share of rare and unseen values" if known else "")
    blocks.append(
        PageTable(
            ["column", "ids", *zeros],
            table,
            formats=dict.fromkeys(zeros, ".2%"),
            caption=caption,
            folded=len(table) > 8,
        )
    )
    if config.numeric:
        blocks.append(Terms({"numeric": words(config.numeric)}))
    return [Section("Data", *blocks, *([] if data is None else [Data("data", data)]))]


def _share(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole


def _options(config: RunFile) -> Section:
    defaults = json.loads(json.dumps(asdict(TrainConfig())))
    rows = [
        [flag(name), words(value), "" if value == defaults.get(name) else words(defaults.get(name))]
        for name, value in config.config.items()
    ]
    changed, same = [row for row in rows if row[2]], [row for row in rows if not row[2]]
    blocks: list[Block] = [Paragraph("Every option has its default.")]
    if changed:
        blocks = [PageTable(["option", "value", "default"], changed)]
    caption = f"{len(same)} options with their default" if len(same) > 1 else "1 option with its default"
    return Section(
        "Options", *blocks, PageTable(["option", "value"], [row[:2] for row in same], caption=caption, folded=True)
    )


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
    head = ["table", "rows", "MiB", "sharding", "kernel", "ranks"]
    return [
        Section(
            "Plan",
            Paragraph(
                f"{len(rows)} tables with {total:,} rows of {plan.tables[0].embedding_dim} numbers (latent vector, "
                f"first-order weight, padding), on {plan.world_size} rank(s)."
            ),
            PageTable(head, rows, formats={"MiB": ",.2f"}, caption="Where each table is", folded=len(rows) > _MANY),
        )
    ]


def _origin(run: RunFiles) -> Section:
    config = run.config
    command = repeat_command(config, Path(run.shown_folder))
    terms = {"data": config.data, "digest of the data": config.data_sha256, **config.machine, **config.versions}
    return Section(
        "Repeat it",
        Code(words(command)),
        Terms({name: words(value) for name, value in terms.items() if value is not None}),
    )


def _ranks(ranks: Sequence[int]) -> str:
    several = len(ranks) > 8 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]} to {ranks[-1]}" if several else " ".join(map(str, ranks))

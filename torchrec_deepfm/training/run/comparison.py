"""``report A B``: runs side by side, on one page. Loads no torch."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError, flag
from torchrec_deepfm.files import check_target
from torchrec_deepfm.report.page import Block, Data, PageTable, Paragraph, Picture, Pictures, Section, write_page
from torchrec_deepfm.report.score_figures import precision_recall_figure, roc_figure
from torchrec_deepfm.report.training_curves import (
    SPLITS,
    compared_curves,
    last_per_step,
    points,
    speed,
    thinned,
)
from torchrec_deepfm.training.run.report import DAMAGED, calibration_error, damaged, words
from torchrec_deepfm.training.run.run_files import RunFiles, read_run

_MOST: Final = 5  # runs: more colours are hard to distinguish
_METRICS: Final = {"AUC": "auc", "log loss": "logloss", "NE": "ne", "calibration": "calibration"}


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page that compares two to five runs, finished or not, with the first one.

    By default it is ``compare_<second run>.html`` in the folder of the first run.
    """
    if len(folders) > _MOST:
        raise UserError(f"{len(folders)} runs", where="report", remedy=f"a page compares at most {_MOST}")
    runs = [read_run(folder) for folder in folders]
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"{folders[i]} is named twice", where="report", remedy="name different runs")
    path = output or folders[0] / f"compare_{folders[1].resolve().name}.html"
    check_target("--output", path, like="compare.html")
    named = _names(runs)
    try:
        sections = [
            _figures(named),
            *_curves(named),
            _scores(named),
            _differences(named),
            Section("Runs", PageTable(["name", "folder"], [[name, run.shown_folder] for name, run in named.items()])),
        ]
        subtitle = f"DeepFM, drawn {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        write_page(path, " and ".join(named), [one for one in sections if one.blocks], subtitle=subtitle)
    except UserError:
        raise
    except DAMAGED as error:
        raise damaged(folders[0], error) from error
    return path


def _names(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """The runs by their folders' names, with as many parents as make them unique."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.fsencode(Path(*one[-count:])).decode("utf-8", "replace") for one in parts]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def _figures(runs: Mapping[str, RunFiles]) -> Section:
    rows: list[list[Any]] = []
    for split in SPLITS:
        for title, name in (*_METRICS.items(), ("ECE", "")):
            values = [
                calibration_error(run.calibration.get(split, []))
                if not name
                else ((run.summary or {}).get(split) or {}).get(name)
                for run in runs.values()
            ]
            if any(value is not None for value in values):
                rows.append([f"{split} {title}", *_with_difference(values, ".5f")])
    for title, name, form in (
        ("steps", "steps", ",d"),
        ("training, s", "train_seconds", ",.1f"),
        ("samples/s", "samples_per_second", ",.0f"),
    ):
        values = [(run.summary or {}).get(name) for run in runs.values()]
        if any(value is not None for value in values):
            rows.append([title, *_with_difference(values, form)])
    blocks: list[Block] = []
    unfinished = [name for name, run in runs.items() if run.summary is None]
    if unfinished:
        blocks.append(Paragraph(f"Not finished: {', '.join(unfinished)}."))
    if rows:
        blocks.append(PageTable(_head(runs), rows))
    if len(runs) == 2 and rows:
        first, second = (run.shown_folder for run in runs.values())
        blocks.append(
            Paragraph(
                "The difference is second minus first, of one training each: another seed moves the figures too. "
                "For intervals on the same rows: "
                f"python -m torchrec_deepfm evaluate --run {second} --compare {first} --data DATA --bootstrap 1000."
            )
        )
    if len({run.config.data_sha256 for run in runs.values()}) > 1:
        blocks.append(Paragraph("These runs were trained on different data, so their figures do not compare models."))
    summaries = {name: run.summary for name, run in runs.items()}
    return Section("Result", *blocks, Data("summaries", summaries))


def _head(runs: Mapping[str, RunFiles]) -> list[str]:
    return ["", *runs, *(["difference"] if len(runs) == 2 else [])]


def _with_difference(values: Sequence[float | None], form: str) -> list[str | None]:
    """The values as text, and of two of them the difference."""
    found = [None if value is None else format(value, form) for value in values]
    if len(values) == 2:
        first, second = values
        both = first is not None and second is not None
        found.append(format(second - first, f"+{form}") if both else None)  # type: ignore[operator]
    return found


def _curves(runs: Mapping[str, RunFiles]) -> list[Section]:
    train = {name: thinned(points(run.train_records, "loss")) for name, run in runs.items()}
    found = {"training loss": train}
    for title, key in (("validation log loss", "loss"), ("validation AUC", "auc")):
        found[title] = {name: points(last_per_step(run.records, "validation"), key) for name, run in runs.items()}
    found["samples per second"] = {
        name: thinned([(step, rate) for step, rate, _ in speed(run.records, run.samples_per_step)])
        for name, run in runs.items()
    }
    pictures = [
        Picture(figure, alt=f"{title} of {', '.join(name for name, curve in curves.items() if curve)} by step.")
        for title, curves in found.items()
        if (figure := compared_curves(curves, title)) is not None
    ]
    return [Section("Curves", Pictures(pictures), Data("curves", found))] if pictures else []


def _scores(runs: Mapping[str, RunFiles]) -> Section:
    pictures = []
    for split in SPLITS:
        curves = {name: run.curves[split] for name, run in runs.items() if split in run.curves}
        if (roc := roc_figure(curves)) is not None:
            pictures.append(Picture(roc, alt=f"ROC on {split} of {', '.join(curves)}.", caption=f"ROC on {split}."))
        if (curve := precision_recall_figure(curves)) is not None:
            caption = f"Precision by recall on {split}."
            pictures.append(Picture(curve, alt=f"{caption[:-1]} of {', '.join(curves)}.", caption=caption))
    return Section("Scores", *([Pictures(pictures)] if pictures else []))


def _differences(runs: Mapping[str, RunFiles]) -> Section:
    rows = []
    tables: list[dict[str, Any]] = [
        {
            **{flag(name): value for name, value in run.config.config.items()},
            "ranks": run.config.world_size,
            "data": run.config.data,
            "digest of the data": run.config.data_sha256,
            "ids": sum(run.config.num_embeddings.values()),
            **run.config.versions,
        }
        for run in runs.values()
    ]
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name) for table in tables]
        if any(value != values[0] for value in values):
            rows.append([name, *(None if value is None else words(value) for value in values)])
    if not rows:
        return Section("Differences", Paragraph("Options, data and versions are the same."))
    return Section("Differences", PageTable(["", *runs], rows))

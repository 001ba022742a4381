"""Runs for the tests of faults: data whose rows can be distinguished, and what a run has left behind."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.training.checkpoint.dcp import Cut, LoadPlanner, Reader, TensorCuts, load_metadata

SCHEMA = Schema(label="label", numeric=("row", "noise"), categorical=("user", "item", "shop"))
ROWS = 2000


def make_data(folder: Path, *, rows: int = ROWS) -> PreparedData:
    """Training rows whose first number is their own, so that a batch shows which rows it has."""
    from torchrec_deepfm.data.prepare.prepare import prepare  # loads Polars and DuckDB, which the ranks do not need

    folder.mkdir(parents=True)
    for name, count, first in (("train", rows, 0), ("validation", 300, 10_000), ("test", 300, 20_000)):
        lines = []
        for row in range(first, first + count):
            user, item, shop = row * 7919 % 97, row * 104729 % 53, row % 11
            noise = (row * 2654435761 >> 9) % 4 == 0  # so that whoever learns the rows by heart does worse on others
            label = int((user % 5 + item % 3 > 2) != noise)
            lines.append(f"{label}\t{row}\t{row * 13 % 17}\t{user:x}\t{item:x}\t{shop:x}\n")
        (folder / f"{name}.tsv").write_text("".join(lines))
    return prepare(
        [folder / "train.tsv"], folder / "prepared", validation=[folder / "validation.tsv"], test=[folder / "test.tsv"],
        schema=SCHEMA, min_count=1,
    )  # fmt: skip


def rows_of(dense_features: Tensor) -> list[int]:
    """The numbers of a batch's rows: prepare keeps log(1 + x) of a number."""
    return [round(math.expm1(value)) for value in dense_features[:, 0].double().tolist()]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    files = [path.name for path in folder.iterdir()]
    saved = load_metadata((folder / ".metadata").read_bytes(), frozenset(files))
    state = {}
    for name, entry in saved.state_dict_metadata.items():
        memory = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        state[name] = TensorCuts(tuple(memory.size()), [Cut((0,) * memory.dim(), memory)])
    load(dict(state), storage_reader=Reader(str(folder), local=True, files=files), planner=LoadPlanner(), no_dist=True)
    return {name: pieces.cuts[0].tensor for name, pieces in state.items()}


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("samples_per_second", "seconds")} for line in lines
    ]


def result(run: Path) -> dict[str, Any]:
    """The summary, without what a clock says."""
    summary = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("samples_per_second", "train_seconds")}


def differences(run: Path, other: Path, *, relative: float = 0.0, absolute: float = 0.0) -> list[str]:
    """How the losses, metrics and weights of two runs differ.

    Args:
        run: a finished run.
        other: what it should be.
        relative: how far losses and metrics may be from each other.
        absolute: how far weights may be; 0.0 in both compares to the last bit, the whole summary too.

    Returns:
        A line for each; empty where they are the same.
    """
    found = []
    if relative:
        for mine, theirs in itertools.zip_longest(records(run), records(other), fillvalue={}):
            for name in {"step", "split", "loss", "auc"} & (mine.keys() | theirs.keys()):
                pair = mine.get(name), theirs.get(name)
                close = (
                    isinstance(pair[0], float) and isinstance(pair[1], float) and math.isclose(*pair, rel_tol=relative)
                )
                if pair[0] != pair[1] and not close:
                    found.append(f"metrics.jsonl, step {mine.get('step')}: {name} {pair[0]}, not {pair[1]}")
    else:
        if records(run) != records(other):
            found.append("metrics.jsonl differs")
        if result(run) != result(other):
            found.append("summary.json differs")
    folders, theirs_too = (_kept(run), _kept(other))
    if folders != theirs_too:
        found.append(f"other weights are kept: {sorted(folders ^ theirs_too)}")
    for folder in sorted(folders & theirs_too):
        found += _weights_that_differ(run / folder, other / folder, absolute)
    return found


def _kept(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoint*") if path.name != "checkpoints"}


def _weights_that_differ(run: Path, other: Path, absolute: float) -> list[str]:
    weights, others, found = read_tensors(run), read_tensors(other), []
    if weights.keys() != others.keys():
        found.append(f"{run.name} has weights of other names: {sorted(weights.keys() ^ others.keys())}")
    for name in sorted(weights.keys() & others.keys()):
        if absolute:
            same = bool(((weights[name] - others[name]).abs() <= absolute).all())
        else:
            same = torch.equal(weights[name], others[name])
        if not same:
            found.append(f"{run.name}: weight {name} differs")
    return found


def assert_same_run(run: Path, other: Path) -> None:
    """Both have the same losses, metrics and weights, to the last bit."""
    if found := differences(run, other):
        raise AssertionError(f"{run}: {'; '.join(found)}")


def seen_rows(logs: Path) -> dict[int, list[int]]:
    """The rows of each step over all ranks, from what ``rank.py`` has written; of a step done again, the last time."""
    lines = [json.loads(line) for path in logs.glob("rank_*") for line in path.read_text().splitlines()]
    by_step: dict[int, dict[int, list[int]]] = {}
    ranks: dict[int, int] = {}
    for line in sorted(lines, key=lambda line: line["at"]):
        by_step.setdefault(line["step"], {})[line["rank"]] = line["rows"]
        ranks[line["step"]] = line["ranks"]
    return {
        step: [row for rank in range(ranks[step]) for row in of_ranks[rank]]
        for step, of_ranks in sorted(by_step.items())
    }


def row_errors(logs: Path, *, epochs: int, global_batch: int, rows: int = ROWS) -> list[str]:
    """Where an epoch has not seen every row once, except the last ones that fill no batch; a line for each."""
    steps = seen_rows(logs)
    per_epoch = rows // global_batch
    if sorted(steps) != list(range(1, epochs * per_epoch + 1)):
        return [f"steps 1 to {epochs * per_epoch} are not what was done: {sorted(steps)}"]
    found = []
    for epoch in range(epochs):
        seen = [row for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for row in steps[step + 1]]
        if not len(seen) == len(set(seen)) == per_epoch * global_batch or not set(seen) <= set(range(rows)):
            found.append(f"epoch {epoch}: {len(seen)} rows, {len(set(seen))} of them different")
    return found


def assert_each_row_once(logs: Path, *, epochs: int, global_batch: int, rows: int = ROWS) -> None:
    """Every epoch has seen every row once, except the last ones that fill no batch."""
    if found := row_errors(logs, epochs=epochs, global_batch=global_batch, rows=rows):
        raise AssertionError(f"{logs}: {'; '.join(found)}")

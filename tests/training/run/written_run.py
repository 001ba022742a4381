"""The files of a run, as a training writes them: what reports are drawn from."""

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "format_version": 1,
    "config": {"factor_dim": 4, "dropout": 0.0, "over_arch_layer_sizes": [32, 16], "epochs": 2},
    "num_embeddings": {"user": 1000, "<b>item": 10},
    "numeric": ["price"],
    "data": "data/own",
    "data_sha256": None,
    "world_size": 2,
    "versions": {"torch": "2.13.0"},
}
PLAN: dict[str, Any] = {
    "format": "torchrec_deepfm.plan",
    "format_version": 2,
    "world_size": 2,
    "local_world_size": 2,
    "batch_size": 64,
    "search": "stock",
    "hardware": None,
    "made_with": {},
    "predicted": None,
    "tables": [
        {
            "name": name, "num_embeddings": rows, "embedding_dim": 8, "sharding_type": kind, "compute_kernel": kernel,
            "ranks": [0, 1],
            "shards": [
                {"rank": rank, "offsets": [at, 0], "sizes": [size, 8], "predicted": None}
                for rank, (at, size) in enumerate(shards)
            ],
        }
        for name, rows, kind, kernel, shards in (
            ("t_user", 1000, "row_wise", "fused", [(0, 500), (500, 500)]),
            ("t_<b>item", 10, "data_parallel", "dense", [(0, 10), (0, 10)]),
        )
    ],
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "validation": {"rows": 50, "logloss": 0.4, "auc": 0.8125, "ne": 0.7, "calibration": 1.01},
    "test": {"rows": 40, "logloss": 0.41, "auc": None, "ne": None, "calibration": None},
    "best": {"metric": "auc", "value": 0.8125, "step": 40},
    "samples_per_second": 1234.5,
    "train_seconds": 6.5,
    "steps": 60,
    "epochs": 2,
    "batch_size": 64,
    "world_size": 2,
}
WEIGHTS: dict[str, Any] = {
    "own": "best",
    "best": {"step": 40, "folder": "checkpoint", **{split: SUMMARY[split] for split in ("validation", "test")}},
    "last": {"step": 60, "folder": "checkpoint_last", **{split: SUMMARY[split] for split in ("validation", "test")}},
}
BINS = [
    {"low": 0.0625, "high": 0.125, "rows": 25, "predicted": 0.1, "observed": 0.12},
    {"low": 0.25, "high": 0.5, "rows": 25, "predicted": 0.4, "observed": 0.36},
]
CURVES: dict[str, Any] = {
    "positives": 20, "negatives": 30, "average_precision": 0.6789, "thresholds": [2.0, 0.0, -1.0],
    "true_positives": [10, 15, 20], "false_positives": [3, 15, 30], "edges": [-2.0, 0.0, 3.0],
    "histogram_positives": [5, 15], "histogram_negatives": [24, 6],
}  # fmt: skip
DATA: dict[str, Any] = {
    "format_version": 1,
    "mode": "vocabulary",
    "splits": {
        "train": {"rows": 3840, "positives": 960, "sampled": 3840, "zero": {"user": 0.5, "<b>item": 0.0}},
        "test": {"rows": 40, "positives": None, "sampled": 40, "zero": {"user": 0.625, "<b>item": 0.25}},
    },
}
IMPORTANCE: dict[str, Any] = {
    "format_version": 1,
    "split": "validation",
    "rows": 50,
    "fields": [
        {"field": "user", "contribution": 0.25, "auc_loss": 0.125},
        {"field": "<b>item", "contribution": 0.5, "auc_loss": -0.01},
    ],
}


def train(step: int, loss: float | None, epoch: int = 1) -> dict[str, Any]:
    rates = {"sparse": 0.1 / step, "dense": 0.001 / step}
    return {"step": step, "split": "train", "epoch": epoch, "loss": loss, "lr": rates, "samples_per_second": 9.0}


def evaluation(step: int, split: str = "validation", auc: float | None = 0.8) -> dict[str, Any]:
    return {"step": step, "split": split, "loss": 0.5, "logloss": 0.5, "auc": auc, "ne": 0.9, "rows": 50}


RECORDS = [train(20, 0.7), evaluation(20, auc=0.75), train(40, 0.5), evaluation(40), train(60, 0.45, 2), evaluation(60)]


def make_run(folder: Path, **files: object) -> Path:
    """A run's folder as earlier versions wrote it; `metrics` is a list of records or a text, None leaves a file out."""
    folder.mkdir()
    calibration = {"format_version": 1, "splits": {"validation": BINS, "test": BINS}}
    given = {"config": CONFIG, "plan": PLAN, "summary": SUMMARY, "calibration": calibration, "metrics": RECORDS} | files
    for name, value in given.items():
        if value is None:
            continue
        if name == "metrics":
            text = value if isinstance(value, str) else "".join(json.dumps(record) + "\n" for record in value)  # type: ignore[attr-defined]
            (folder / "metrics.jsonl").write_text(text)
        else:
            (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder

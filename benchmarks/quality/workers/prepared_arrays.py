"""A prepared folder as plain arrays, and the scores of the quality table. Needs numpy and scikit-learn only.

Peers run in environments without this project's requirements. They read the ids, numbers and splits that the loader
reads, from the files of ``prepare``.

Shapes: N rows, I numeric columns, S categorical columns.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of a split: ``dense`` [N, I] float32, ``sparse`` [N, S] int64, ``labels`` [N] of 0 and 1."""

    dense: np.ndarray
    sparse: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A prepared folder: names of the columns, number of ids of each categorical one, and the splits that have rows."""

    numeric: tuple[str, ...]
    num_embeddings: dict[str, int]
    splits: dict[str, Split]

    def with_unit_numbers(self) -> "Arrays":
        """Scale each numeric column to [0, 1] by its smallest and largest training number.

        DeepCTR-Torch's examples do so, and the numbers of Criteo_x1, which FuxiCTR's settings are made for, are in this
        range. Both initialise the embeddings of numbers far from zero, and train badly on larger numbers.
        """
        train = self.splits["train"].dense
        if not train.size:
            return self
        low = train.min(axis=0)
        width = np.maximum(train.max(axis=0) - low, 1e-6)
        scaled = {name: replace(split, dense=(split.dense - low) / width) for name, split in self.splits.items()}
        return replace(self, splits=scaled)

    @classmethod
    def read(cls, folder: Path) -> "Arrays":
        """Load a folder without list columns into memory."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = manifest["schema"]["categorical"]
        return cls(
            numeric=tuple(manifest["schema"]["numeric"]),
            num_embeddings={name: manifest["num_embeddings"][name] for name in names},
            splits={split: _read(folder, days) for split, days in manifest["splits"].items() if days},
        )

    def held_out_scores(self, predict: Callable[[Split], np.ndarray]) -> dict[str, dict[str, float]]:
        """Score the click probabilities that ``predict`` returns for the validation and test splits."""
        return {name: score(split.labels, predict(split)) for name, split in self.splits.items() if name != "train"}


def _read(folder: Path, days: list[dict[str, Any]]) -> Split:
    parts: dict[str, list[np.ndarray]] = {"dense": [], "sparse": [], "labels": []}
    for day in days:
        rows = slice(day["start"], day["start"] + day["rows"])
        for kind, found in parts.items():
            path = folder / f"{day['stem']}_{kind}.npy"
            # data without numeric columns have no dense array
            part = np.load(path)[rows] if path.exists() else np.zeros((day["rows"], 0), np.float32)
            found.append(part)
    return Split(
        dense=np.concatenate(parts["dense"]).astype(np.float32),
        sparse=np.concatenate(parts["sparse"]).astype(np.int64),
        labels=np.concatenate(parts["labels"]).reshape(-1).astype(np.int64),
    )


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Return ``auc`` and ``logloss`` of click probabilities, clipped to [1e-7, 1 - 1e-7]."""
    kept = np.clip(np.asarray(probabilities, dtype=np.float64).reshape(-1), 1e-7, 1 - 1e-7)
    return {"auc": float(roc_auc_score(labels, kept)), "logloss": float(log_loss(labels, kept))}


class Clock:
    """Seconds since its construction: the time of a training without data and imports."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        """Return the seconds."""
        return time.perf_counter() - self._start


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a worker's result, completely or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    part.rename(path)


def run_worker(train: Callable[[Path, Path, dict[str, Any], int], None]) -> None:
    """Call a worker's ``train`` with its command line: DATA RESULT.json SETTINGS.json SEED."""
    data, result, settings, seed = sys.argv[1:]
    train(Path(data), Path(result), json.loads(Path(settings).read_text(encoding="utf-8")), int(seed))

"""Random rows of Criteo's shape, the same for every side of ``speed.py``. Needs numpy only: peers import it."""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np

NUMERIC, CATEGORICAL = 13, 26
HIDDEN = (400, 400, 400)


@dataclass(frozen=True)
class Rows:
    """Batches in memory.

    Attributes:
        num_embeddings: Rows of each of the 26 tables.
        dense: [batches, B, 13] float32 in [0, 1).
        ids: [batches, B, 26] int64, log-uniform.
        labels: [batches, B] float32.
    """

    num_embeddings: int
    dense: Any
    ids: Any
    labels: Any


def draw(rows: int, batch_size: int, batches: int = 8) -> Rows:
    """Draw batches whose ids are log-uniform, as those of click logs roughly are.

    Args:
        rows: Of all tables together.
        batch_size: Samples per batch.
        batches: How many.
    """
    random = np.random.default_rng(0)
    size = rows // CATEGORICAL
    places = random.random((batches, batch_size, CATEGORICAL))
    ids = np.minimum(np.exp(places * np.log(size)).astype(np.int64) - 1, size - 1)
    shuffled = random.permutation(size)  # popular ids are not neighbours
    return Rows(
        size,
        random.random((batches, batch_size, NUMERIC), dtype=np.float32),
        shuffled[ids],
        random.integers(2, size=(batches, batch_size)).astype(np.float32),
    )


def arguments(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Read the options that every side takes, besides those of ``parser``."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--work", choices=["train", "forward"], default="train")
    parser.add_argument("--precision", choices=["float32", "medium", "bf16"], default="float32")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--factor-dim", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()

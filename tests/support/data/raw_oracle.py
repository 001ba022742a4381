"""What a prepared folder must hold, worked out from the raw text in plain Python: no DuckDB, no Polars.

Only the lots of the split are numpy's, since a seeded stream of random numbers has no other source.
"""

import math
import random
import struct
from collections import Counter

import numpy as np

from torchrec_deepfm.data.schema import CRITEO_KAGGLE, Schema

SMALL = Schema(label="y", numeric=("n1", "n2"), categorical=("c1", "c2", "c3"))


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def parse(text: bytes, schema: Schema) -> list[tuple[int, list[float], list[int | None]]]:
    """(label, numbers, categories) of every row; blank lines are not rows."""
    rows = []
    for line in text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        if not line:
            continue
        fields = line.split(b"\t")
        numbers = fields[1 : 1 + len(schema.numeric)]
        categories = fields[1 + len(schema.numeric) :]
        assert len(categories) == len(schema.categorical)
        dense = [float32(math.log1p(max(int(field), 0))) if field else 0.0 for field in numbers]
        rows.append((int(fields[0]), dense, [int(field, 16) if field else None for field in categories]))
    return rows


def splits_of(seed: int, file: int, rows: int, way: str = "8:1:1") -> list[str]:
    """The split of every row, from one draw for the whole file."""
    names = {"8:1:1": ["train"] * 8 + ["validation", "test"], "9:1": ["train"] * 9 + ["test"]}[way]
    return [names[int(draw * 10)] for draw in np.random.default_rng((seed, file)).random(rows)]


def vocabularies(train, schema: Schema, min_count: int) -> list[dict[int | None, tuple[int, int]]]:
    """Per column: value -> (id, count)."""
    result = []
    for j in range(len(schema.categorical)):
        counts = Counter(categories[j] for _, _, categories in train)
        kept = [
            (-count, -1 if value is None else value, value) for value, count in counts.items() if count >= min_count
        ]
        result.append({value: (i, -count) for i, (count, _, value) in enumerate(sorted(kept, key=lambda k: k[:2]), 1)})
    return result


def random_text(rows: int, seed: int, schema: Schema = CRITEO_KAGGLE) -> bytes:
    """Skewed categories (so that thresholds and ties matter), missing fields, negative numbers, mixed-case hex."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        numbers = ["" if draw.random() < 0.3 else str(int(draw.lognormvariate(2, 2)) - 2) for _ in schema.numeric]
        categories = []
        for j, _ in enumerate(schema.categorical):
            value = (int(draw.paretovariate(0.7)) * 2654435761 + j) % 2**32
            text = draw.choice((f"{value:08x}", f"{value:08X}"))
            categories.append("" if draw.random() < 0.1 * (j % 4) else text)
        lines.append("\t".join([str(int(draw.random() < 0.25)), *numbers, *categories]))
    return ("\n".join(lines) + "\n").encode()

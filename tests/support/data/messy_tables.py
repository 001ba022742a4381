"""Tables with the columns that real ones have: hashed keys, ids that look like numbers, counts, times, leaks."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray


def _clicks(draw: np.random.Generator, logits: NDArray[Any]) -> NDArray[Any]:
    return (draw.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(np.int64)


def avazu_like(path: Path, rows: int) -> Path:
    """An advertising log as Avazu's: a key beyond 64 bits, ids with gaps as integers, hashes as text, a date number."""
    draw = np.random.default_rng(1)

    def ids(count: int, low: int, high: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids between two numbers, some a thousand times as frequent as others, and the effect of each on the click."""
        names = np.sort(draw.choice(np.arange(low, high), count, replace=False))
        share = draw.lognormal(0, 2, count)
        chosen = draw.choice(count, rows, p=share / share.sum())
        return names[chosen], draw.normal(0, 0.7, count)[chosen]

    creative, effect = ids(600, 375, 24_052)
    group, other = ids(200, 112, 2_758)
    publisher, third = ids(120, 100_000, 100_249)
    device = draw.choice(draw.integers(0, 2**32, rows // 4), rows)
    visits = np.floor(draw.lognormal(2.5, 1.5, rows)).astype(np.int64)
    click = _clicks(draw, -1.6 + effect + other + third + 0.3 * (np.log1p(visits) - 2.5))
    frame = pl.DataFrame(
        {
            "id": [str(10**19 + int(key)) for key in draw.choice(10**12, rows, replace=False)],
            "click": click,
            "hour": 14_102_100 + draw.integers(0, 24, rows),
            "banner_pos": draw.integers(0, 7, rows),
            "device_ip": [f"{value:08x}" for value in device],
            "C14": creative,
            "C17": group,
            "C20": np.where(draw.random(rows) < 0.4, -1, publisher),
            "visits": visits,
            "constant": ["same"] * rows,
            "paid": click * draw.integers(1, 500, rows),
        }
    )
    frame.write_csv(path)
    return path


def movielens_like(path: Path, rows: int) -> Path:
    """Ratings as MovieLens': users, items (a name with a dot), seconds since 1970, ages with gaps."""
    draw = np.random.default_rng(2)
    user, item = draw.integers(1, 300, rows), draw.integers(1, 500, rows)
    likes = draw.normal(0, 1, 300)[user] + draw.normal(0, 1, 500)[item]
    frame = pl.DataFrame(
        {
            "user_id": user,
            "item.id": item,
            "timestamp": draw.integers(874_724_710, 893_286_638, rows),
            "age": draw.integers(7, 73, 300)[user],
            "price": pl.Series(np.where(draw.random(rows) < 0.1, np.nan, draw.exponential(30, rows))).fill_nan(None),
            "label": _clicks(draw, likes),
        }
    )
    frame.write_parquet(path)
    return path

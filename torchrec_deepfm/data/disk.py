"""Is there room? An estimate before the start, from the head of every source."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import polars as pl

from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.source import Source
from torchrec_deepfm.errors import UserError

# For vocabularies, spilling and the error of the estimate.
MARGIN: Final = 1.15


def estimate_bytes(heads: Sequence[Source], schema: Schema, *, vocabulary: bool) -> int:
    """Estimate how much disk a ``prepare`` takes at its peak, the work folder included.

    Args:
        heads: The sources, opened so that their first piece is small.
        schema: The prepared schema.
        vocabulary: Whether values are staged until their vocabulary is known.

    Returns:
        Bytes: 4 for each number, id and label, as much again for staged values, and a margin.
    """
    total = 0.0
    for source in heads:
        piece = next(source.pieces(start=0, line=0, skip_bad=True), None)
        if piece is None or not len(piece.frame):
            continue
        rows = len(piece.frame) / max(piece.done, 1e-12)
        values = float(len(schema.one_hot))
        extra = 0.0
        for name in piece.frame.columns:
            if isinstance(piece.frame.schema[name], pl.List):
                mean = float(piece.frame[name].list.len().fill_null(0).mean() or 0)  # type: ignore[arg-type]
                values += mean
                extra += 8 if name.startswith("c") else 4 * mean  # offsets, weights
        total += rows * (4 * (1 + len(schema.numeric) + values * (2 if vocabulary else 1)) + extra)
    return int(total * MARGIN)


def check_room(output: Path, needed: int, work: Path) -> None:
    """Check that the disk of the output has room.

    Args:
        output: The folder that is to appear.
        needed: Bytes at the peak.
        work: The work folder, whose content counts as there already.

    Raises:
        UserError: There is less.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    have = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.exists() else 0
    free = shutil.disk_usage(place).free
    if needed - have > free:
        raise UserError(
            f"{output}: about {_shown(needed - have)} of disk are needed, {_shown(free)} are free; free some, or name "
            "an output on another disk"
        )


def _shown(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:,.1f} MiB"

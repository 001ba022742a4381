"""Estimate of the disk space before the start, from the head of every source."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import polars as pl

from torchrec_deepfm.data.dataset.publish import OutOfRoomError
from torchrec_deepfm.data.raw.source import Source
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

# For vocabularies, spilling and the error of the estimate.
MARGIN: Final = 1.15
_HEAD_PIECES: Final = 16


def estimate_bytes(heads: Sequence[tuple[Source, float]], schema: Schema, *, staged: bool, log: bool) -> int:
    """Estimate how much disk a ``prepare`` takes at its peak, the work folder included.

    ``heads``: sources, opened so that their pieces are small, and the multiple of its bytes that each represents.
    ``staged``: whether values are staged on disk for the vocabulary. Returns bytes: 4 for each number, id and label,
    the staged values and numbers, and a margin.
    """
    total = 0.0
    for source, scale in heads:
        rows, values, waiting, done = 0, 0.0, 0, 0.0
        with suppress(UserError):  # errors of a source are raised when it is read
            for count, piece in enumerate(source.pieces(start=0, line=0, skip_bad=True)):
                # Where a file is read in larger blocks than pieces, `done` does not change within a block.
                if count == _HEAD_PIECES or (count and piece.done > done):
                    break
                done = piece.done
                rows += len(piece.frame)
                columns = [name for name in piece.frame.columns if name[0] in "cw"]
                waiting += int(piece.frame.select(columns).estimated_size())
                for name in columns:
                    if isinstance(piece.frame.schema[name], pl.List):
                        length = int(piece.frame[name].list.len().sum() or 0)
                        values += (
                            length + 2 * len(piece.frame) if name.startswith("c") else length
                        )  # 8 bytes per offset
        if not rows:
            continue
        each = 1 + len(schema.numeric) * (2 if log else 1) + len(schema.one_hot) + values / rows
        total += scale * rows / max(done, 1e-12) * (4 * each + (waiting / rows if staged else 0))
    return int(total * MARGIN)


def check_room(output: Path, needed: int, work: Path) -> None:
    """Check that the output's disk has enough free space.

    ``work``: the work folder, whose content is already on the disk. Raises ``OutOfRoomError``: the space is too small.
    """
    place = output.resolve()
    while not place.exists():
        place = place.parent
    have = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.exists() else 0
    free = shutil.disk_usage(place).free
    if needed - have > free:
        raise OutOfRoomError(
            f"{output}: needs about {_shown(needed - have)} of disk, {_shown(free)} are free; free some, or name "
            "an output on another disk"
        )


def _shown(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:,.1f} MiB"

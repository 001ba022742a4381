"""Units: sources whose rows share arrays, and the parts that their rows are dealt to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.raw.source import JoinedPiece, Source
from torchrec_deepfm.data.raw.table_source import TableSource, joined_pieces

# Called after every piece: rows of the piece, share of the source that is done.
OnPiece = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The destination of some of a source's rows, by ``lots`` (0 to 9, or from ``row_splits.py``), or of all rows."""

    stem: str
    split: str
    lots: range | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Sources whose rows share arrays, one after another, and where these rows go.

    ``sources``: the raw rows; one source, or many small files of a table. ``entropy``: seed of the buckets; unused with
    one part. ``lots``: file with the bucket of each row, where it follows from its values.
    """

    name: str
    sources: tuple[Source, ...]
    parts: tuple[Part, ...]
    entropy: tuple[int, ...] = ()
    lots: Path | None = None

    @property
    def bytes(self) -> int:
        """Size of the stored sources."""
        return sum(source.bytes for source in self.sources)

    def __str__(self) -> str:
        """Name the sources."""
        first, last = self.sources[0].path, self.sources[-1].path
        return first if len(self.sources) == 1 else f"{len(self.sources):,} files, {first} to {last}"

    def pieces(self, start: tuple[int, int, int], *, skip_bad: bool) -> Iterator[JoinedPiece]:
        """Continue reading at the end of a piece.

        ``start``: ``next_start`` of the previous piece, or zeros. Yields the pieces. Their borders are the same however
        often reading was resumed.
        """
        if len(self.sources) > 1:
            tables = [source for source in self.sources if isinstance(source, TableSource)]
            assert len(tables) == len(self.sources)
            yield from joined_pieces(tables, start, skip_bad=skip_bad)
            return
        _, end, line = start
        for piece in self.sources[0].pieces(start=end, line=line, skip_bad=skip_bad):
            yield JoinedPiece(
                frame=piece.frame,
                next_start=(0, piece.end, piece.line),
                done=piece.done,
                skipped=tuple((0, bad) for bad in piece.skipped),
            )


def deal(unit: Unit, first: int, rows: int) -> Iterator[tuple[Part, NDArray[np.bool_] | None]]:
    """Divide the rows of a piece among the parts of their unit; ``None`` for all. ``first`` good rows came before."""
    if len(unit.parts) == 1:
        yield unit.parts[0], None
        return
    if unit.lots is not None:
        lots = np.load(unit.lots, mmap_mode="r")[first : first + rows]
    else:
        lots = (draws(unit.entropy, first, rows) * 10).astype(np.int8)
    for part in unit.parts:
        assert part.lots is not None
        yield part, (lots >= part.lots.start) & (lots < part.lots.stop)


def draws(entropy: tuple[int, ...], first: int, rows: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of the rows from ``first`` on."""
    # 64 random bits per row, so that those of any range can be computed without the rows before it.
    bits = np.random.PCG64(np.random.SeedSequence(entropy))
    bits.advance(first)
    return np.random.Generator(bits).random(rows)

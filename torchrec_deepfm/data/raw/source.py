"""What the two kinds of raw input have in common: typed pieces of rows, in order, from any place where a piece ends.

``textlog.py`` reads Criteo's text, ``table.py`` Parquet and CSV. ``prepare`` knows neither: it takes pieces.

Shape letters: n rows of a piece, I numeric columns, F categorical columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import polars as pl
import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A bad row that was left out; ``place`` counts all rows of its piece from 0, bad ones included."""

    line: int
    reason: str
    place: int = 0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of a source, in its order.

    Args:
        frame: n rows: ``label`` UInt8; ``n0`` ... (I columns, Int64 or Float64, null for missing); ``c0`` ... (F
            columns, UInt32, Int64, String, or List of the latter two, null for missing); ``w{j}`` List(Float32) beside
            every list ``c{j}`` that has weights.
        end: Where the next piece starts: bytes of (uncompressed) text, rows of a table. Callers only hand it back.
        line: Lines or rows read up to ``end``.
        done: Share of the source read up to ``end``, 0 to 1.
        skipped: Bad rows of this piece that were left out.
        kept: Columns that the source was asked to carry along, of all rows of the piece, bad ones included.
    """

    frame: pl.DataFrame
    end: int
    line: int
    done: float
    skipped: tuple[Skipped, ...] = ()
    kept: pa.Table | None = None


class Source(Protocol):
    """One file of raw rows."""

    @property
    def path(self) -> str:
        """As the user named it."""
        ...

    @property
    def bytes(self) -> int:
        """Its size as it is stored."""
        ...

    def pieces(self, *, start: int, line: int, skip_bad: bool) -> Iterator[Piece]:
        """Read on from the end of a piece.

        ``start``: ``end`` of the piece before, or 0. ``line``: ``line`` of the piece before, or 0. Yields the pieces.
        Their borders are the same however often reading was resumed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class JoinedPiece:
    """Some rows of several sources that are read one after another.

    Args:
        frame: As in ``Piece``.
        next_start: Where the next piece starts: the place of its source among all, and ``end`` and ``line`` in it.
        done: Share of all bytes read up to there, 0 to 1.
        skipped: Bad rows that were left out, each with the place of its source.
    """

    frame: pl.DataFrame
    next_start: tuple[int, int, int]
    done: float
    skipped: tuple[tuple[int, Skipped], ...] = ()

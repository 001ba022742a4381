"""The interface of both kinds of raw input: typed pieces of rows, in order, from the end of any piece on.

``criteo_text.py`` reads Criteo's text, ``table_source.py`` Parquet and CSV; ``prepare`` sees only pieces.

Shape letters: n rows of a piece, I numeric columns, F categorical columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import polars as pl
import pyarrow as pa

from torchrec_deepfm.data.raw.bad_rows import Skipped


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of a source, in its order.

    Args:
        frame: n rows: ``label`` UInt8; ``row_weight`` Float32 if rows have weights; ``n0`` ... (I columns, Int64 or
            Float64, null for missing); ``c0`` ... (F columns, UInt32, Int64, String, or List of the latter two, null
            for missing); ``w{j}`` List(Float32) beside every list ``c{j}`` that has weights.
        end: Where the next piece starts: bytes of (uncompressed) text, rows of a table. Opaque to callers.
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
        """Size of the stored file."""
        ...

    def pieces(self, *, start: int, line: int, skip_bad: bool) -> Iterator[Piece]:
        """Continue reading at the end of a piece.

        ``start``: ``end`` of the previous piece, or 0. ``line``: ``line`` of the previous piece, or 0. Yields the
        pieces. Their borders are the same however often reading was resumed.
        """
        ...

    def share(self, *, start: int, line: int, skip_bad: bool, mine: Callable[[int], bool]) -> Iterator[Piece | None]:
        """As ``pieces``, with ``None`` in place of each piece whose number, from 0 on, is not ``mine``."""
        ...


@dataclass(frozen=True, kw_only=True)
class JoinedPiece:
    """Some rows of several sources that are read one after another.

    Args:
        frame: As in ``Piece``.
        next_start: Where the next piece starts: the index of its source, and ``end`` and ``line`` in it.
        done: Share of all bytes read up to there, 0 to 1.
        skipped: Bad rows that were left out, each with the index of its source.
    """

    frame: pl.DataFrame
    next_start: tuple[int, int, int]
    done: float
    skipped: tuple[tuple[int, Skipped], ...] = ()

"""First pass: raw rows -> labels, numbers and, with hashing, ids; with a vocabulary, staged values.

Every unit, a source or many small ones, is staged separately, piece by piece, and resumed after its last recorded
piece. What a stem's arrays hold depends on the sources alone, not on the pieces, the memory or the number of ranks.

Shape letters: n rows of a piece, I numeric columns, F1 categorical columns with one value per row.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import DENSE, LABELS, SPARSE
from torchrec_deepfm.data.dataset.publish import sync
from torchrec_deepfm.data.prepare.passes.npy_appender import GrowingArray, read_rows
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.raw.source import JoinedPiece, Source
from torchrec_deepfm.data.raw.table_source import TableSource, joined_pieces
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.data.values.hashing import Hashing
from torchrec_deepfm.data.values.row_columns import categorical_columns, list_values
from torchrec_deepfm.errors import UserError

# Listed skipped rows per source; all are counted.
LISTED: Final = 1000

# Called after every piece: rows of the piece, share of the source that is done.
OnPiece = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The destination of some of a source's rows.

    ``lots``: their random buckets, of 0 to 9, or what ``row_splits.py`` dealt them; ``None``: all rows.
    """

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


@dataclass(frozen=True, kw_only=True)
class Stager:
    """Stages sources with common settings.

    ``hashing``: gives the ids; ``None`` with a vocabulary.
    """

    work: WorkFolder
    schema: Schema
    numbers: tuple[numeric.NumericColumn, ...]
    hashing: Hashing | None
    skip_bad: bool

    @property
    def takes_logs(self) -> bool:
        """Whether numbers wait for the minimum of their file."""
        return any(column.transform == "log" for column in self.numbers)

    def stage(self, unit: Unit, on_piece: OnPiece) -> None:
        """Stage a source to its end, after its last recorded piece.

        ``on_piece``: called after every piece.
        """
        record = self.work.record(unit.name) or _nothing(unit)
        if record["finished"]:
            return
        if record["pieces"] == 0:
            self._clear(unit)
        with ExitStack() as stack:
            files = {part.stem: self._open(part.stem, record["stems"][part.stem], stack) for part in unit.parts}
            for piece in unit.pieces(tuple(record["start"]), skip_bad=self.skip_bad):
                self._add(unit, piece, files, record)
                for arrays in files.values():
                    for array in arrays.values():
                        array.flush()
                self.work.write_record(unit.name, record)
                on_piece(len(piece.frame), piece.done)
            rows = record["rows"]
            if not rows:
                bad = skipped_rows(record)
                skipped = f" ({bad} bad ones were skipped)" if bad else ""
                raise UserError(f"{unit}: the file has no rows{skipped}; give a file with data or leave it out")
        if self.takes_logs:
            self._take_logs(unit, record)
        record["finished"] = True
        self.work.write_record(unit.name, record)

    def staged_files(self, stem: str, record: Mapping[str, Any]) -> list[tuple[Path, int, int]]:
        """List the staged files of a stem.

        Returns parquet files in row order, each with its rows and the bytes that its values take in memory.
        """
        pieces = record["stems"][stem]["pieces"]
        return [(self._staged(stem, number), rows, size) for number, (rows, size) in enumerate(pieces) if rows]

    def _staged(self, stem: str, number: int) -> Path:
        return self.work.staged / stem / f"{number:06d}.parquet"

    def _clear(self, unit: Unit) -> None:
        """Remove files of an unrecorded piece, or of a source that has changed since."""
        for part in unit.parts:
            shutil.rmtree(self.work.staged / part.stem, ignore_errors=True)
            (self.work.staged / part.stem).mkdir()
            for path in self.work.out.glob(f"{part.stem}_*.npy"):
                path.unlink()

    def _open(self, stem: str, counts: dict[str, Any], stack: ExitStack) -> dict[str, GrowingArray]:
        def growing(folder: Path, ending: str, row: tuple[int, ...], dtype: type, rows: int) -> GrowingArray:
            return stack.enter_context(GrowingArray(folder / f"{stem}{ending}", row, dtype, rows=rows))

        rows, out = counts["rows"], self.work.out
        log = self.takes_logs
        files = {
            LABELS: growing(out, LABELS, (1,), np.int32, rows),
            DENSE: growing(
                self.work.staged / stem if log else out,
                DENSE,
                (len(self.schema.numeric),),
                np.int32 if log else np.float32,
                rows,
            ),
        }
        if self.hashing is not None:
            files[SPARSE] = growing(out, SPARSE, (len(self.schema.one_hot),), np.int32, rows)
        for j, name in enumerate(self.schema.categorical):
            if name not in self.schema.multi_hot:
                continue
            values = counts["values"].get(str(j), 0)
            # N + 1 offsets for N rows: the first is 0, and written before any row.
            begun = rows > 0
            files[f"_offsets_{j}.npy"] = growing(out, f"_offsets_{j}.npy", (), np.int64, rows + 1 if begun else 0)
            if not begun:
                files[f"_offsets_{j}.npy"].append(np.zeros(1, np.int64))
            if self.hashing is not None:
                files[f"_ids_{j}.npy"] = growing(out, f"_ids_{j}.npy", (), np.int32, values)
            if name in self.schema.weighted:
                files[f"_weights_{j}.npy"] = growing(out, f"_weights_{j}.npy", (), np.float32, values)
        return files

    def _add(
        self, unit: Unit, piece: JoinedPiece, files: dict[str, dict[str, GrowingArray]], record: dict[str, Any]
    ) -> None:
        frame = piece.frame
        labels = frame["label"].to_numpy().astype(np.int32)[:, None]
        dense = numeric.dense(frame, self.numbers)
        categories = categorical_columns(frame, self.numbers)
        if self.takes_logs and dense.size:
            least = int(dense.min())
            record["minimum"] = least if record["minimum"] is None else min(record["minimum"], least)
        for part, chosen in deal(unit, record["rows"], len(frame)):
            arrays, counts = files[part.stem], record["stems"][part.stem]
            mine = categories if chosen is None else categories.filter(pl.Series(chosen))
            mine_labels = labels if chosen is None else labels[chosen]
            arrays[LABELS].append(mine_labels)
            arrays[DENSE].append(dense if chosen is None else dense[chosen])
            self._add_categories(part.stem, mine, arrays, counts, record["pieces"])
            counts["rows"] += len(mine)
            counts["positives"] += int(mine_labels.sum())
        record["rows"] += len(frame)
        record["pieces"] += 1
        record["start"] = piece.next_start
        for place, bad in piece.skipped:
            skipped = record["skipped"].setdefault(str(place), {"rows": 0, "first": []})
            skipped["rows"] += 1
            if len(skipped["first"]) < LISTED:
                skipped["first"].append({"line": bad.line, "reason": bad.reason})

    def _add_categories(
        self, stem: str, frame: pl.DataFrame, arrays: dict[str, GrowingArray], counts: dict[str, Any], piece: int
    ) -> None:
        one_hot = []
        for j, name in enumerate(self.schema.categorical):
            if name not in self.schema.multi_hot:
                one_hot.append(j)
                continue
            bags, before = list_values(frame, j), counts["values"].get(str(j), 0)
            arrays[f"_offsets_{j}.npy"].append(before + np.cumsum(bags.lengths))
            counts["values"][str(j)] = before + len(bags.values)
            if self.hashing is not None:
                arrays[f"_ids_{j}.npy"].append(self.hashing.ids(j, bags.values))
            if bags.weights is not None:
                arrays[f"_weights_{j}.npy"].append(bags.weights)
        if self.hashing is not None:
            arrays[SPARSE].append(self.hashing.block(frame, one_hot))
            return
        values = frame.select(f"c{j}" for j in range(len(self.schema.categorical)))
        counts["pieces"].append([len(frame), int(values.estimated_size())])
        if len(frame):
            values.write_parquet(self._staged(stem, piece), compression="lz4", statistics=False)
            sync(self._staged(stem, piece))

    def _take_logs(self, unit: Unit, record: dict[str, Any]) -> None:
        """Rewrite the dense integers as logarithms, once their minimum is known."""
        for part in unit.parts:
            columns = (len(self.schema.numeric),)
            raw = self.work.staged / part.stem / f"{part.stem}{DENSE}"
            with GrowingArray(self.work.out / f"{part.stem}{DENSE}", columns, np.float32) as logs:
                for rows in read_rows(raw, columns, np.int32):
                    logs.append(numeric.shifted_log(rows, record["minimum"] or 0))
                logs.flush()


def skipped_rows(record: Mapping[str, Any]) -> int:
    """Count the bad rows that were left out."""
    return sum(int(skipped["rows"]) for skipped in record["skipped"].values())


def _nothing(unit: Unit) -> dict[str, Any]:
    empty = {part.stem: {"rows": 0, "positives": 0, "pieces": [], "values": {}} for part in unit.parts}
    return {
        "finished": False,
        "pieces": 0,
        "rows": 0,
        "start": (0, 0, 0),
        "minimum": None,
        "stems": empty,
        "skipped": {},
    }


def deal(unit: Unit, first: int, rows: int) -> Iterator[tuple[Part, NDArray[np.bool_] | None]]:
    """Divide the rows of a piece among the parts of their unit; ``None`` for all of them.

    ``first``: the number of good rows before them.
    """
    if len(unit.parts) == 1:
        yield unit.parts[0], None
        return
    if unit.lots is not None:
        lots = np.load(unit.lots, mmap_mode="r")[first : first + rows]
    else:
        # 64 random bits per row, so that those of any range can be computed without the rows before it.
        bits = np.random.PCG64(np.random.SeedSequence(unit.entropy))
        bits.advance(first)
        lots = (np.random.Generator(bits).random(rows) * 10).astype(np.int8)
    for part in unit.parts:
        assert part.lots is not None
        yield part, (lots >= part.lots.start) & (lots < part.lots.stop)

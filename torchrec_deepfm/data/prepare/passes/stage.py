"""First pass: raw rows -> labels, numbers and, with hashing, ids; with a vocabulary, staged values.

Every unit, a source or many small ones, is staged separately, piece by piece, and resumed after its last recorded
piece. What a stem's arrays hold depends on the sources alone, not on the pieces, the memory or the number of ranks.

Shape letters: n rows of a piece, I numeric columns, F1 categorical columns with one value per row.
"""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from torchrec_deepfm.data.dataset.prepared import DENSE, LABELS, ROW_WEIGHTS, SPARSE
from torchrec_deepfm.data.dataset.publish import sync
from torchrec_deepfm.data.prepare.passes.npy_appender import GrowingArray, read_rows
from torchrec_deepfm.data.prepare.passes.stage_record import StageRecord, StemRows, read_record
from torchrec_deepfm.data.prepare.sources.units import OnPiece, Unit, deal, draws
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.raw.source import JoinedPiece
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.data.values.hashing import Hashing
from torchrec_deepfm.data.values.row_columns import categorical_columns, list_values
from torchrec_deepfm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stager:
    """Stages sources with common settings.

    ``hashing``: gives the ids; ``None`` with a vocabulary. ``negative_rate``: share of the negative training rows to
    keep. ``halved``: the stem whose rows are for validation and test.
    """

    work: WorkFolder
    schema: Schema
    numbers: tuple[numeric.NumericColumn, ...]
    hashing: Hashing | None
    skip_bad: bool
    negative_rate: float = 1.0
    halved: str | None = None

    @property
    def takes_logs(self) -> bool:
        """Whether numbers wait for the minimum of their file."""
        return any(column.transform == "log" for column in self.numbers)

    def stage(self, unit: Unit, on_piece: OnPiece) -> None:
        """Stage a source to its end, after its last recorded piece."""
        record = read_record(self.work, unit) or StageRecord(stems={part.stem: StemRows() for part in unit.parts})
        if record.finished:
            return
        if record.pieces == 0:
            self._clear(unit)
        with ExitStack() as stack:
            files = {part.stem: self._open(part.stem, record.stems[part.stem], stack) for part in unit.parts}
            for piece in unit.pieces(record.start, skip_bad=self.skip_bad):
                self._add(unit, piece, files, record)
                for arrays in files.values():
                    for array in arrays.values():
                        array.flush()
                record.write(self.work, unit)
                on_piece(len(piece.frame), piece.done)
            if not record.rows:
                bad = record.skipped_rows
                skipped = f" ({bad} bad ones were skipped)" if bad else ""
                raise UserError(
                    f"the file has no rows{skipped}", where=unit, remedy="give a file with data or leave it out"
                )
        if self.takes_logs:
            self._take_logs(unit, record)
        record.finished = True
        record.write(self.work, unit)

    def staged_files(self, stem: str, record: StageRecord) -> list[tuple[Path, int, int]]:
        """List the parquet files of a stem in row order, each with its rows and the bytes of its values in memory."""
        pieces = record.stems[stem].pieces
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

    def _open(self, stem: str, counts: StemRows, stack: ExitStack) -> dict[str, GrowingArray]:
        def growing(folder: Path, ending: str, row: tuple[int, ...], dtype: type, rows: int) -> GrowingArray:
            return stack.enter_context(GrowingArray(folder / f"{stem}{ending}", row, dtype, rows=rows))

        rows, out = counts.rows, self.work.out
        log = self.takes_logs
        files = {
            LABELS: growing(out, LABELS, (1,), np.int32, rows),
            DENSE: growing(
                self.work.staged / stem if log else out,
                DENSE,
                (len(self.schema.dense_names),),
                np.int32 if log else np.float32,
                rows,
            ),
        }
        if self.schema.weight is not None:
            files[ROW_WEIGHTS] = growing(out, ROW_WEIGHTS, (1,), np.float32, rows)
        if self.hashing is not None:
            files[SPARSE] = growing(out, SPARSE, (len(self.schema.one_hot),), np.int32, rows)
        for j, name in enumerate(self.schema.categorical):
            if name not in self.schema.multi_hot:
                continue
            values = counts.values.get(str(j), 0)
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
        self, unit: Unit, piece: JoinedPiece, files: dict[str, dict[str, GrowingArray]], record: StageRecord
    ) -> None:
        frame = piece.frame
        labels = frame["label"].to_numpy().astype(np.int32)[:, None]
        dense = numeric.dense(frame, self.numbers)
        categories = categorical_columns(frame, self.numbers)
        if self.takes_logs and dense.size:
            least = int(dense.min())
            record.minimum = least if record.minimum is None else min(record.minimum, least)
        for part, chosen in deal(unit, record.rows, len(frame)):
            if self.negative_rate < 1.0 and part.split == "train" and part.stem != self.halved:
                kept = (labels[:, 0] == 1) | (draws((*unit.entropy, 1), record.rows, len(frame)) < self.negative_rate)
                chosen = kept if chosen is None else chosen & kept
            arrays, counts = files[part.stem], record.stems[part.stem]
            mine = categories if chosen is None else categories.filter(pl.Series(chosen))
            mine_labels = labels if chosen is None else labels[chosen]
            arrays[LABELS].append(mine_labels)
            if self.schema.weight is not None:
                weights = frame["row_weight"].to_numpy()[:, None]
                arrays[ROW_WEIGHTS].append(weights if chosen is None else weights[chosen])
            arrays[DENSE].append(dense if chosen is None else dense[chosen])
            self._add_categories(part.stem, mine, arrays, counts, record.pieces)
            counts.rows += len(mine)
            counts.positives += int(mine_labels.sum())
        record.rows += len(frame)
        record.pieces += 1
        record.start = piece.next_start
        for place, bad in piece.skipped:
            record.skip(place, bad)

    def _add_categories(
        self, stem: str, frame: pl.DataFrame, arrays: dict[str, GrowingArray], counts: StemRows, piece: int
    ) -> None:
        one_hot = []
        for j, name in enumerate(self.schema.categorical):
            if name not in self.schema.multi_hot:
                one_hot.append(j)
                continue
            bags, before = list_values(frame, j), counts.values.get(str(j), 0)
            arrays[f"_offsets_{j}.npy"].append(before + np.cumsum(bags.lengths))
            counts.values[str(j)] = before + len(bags.values)
            if self.hashing is not None:
                arrays[f"_ids_{j}.npy"].append(self.hashing.ids(j, bags.values))
            if bags.weights is not None:
                arrays[f"_weights_{j}.npy"].append(bags.weights)
        if self.hashing is not None:
            arrays[SPARSE].append(self.hashing.block(frame, one_hot))
            return
        values = frame.select(f"c{j}" for j in range(len(self.schema.categorical)))
        counts.pieces.append((len(frame), int(values.estimated_size())))
        if len(frame):
            values.write_parquet(self._staged(stem, piece), compression="lz4", statistics=False)
            sync(self._staged(stem, piece))

    def _take_logs(self, unit: Unit, record: StageRecord) -> None:
        """Rewrite the dense integers as logarithms, once their minimum is known."""
        for part in unit.parts:
            columns = (len(self.schema.dense_names),)
            raw = self.work.staged / part.stem / f"{part.stem}{DENSE}"
            with GrowingArray(self.work.out / f"{part.stem}{DENSE}", columns, np.float32) as logs:
                for rows in read_rows(raw, columns, np.int32):
                    logs.append(numeric.shifted_log(rows, record.minimum or 0))
                logs.flush()

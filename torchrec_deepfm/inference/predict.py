"""Files of raw rows into a Parquet file of click probabilities, a piece at a time.

A piece is read, encoded, scored and written as a part in ``.NAME.partial/`` beside the output; in the end the parts
become one file. Borders of pieces depend on the input alone, so that a call that was stopped resumes after its last
part, and any number of ranks, which take turns with the pieces, ends in the same bytes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from torchrec_deepfm.data.prepare.progress import Phase
from torchrec_deepfm.data.prepare.row_encoder import EncodedRows, RowEncoder
from torchrec_deepfm.data.prepare.sources.provenance import source_state
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.data.raw.addresses import find_text, is_table_file
from torchrec_deepfm.data.raw.criteo_text import TextLog
from torchrec_deepfm.data.raw.source import Piece, Source
from torchrec_deepfm.data.raw.table_source import open_tables
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import check_local, check_parquet_name, check_target, write_bytes
from torchrec_deepfm.inference.load import Predictor, ShardedPredictor, spread
from torchrec_deepfm.inference.parts import Scorer, sigmoid
from torchrec_deepfm.inference.scorer import ModelScorer

PROBABILITY: Final = "probability"
_JOB: Final = b"torchrec_deepfm.job"
_NEXT: Final = b"torchrec_deepfm.next"
_PIECE_BYTES: Final = 1 << 26
_PIECE_ROWS: Final = 262_144
_LOCK_SECONDS: Final = 5.0  # a rank that was killed may not be gone yet


@dataclass(frozen=True, kw_only=True)
class PredictionFile:
    """What ``predict_files`` wrote; ``bad`` rows have no probability. ``before``: it was finished already."""

    rows: int
    bad: int
    before: bool = False


def open_sources(
    encoder: RowEncoder, inputs: Sequence[str], *, labelled: bool = False, keep: Sequence[str] = ()
) -> list[Source]:
    """Open files of raw rows, or folders of them, one source per file; ``keep`` are columns to carry along.

    Criteo's text is read where the model was trained on it; it may have a label in any case.
    """
    sources: list[Source] = []
    if not inputs:
        raise UserError("no file is named", where="--input", remedy="name at least one")
    for named in inputs:
        criteo = encoder.raw_schema.layout == "criteo"
        if criteo and not is_table_file(named, tsv=False) and not Path(named).is_dir():
            text = find_text(named)
            sources.append(
                TextLog(text, encoder.reading, piece_bytes=_PIECE_BYTES, labelled=True if labelled else None, keep=keep)
            )
            continue
        sources += open_tables(
            named, encoder.reading, piece_rows=_PIECE_ROWS, types=encoder.types, labelled=labelled, keep=keep
        )
    return sources


def predict_files(
    predictor: Predictor | ShardedPredictor,
    inputs: Sequence[str],
    output: Path,
    *,
    keep: Sequence[str] = (),
    on_bad_row: Literal["error", "skip"] = "error",
    ranks: Workers | None = None,
    report: Callable[[str], None] | None = None,
) -> PredictionFile:
    """Predict the click probability of every row of some files, as for ``open_sources``.

    The Parquet file has the float64 column ``probability`` in the order of the rows, after the columns to ``keep``; it
    appears whole or not at all. ``on_bad_row``: stop at a row that does not fit, or give it a null. Returns what was
    written, on every rank.
    """
    ranks = ranks or Workers()
    if PROBABILITY in keep:
        raise UserError(
            "the output has a column of this name already",
            where=f"--keep {PROBABILITY}",
            remedy="rename it in the input",
        )
    sources = open_sources(predictor.encoder, inputs, keep=keep)
    job = {
        "model": predictor.sha256,
        "encoder": predictor.encoder.sha256,
        "sources": [{"name": source.path, **source_state(source)} for source in sources],
        "keep": list(keep),
        "on_bad_row": on_bad_row,
    }
    parts = _Parts(output, json.dumps(job))
    failed: UserError | None = None
    try:
        before = ranks.on_first(lambda: parts.enter([Path(one) for one in inputs if "://" not in one]))
        if before is not None:
            return before
        start = ranks.on_first(parts.finished)
        try:
            with Phase("predict", sum(source.bytes for source in sources) / 1e6, report=report) as phase:
                own = parts.own(sources, ranks, phase, start, skip_bad=on_bad_row == "skip")
                if isinstance(predictor, ShardedPredictor):
                    _score_together(predictor, ranks, own, parts)
                else:
                    for number, place, piece in own:
                        rows = predictor.encoder.encode_piece(piece.frame)
                        parts.write(
                            number, _table(predictor, piece, _probabilities(predictor.score, rows)), place, piece
                        )
        except UserError as error:
            failed = error
        for other in ranks.gather(failed):
            if other is not None:
                ranks.on_first(parts.leave)
                raise failed or other
        return ranks.on_first(parts.join)
    finally:
        parts.release()


def _probabilities(score: Scorer, rows: EncodedRows) -> NDArray[Any]:
    return sigmoid(score.logits(rows)) if isinstance(score, ModelScorer) else score(rows)


def _score_together(
    predictor: ShardedPredictor,
    ranks: Workers,
    own: Iterator[tuple[int, int, Piece]],
    parts: "_Parts",
) -> None:
    """Score a piece of each rank at a time; an error of one rank ends the round of all."""
    error: UserError | None = None
    while True:
        piece = rows = None
        if error is None:
            try:
                number, place, piece = next(own, (0, 0, None))
                rows = None if piece is None else predictor.encoder.encode_piece(piece.frame)
            except UserError as found:
                error = found
        states = ranks.gather(error or (piece is not None))
        errors = [state for state in states if isinstance(state, UserError)]
        if errors:
            raise errors[0]
        if not any(states):
            return
        probabilities = sigmoid(predictor.score.logits(rows))
        if piece is not None:
            try:
                parts.write(number, _table(predictor, piece, probabilities), place, piece)
            except UserError as found:
                error = found


def _table(predictor: Predictor | ShardedPredictor, piece: Piece, probabilities: NDArray[Any]) -> pa.Table:
    if not np.isfinite(probabilities).all():
        raise UserError(
            "a prediction is not finite, so these weights can't be used", where=predictor.path, remedy="train again"
        )
    everywhere = spread(probabilities.astype(np.float64), [one.place for one in piece.skipped])
    column = pa.array(everywhere, pa.float64(), from_pandas=True)
    kept = {} if piece.kept is None else {name: piece.kept.column(name) for name in piece.kept.column_names}
    return pa.table(kept | {PROBABILITY: column})


class _Parts:
    """The finished pieces of an unfinished output."""

    def __init__(self, output: Path, job: str) -> None:
        self._output, self._job = output, job
        self._folder = output.with_name(f".{output.name}.partial")
        self._lock = FileLock(self._folder / "lock", thread_local=False)
        self._resumed = False

    def path(self, number: int) -> Path:
        return self._folder / f"part_{number:06d}.parquet"

    def enter(self, inputs: Sequence[Path]) -> PredictionFile | None:
        """Make the folder, or resume in it; return the result if this very call has finished before."""
        check_local(self._output)
        check_target("--output", self._output, like="predictions.parquet", inputs=inputs)
        check_parquet_name("--output", self._output)
        if self._output.exists():
            return self._finished_before()
        job = self._folder / "job.json"
        try:
            self._folder.mkdir(exist_ok=True)
            self._lock.acquire(timeout=_LOCK_SECONDS)
            self._resumed = job.exists()
            if self._resumed and job.read_text() != self._job:
                raise UserError(
                    f"an unfinished predict of {self._output.name} has another model, input or option",
                    where=self._folder,
                    remedy="run that one again, or remove this folder",
                )
            write_bytes(job, self._job.encode())
        except Timeout as error:
            raise UserError(
                "another predict is writing it",
                where=f"--output {self._output}",
                remedy="wait for its end, or name another file",
            ) from error
        except OSError as error:
            raise _refused(self._output, error) from error
        return None

    def _finished_before(self) -> PredictionFile:
        try:
            found = pq.read_metadata(self._output)
        except (OSError, pa.ArrowInvalid):
            found = None
        about: Mapping[bytes, bytes] = (found.metadata if found is not None else None) or {}
        if found is None or about.get(_JOB) != self._job.encode():
            raise UserError(
                "the file exists", where=f"--output {self._output}", remedy="name another one, or remove it"
            )
        return PredictionFile(rows=found.num_rows, bad=int(about[b"bad"]), before=True)

    def finished(self) -> tuple[int, tuple[int, int, int]]:
        """How many pieces are finished without a gap, and where the next one starts."""
        number = 0
        while self.path(number).exists():
            number += 1
        if not number:
            return 0, (0, 0, 0)
        place, end, line = json.loads(pq.read_metadata(self.path(number - 1)).metadata[_NEXT])
        return number, (place, end, line)

    def own(
        self,
        sources: Sequence[Source],
        ranks: Workers,
        phase: Phase,
        start: tuple[int, tuple[int, int, int]],
        *,
        skip_bad: bool,
    ) -> Iterator[tuple[int, int, Piece]]:
        """Yield this rank's unfinished pieces: number, place of the source, the piece."""
        number, (first, end, line) = start
        for place, source in enumerate(sources[first:], first):
            before, report = number, phase.shares(source.bytes / 1e6)

            def mine(i: int, before: int = before) -> bool:
                return (before + i) % ranks.count == ranks.rank and not self.path(before + i).exists()

            for piece in source.share(start=end, line=line, skip_bad=skip_bad, mine=mine):
                if piece is not None:
                    yield number, place, piece
                    report(len(piece.frame), piece.done)
                number += 1
            end = line = 0

    def write(self, number: int, table: pa.Table, place: int, piece: Piece) -> None:
        """Write the part of a piece, whole or not at all."""
        after = (place, piece.end, piece.line)
        draft = self._folder / f"draft_{number:06d}"
        try:
            pq.write_table(table.replace_schema_metadata({_NEXT: json.dumps(after)}), draft)
            draft.replace(self.path(number))
        except OSError as error:
            raise _refused(self._output, error) from error

    def leave(self) -> None:
        """Remove the folder after an error, unless an earlier call has left work in it."""
        if not self._resumed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def release(self) -> None:
        """Let others write this output."""
        self._lock.release()

    def join(self) -> PredictionFile:
        """Make one file of all parts."""
        count, _ = self.finished()
        paths = [self.path(number) for number in range(count)]
        schema = pq.read_schema(paths[0]).remove_metadata()
        bad = sum(pq.read_table(path, columns=[PROBABILITY])[PROBABILITY].null_count for path in paths)
        whole, rows = self._folder / "whole", 0
        try:
            about = {_JOB: self._job.encode(), b"bad": str(bad).encode()}
            with pq.ParquetWriter(whole, schema.with_metadata(about)) as writer:
                for path in paths:
                    table = _alike(pq.read_table(path).replace_schema_metadata(None), schema, self._output)
                    writer.write_table(table)
                    rows += len(table)
            whole.replace(self._output)
            shutil.rmtree(self._folder, ignore_errors=True)
        except OSError as error:
            raise _refused(self._output, error) from error
        return PredictionFile(rows=rows, bad=bad)


def _alike(table: pa.Table, schema: pa.Schema, output: Path) -> pa.Table:
    """A table with the types of the first one: files of one data set may differ in them."""
    columns = []
    for field in schema:
        column = table.column(field.name)
        try:
            columns.append(column if column.type == field.type else pc.cast(column, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"column {field.name!r} holds {field.type} in the first file and {column.type} in another one",
                where=f"--output {output}",
                remedy="leave it out of --keep, or predict the files one by one",
            ) from error
    return pa.table(columns, schema=schema)


def _refused(output: Path, error: OSError) -> UserError:
    return UserError(
        f"the file can't be written ({error.strerror or error})",
        where=f"--output {output}",
        remedy="free the disk and run the same command again, or name another one",
    )

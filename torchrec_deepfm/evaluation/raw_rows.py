"""Labelled rows of raw files, to be evaluated: every rank reads all of them and encodes its own.

Shape letters: B rows of a batch, W ranks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch

from torchrec_deepfm.data.loader.batch import key_jagged
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.prepare.sources.provenance import source_state
from torchrec_deepfm.data.raw.source import Piece
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.evaluation.figures import Keys
from torchrec_deepfm.inference.load import encoder_of
from torchrec_deepfm.inference.predict import open_sources


class RawRows:
    """The rows of some files, as for ``open_sources``, in their order; each run encodes them by its own encoder.

    ``columns`` group the rows, as (option, name). UserError: a run keeps no encoder, or a file can't be read or lacks a
    column.
    """

    name = "input"
    optimum = None

    def __init__(self, inputs: Sequence[str], runs: Sequence[Path], columns: Sequence[tuple[str, str]]) -> None:
        self._inputs = inputs
        self._encoders = {run: encoder_of(run) for run in runs}
        self._first = self._encoders[runs[0]]
        open_sources(self._first, inputs, labelled=True)
        for option, name in columns:
            try:
                open_sources(self._first, inputs, labelled=True, keep=[name])
            except UserError as error:
                raise UserError(error.what, where=f"{option} {name}: {error.where}") from error

    def describe(self) -> dict[str, Any]:
        """What the result file records of the rows."""
        sources = open_sources(self._first, self._inputs, labelled=True)
        return {"files": [{"name": source.path, **source_state(source)} for source in sources]}

    def loader(self, run: Path, batch_size: int, device: torch.device) -> "RawBatches":
        """This rank's batches, in the order of the rows."""
        return RawBatches(self._inputs, self._encoders[run], batch_size)

    def column(self, name: str) -> Keys:
        """Read the values of a column."""
        kept = [piece.kept.column(name) for piece in _pieces(self._first, self._inputs, keep=[name]) if piece.kept]
        encoded = pa.chunked_array([chunk for column in kept for chunk in column.chunks]).combine_chunks()
        encoded = pc.dictionary_encode(encoded)
        codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        return Keys(codes=codes, names=[str(value) for value in encoded.dictionary.to_pylist()])


class RawBatches:
    """One rank's batches of ``inputs``, as for ``open_sources``; see ``training.evaluation.Batches``."""

    def __init__(self, inputs: Sequence[str], encoder: RowEncoder, batch_size: int) -> None:
        self._inputs, self._encoder, self.batch_size = inputs, encoder, batch_size
        self._valid: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, as many on every rank."""
        size = self.batch_size * dist.get_world_size()
        rest: pl.DataFrame | None = None
        for piece in _pieces(self._encoder, self._inputs):
            rows = piece.frame if rest is None else pl.concat([rest, piece.frame])
            whole = rows.height // size * size
            for start in range(0, whole, size):
                yield self._batch(rows[start : start + size])
            rest = rows[whole:]
        if rest is None or (rest.is_empty() and not self._valid):
            raise UserError(
                "there is no row in it", where=f"--input {' '.join(self._inputs)}", remedy="name files with rows"
            )
        if not rest.is_empty():
            yield self._batch(rest)

    def valid_rows(self, step: int) -> int:
        """Real rows of a batch that was yielded; they come first, the rest is padding."""
        return self._valid[step]

    def _batch(self, rows: pl.DataFrame) -> Batch:
        mine = rows.slice(dist.get_rank() * self.batch_size, self.batch_size)
        self._valid.append(mine.height)
        if missing := self.batch_size - mine.height:
            mine = pl.concat([mine, rows[np.resize(np.arange(rows.height), missing)]])
        encoded = self._encoder.encode_piece(mine)
        by_key = np.ascontiguousarray(encoded.sparse.T)
        return Batch(
            dense_features=torch.from_numpy(np.array(encoded.dense, order="C")),
            sparse_features=key_jagged(self._encoder.schema, by_key, encoded.bags, self.batch_size),
            labels=torch.from_numpy(mine["label"].cast(pl.Int32).to_numpy().copy())
            if "row_weight" not in mine.columns
            else torch.from_numpy(mine.select("label", "row_weight").cast(pl.Float32).to_numpy().copy()),
        )


def _pieces(encoder: RowEncoder, inputs: Sequence[str], keep: Sequence[str] = ()) -> Iterator[Piece]:
    for source in open_sources(encoder, inputs, labelled=True, keep=keep):
        yield from source.pieces(start=0, line=0, skip_bad=False)

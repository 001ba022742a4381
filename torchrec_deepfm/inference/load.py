"""Predictions from Python: ``load`` a run or a package, ``predict`` rows.

Shape letters: n rows.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.encoder_file import check_same_encoding
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import as_path
from torchrec_deepfm.inference.explain import Explanation, explain_rows
from torchrec_deepfm.inference.parts import Scorer
from torchrec_deepfm.inference.scorer import ModelScorer
from torchrec_deepfm.inference.sharded import ShardedScorer
from torchrec_deepfm.inference.weights import load_model
from torchrec_deepfm.training.run import folder as run_folder

PACKAGE: Final = "package.json"


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained model with what turns raw rows into its inputs.

    Args:
        path: The run or package that it comes from.
        encoder: Encodes rows.
        score: Gives the click probabilities of encoded rows, float32 [n], and what their logits are made of.
        sha256: Digest that distinguishes trained models.
    """

    path: Path
    sha256: str
    encoder: RowEncoder
    score: Scorer

    def predict(self, frame: Any, *, on_bad_row: Literal["error", "skip"] = "error") -> NDArray[np.float32]:
        """Predict the click probabilities of rows.

        Args:
            frame: A pandas or polars DataFrame, an Arrow table, or a list of dicts, with the raw columns by name; no
                label is needed. None, NaN and null are missing values.
            on_bad_row: Stop at a row that does not fit, or give it NaN.

        Returns:
            float32 [n], in the order of the rows.

        Raises:
            UserError: A column is absent or of a wrong type, or a value does not fit; the message names row and column.
        """
        rows = self.encoder.encode(frame, on_bad_row=on_bad_row)
        return spread(self.score(rows), rows.bad)

    def explain(self, frame: Any) -> Explanation:
        """Take the logits of rows apart: bias, first order per field, pairs of fields, deep part.

        Args:
            frame: As for ``predict``.

        Returns:
            The parts, which sum to the logits; see ``Explanation``.

        Raises:
            UserError: As ``predict``.
        """
        raw = self.encoder.read(frame)
        return explain_rows(self.score, self.encoder.encode_piece(raw), self.encoder.texts(raw))


def load(
    run_or_package: Path | str,
    checkpoint: str | int | None = None,
    *,
    data: Path | str | None = None,
    threads: int | None = None,
) -> Predictor:
    """Load a trained model for predictions: no process group, memory for one copy of the tables.

    Args:
        run_or_package: Folder that ``train`` or ``export`` wrote.
        checkpoint: Of a run, as for ``load_model``: ``None`` for its own weights, ``"best"``, ``"last"`` or a step.
        data: The prepared folder of a run that an earlier version trained, which kept no copy of the encoder.
        threads: Threads per call of the model; of torch, these are the process's. ``None`` for the default.

    Returns:
        The predictor.

    Raises:
        UserError: The folder holds neither, is damaged, or its parts are of different runs.
    """
    path = as_path(run_or_package, "a run or a package")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UserError("must be a whole number, at least 1", where=f"threads {threads!r}")
    if (path / PACKAGE).exists():
        if checkpoint is not None or data is not None:
            option = "checkpoint" if checkpoint is not None else "data"
            raise UserError(
                "this is a package, which has weights and encoder of its own", where=path, remedy=f"leave {option} out"
            )
        from torchrec_deepfm.inference.export.package import open_package  # which a run does not need

        encoder, package = open_package(path, threads=threads)
        return Predictor(path=path, sha256=_digest(path / PACKAGE), encoder=encoder, score=package)
    if threads is not None:
        torch.set_num_threads(threads)
    encoder, sha256 = open_run(path, checkpoint, None if data is None else as_path(data, "prepared data"))
    precision = run_folder.read(path).config.precision
    score = ModelScorer(load_model(path, checkpoint), encoder.schema, precision)
    return Predictor(path=path, sha256=sha256, encoder=encoder, score=score)


@dataclass(frozen=True, kw_only=True)
class ShardedPredictor:
    """What ``predict_files`` takes in place of a ``Predictor`` on ranks that share the tables of a run."""

    path: Path
    sha256: str
    encoder: RowEncoder
    score: ShardedScorer


def load_sharded(run: Path, checkpoint: str | int | None = None, *, data: Path | None = None) -> ShardedPredictor:
    """Load a run for ``predict_files`` alone, its tables sharded over the ranks of the process group; a collective."""
    encoder, sha256 = open_run(run, checkpoint, data)
    score = ShardedScorer(run, checkpoint, encoder.schema)
    return ShardedPredictor(path=run, sha256=sha256, encoder=encoder, score=score)


def open_run(path: Path, checkpoint: str | int | None, data: Path | None = None) -> tuple[RowEncoder, str]:
    """Open the encoder of a run, and digest what distinguishes its trained model; see ``load``."""
    run = run_folder.read(path)
    encoder = encoder_of(path, data)
    if dict(run.num_embeddings) != dict(encoder.num_embeddings) or run.differs(encoder.schema):
        raise UserError("encodes other columns than the model has", where=path / run_folder.ENCODER, remedy=_RESTORE)
    # The figures of a finished training are its own, the seconds that it took among them.
    files = [path / name for name in (run_folder.CONFIG, run_folder.SUMMARY, run_folder.SAVED)]
    return encoder, _digest(*files, more=str(checkpoint))


_RESTORE: Final = "restore the folder, or train again"


def check_encoding(run: Path, data: PreparedData) -> None:
    """Check that prepared rows have the ids and numbers that a run was trained on; see ``check_same_encoding``."""
    kept = run_folder.read_config(run, "train again").encoder_sha256
    folder = run / run_folder.ENCODER
    if kept is not None and folder.is_dir() and RowEncoder.sha256_of(folder) == kept:
        check_same_encoding(folder, data)


def encoder_of(run: Path, data: Path | None = None) -> RowEncoder:
    """Open the encoder of a run, or that of the data of a run of an earlier version."""
    described = run_folder.read_config(run, "train again")
    folder = run / run_folder.ENCODER
    if data is not None:
        prepared = PreparedData.open(data)
        if described.data_sha256 not in (None, run_folder.digest_of_data(prepared)):
            raise UserError(f"{run} was trained on other data", where=f"--data {data}", remedy=f"name {described.data}")
        with TemporaryDirectory() as name:
            RowEncoder.save(prepared, Path(name, run_folder.ENCODER))
            return RowEncoder.open(Path(name, run_folder.ENCODER))
    if not folder.is_dir():
        if described.encoder_sha256 is not None:
            raise UserError("the folder is missing", where=folder, remedy=_RESTORE)
        there = Path(described.data)
        raise UserError(
            "keeps no encoder of raw rows (an earlier version trained it, or another tool prepared its data)",
            where=f"--run {run}",
            remedy=f"name its prepared data: --data {there}" if there.is_dir() else "prepare and train again",
        )
    encoder = RowEncoder.open(folder)
    if described.encoder_sha256 not in (None, encoder.sha256):
        raise UserError("the encoder is of another run", where=folder, remedy=_RESTORE)
    return encoder


def _digest(*files: Path, more: str = "") -> str:
    found = hashlib.sha256(more.encode())
    for file in files:
        found.update(file.read_bytes() if file.exists() else b"")
    return found.hexdigest()


def spread(values: NDArray[Any], bad: Any) -> NDArray[Any]:
    """Put values of good rows in their places among all rows; NaN stands at the places ``bad``.

    Example:
        >>> spread(np.float32([0.25, 0.5]), [1]).tolist()
        [0.25, nan, 0.5]
    """
    if not bad:
        return values
    everywhere = np.full(len(values) + len(bad), np.nan, values.dtype)
    good = np.ones(len(everywhere), np.bool_)
    good[list(bad)] = False
    everywhere[good] = values
    return everywhere

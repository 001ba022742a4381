"""Which fields matter to a run, measured on a bounded sample of prepared rows, for its report."""

from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.row_reader import CopiedBags
from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.explain import importance
from torchrec_deepfm.inference.scorer import ModelScorer
from torchrec_deepfm.inference.weights import load_model
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.run.run_files import IMPORTANCE
from torchrec_deepfm.training.scoring.row_sample import sample_rows

_BLOCKS: Final = 8
# Tables up to this size are loaded once more at the end of a training; larger ones only if asked for.
LARGEST_BYTES: Final = 1 << 30


def write_importance(folder: Path, data: PreparedData) -> None:
    """Measure which fields matter to a finished run, and write ``importance.json`` into its folder.

    It takes 8,192 rows of the validation split at most, or else of test or train, and a pass over them per field. It
    needs memory for one copy of the tables. UserError: the run has no weights, or the data are damaged or written by
    another tool.
    """
    if data.external is not None:
        raise UserError(
            "another tool wrote these data", where=data.named, remedy="fields are measured on what prepare wrote"
        )
    split = next(name for name in ("validation", "test", "train") if data.rows(name))
    run = run_folder.read(folder)
    blocks = list(sample_rows(data, split, _BLOCKS))
    bags = {}
    for name in data.schema.multi_hot:
        parts = [block.bags[name] for block in blocks]
        weights = [part.weights for part in parts if part.weights is not None]
        bags[name] = CopiedBags(
            ids=np.concatenate([part.ids for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            weights=np.concatenate(weights) if weights else None,
        )
    rows = EncodedRows(
        dense=np.concatenate([block.dense for block in blocks]).astype(np.float32),
        sparse=np.concatenate([block.sparse for block in blocks]),
        bags=bags,
        bad={},
    )
    labels = np.concatenate([block.labels for block in blocks]).astype(np.int64)
    scorer = ModelScorer(load_model(folder), data.schema, run.config.precision)
    fields = [asdict(one) for one in importance(scorer, rows, labels)]
    content = {"format_version": 1, "split": split, "rows": len(rows), "fields": fields}
    run_folder.write_json(folder / IMPORTANCE, content)


def write_importance_if_small(folder: Path, data: PreparedData) -> None:
    """Do as ``write_importance`` at the end of a training, unless the tables are large or the data another tool's."""
    run = run_folder.read(folder)
    size = sum(run.num_embeddings.values()) * (run.config.factor_dim + 4) * 4
    if size <= LARGEST_BYTES and data.external is None:
        write_importance(folder, data)

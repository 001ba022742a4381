"""The rows of a split of a prepared folder, to be evaluated.

Shape letters: N rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.data.loader.row_reader import SplitRows
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values.vocabulary import vocabulary_file
from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.evaluation.figures import Keys
from torchrec_deepfm.inference.load import check_encoding
from torchrec_deepfm.training.run import folder as run_folder

_PIECE = 2**20  # rows


class PreparedRows:
    """A split of a prepared folder; ``columns`` group the rows, as (option, name).

    ``optimum`` is the best reachable ``auc`` of synthetic data, if known.
    """

    def __init__(self, data: PreparedData, split: str, columns: Sequence[tuple[str, str]] = ()) -> None:
        self._data, self._split = data, split
        for option, name in columns:
            self._check_column(option, name)
        self.name = split
        self.optimum = data.optimum.get(split)

    def check(self, run: run_folder.RunDescription, folder: Path) -> None:
        """Check that a run was trained on such columns and ids."""
        data = self._data
        if run.differs(data.schema):
            raise UserError(
                f"numeric columns {data.schema.dense_names}, but {folder} has {run.dense_names}",
                where=f"--data {data.named}",
            )
        for name in sorted(set(run.num_embeddings) | set(data.num_embeddings)):
            mine, theirs = run.num_embeddings.get(name), data.num_embeddings.get(name)
            if mine != theirs:
                raise UserError(
                    f"column {name!r} has {theirs} ids, but {folder} was trained on {mine}",
                    where=f"--data {data.named}",
                    remedy="name the data that it was trained on, or data prepared with the same vocabulary",
                )
        check_encoding(folder, data)

    def describe(self) -> dict[str, Any]:
        """What the result file records of the rows."""
        return {
            "folder": self._data.named,
            "split": self._split,
            "sha256": run_folder.digest_of_data(self._data),
        }

    def loader(self, run: Path, batch_size: int, device: torch.device) -> Loader:
        """This rank's batches, in the order of the rows."""
        return Loader(
            self._data,
            self._split,
            batch_size=batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            pin_memory=device.type == "cuda",
        )

    def _check_column(self, option: str, name: str) -> None:
        schema = self._data.schema
        if name in schema.multi_hot:
            raise UserError(
                "the column holds lists of ids",
                where=f"{option} {name}",
                remedy=f"choose {one_of(schema.one_hot, None)}",
            )
        if name not in schema.one_hot:
            kind = "the column is numeric" if name in schema.numeric else f"{self._data.named} has no such column"
            raise UserError(kind, where=f"{option} {name}", remedy=f"choose {one_of(schema.one_hot, name)}")

    def column(self, name: str) -> Keys:
        """Read the values of a column; its ids where they are hashed or another tool wrote them.

        Id 0 of ``prepare`` stands for rare values and mostly for missing ones, so it is missing here.
        """
        data, rows = self._data, SplitRows(self._data, self._split)
        j, found = data.schema.one_hot.index(name), np.empty(data.rows(self._split), np.int64)
        for start in range(0, len(found), _PIECE):
            stop = min(start + _PIECE, len(found))
            rows.check([(start, stop)])
            found[start:stop] = rows.stretch(start, stop).sparse[:, j]
            rows.release()
        if data.external is None:
            found[found == 0] = -1
        elif data.external.modulo:
            found %= data.num_embeddings[name]
        names = self._values(name)
        if names is not None:
            found[np.array([value is None for value in names])[found]] = -1
        return Keys(codes=found, names=names)

    def _values(self, name: str) -> list[str | None] | None:
        """The value of each id as text, None for missing; None without a vocabulary."""
        data = self._data
        if data.external is not None or data.made.get("mode") != "vocabulary" or "raw_schema" not in data.made:
            return None
        raw, j = Schema.from_json(data.made["raw_schema"]), data.schema.categorical.index(name)
        values = pl.read_parquet(vocabulary_file(data.folder, j), columns=["value"], glob=False)["value"]
        if raw.layout == "criteo" and name in raw.categorical:
            return [None, *(None if value is None else f"{value:08x}" for value in values)]
        return [None, *values.cast(pl.String)]

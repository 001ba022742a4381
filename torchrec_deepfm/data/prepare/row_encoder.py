"""New rows into the numbers and ids of a prepared folder: what a prediction needs, label or not.

Shape letters: n rows, I numeric columns, F1 categorical columns with one id a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare import numeric
from torchrec_deepfm.data.prepare.hashing import Hashing
from torchrec_deepfm.data.prepare.stage import flat
from torchrec_deepfm.data.prepare.vocabulary import look_up, vocabulary_file
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Encoded rows.

    Args:
        dense: float32 [n, I].
        sparse: int32 [n, F1], the one-hot columns in the schema's order.
        bags: Of each list column, its ids, int32, and their number in every row, int32 [n].
    """

    dense: NDArray[np.float32]
    sparse: NDArray[np.int32]
    bags: Mapping[str, tuple[NDArray[np.int32], NDArray[np.int32]]]


class Encoder:
    r"""Treats new rows as ``prepare`` treated those of a folder.

    Args:
        data: The folder.

    Raises:
        UserError: Its numbers can't be had row by row, or it was not made by ``prepare``.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from torchrec_deepfm.data.prepare.prepare import prepare
        >>> schema = Schema(label="click", numeric=("price",), categorical=("user",))
        >>> with TemporaryDirectory() as folder:
        ...     raw = Path(folder, "log.tsv")
        ...     _ = raw.write_text("1\t5\tab\n0\t\tcd\n1\t2\tab\n")
        ...     data = prepare([raw], Path(folder, "data"), schema=schema, min_count=1, split="none")
        ...     encoded = Encoder(data).encode(pl.DataFrame({"price": [5, None], "user": ["ab", "ffff"]}))
        >>> encoded.dense.shape, encoded.sparse.tolist()
        ((2, 1), [[1], [0]])
    """

    def __init__(self, data: PreparedData) -> None:
        made = data.made
        if "raw_schema" not in made:
            raise UserError(f"{data.folder}: this folder does not tell how it was made; prepare the data again")
        self._data, self._raw = data, Schema.from_json(made["raw_schema"])
        self._transforms = tuple(made["numeric"][name] for name in self._raw.numeric)
        if "log" in self._transforms:
            raise UserError(
                f"{data.folder}: its numbers were shifted by the smallest one of their file (--numeric log), which new "
                "rows do not have; prepare it with another --numeric"
            )
        self._connection = duckdb.connect()
        sizes = made["num_embeddings"]
        self._hashing = None if sizes is None else Hashing(self._connection, sizes)

    def encode(self, rows: pl.DataFrame) -> Encoded:
        """Encode rows.

        Args:
            rows: n rows with the raw columns by name; a label is not looked at. Criteo's categories are hexadecimal
                text or the numbers it stands for; those of a table have the types that it had. Null is missing.

        Returns:
            What the loader would read for these rows.

        Raises:
            UserError: A column is absent or of the wrong type.
        """
        frame = {}
        for j, name in enumerate(self._raw.numeric):
            frame[f"n{j}"] = self._column(rows, name).cast(pl.Float64)
        for j, name in enumerate(self._raw.categorical):
            column = self._column(rows, name)
            if self._raw.layout == "criteo" and column.dtype == pl.String:
                try:
                    column = column.replace("", None).str.to_integer(base=16, dtype=pl.UInt32)
                except pl.exceptions.PolarsError as error:
                    raise UserError(f"column {name!r}: not all values are hexadecimal numbers ({error})") from error
            frame[f"c{j}"] = column
        raw = pl.DataFrame(frame)
        for j, (name, transform) in enumerate(zip(self._raw.numeric, self._transforms, strict=True)):
            for row in np.flatnonzero(numeric.unfit(raw[f"n{j}"], transform))[:1].tolist():
                raise UserError(f"row {row + 1}, column {name!r}: {raw[f'n{j}'][row]} {numeric.UNFIT[transform]}")
        dense = numeric.dense(raw, self._transforms)
        assert dense.dtype == np.float32
        columns = [*numeric.buckets(raw, self._transforms), *(raw[f"c{j}"] for j in range(len(self._raw.categorical)))]
        sparse, bags = [], {}
        for j, (name, column) in enumerate(zip(self._data.schema.categorical, columns, strict=True)):
            if name in self._data.schema.multi_hot:
                bags[name] = self._ids(j, flat(column)), column.list.len().fill_null(0).to_numpy().astype(np.int32)
            else:
                sparse.append(self._ids(j, column))
        ids = np.stack(sparse, axis=1) if sparse else np.empty((len(rows), 0), np.int32)
        return Encoded(dense=dense.astype(np.float32), sparse=ids, bags=bags)

    def _ids(self, j: int, values: pl.Series) -> NDArray[np.int32]:
        if self._hashing is not None:
            return self._hashing.ids(j, values)
        path = vocabulary_file(self._data.folder, j)
        kept = pl.read_parquet_schema(path)["value"]
        if (kept == pl.String) != (values.dtype == pl.String) and values.null_count() < len(values):
            name = self._data.schema.categorical[j]
            raise UserError(f"column {name!r}: the values are {values.dtype}, those of {path} are {kept}; give these")
        return look_up(self._connection, values, path)

    def _column(self, rows: pl.DataFrame, name: str) -> pl.Series:
        if name not in rows.columns:
            raise UserError(f"column {name!r} is absent; the rows have {', '.join(rows.columns)}")
        return rows[name]

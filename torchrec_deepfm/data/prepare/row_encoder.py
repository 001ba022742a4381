"""New rows into the numbers and ids of a prepared folder, by the code of ``prepare``.

A folder ``encoder/`` holds all that this takes, so that the prepared folder may be deleted: ``encoder.json`` and the
vocabularies, unless values are hashed.

Shape letters: n rows, I numeric columns, F1 categorical columns with one id per row.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.dataset.publish import digest, new_folder
from torchrec_deepfm.data.loader.row_reader import CopiedBags
from torchrec_deepfm.data.prepare.encoder_file import AGAIN, ENCODER, EncoderFile, encoder_content, read_encoder
from torchrec_deepfm.data.raw.cells.table_frame import HEX, category_types, table_frame
from torchrec_deepfm.data.raw.frames import as_arrow
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.data.values import numeric
from torchrec_deepfm.data.values.hashing import Hashing
from torchrec_deepfm.data.values.row_columns import categorical_columns, list_values
from torchrec_deepfm.data.values.vocabulary import Vocabulary, vocabulary_file
from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.files import seal, write_bytes

BATCH_ROWS: Final = 8192
_ACCEPTED: Final = 64  # types of tables whose check is remembered
_SHOWN: Final = 8  # values of a list that texts show


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Encoded rows: what the loader reads for the same rows after ``prepare``.

    Args:
        dense: float32 [n, I].
        sparse: int32 [n, F1], the one-hot columns in the order of ``schema.one_hot``.
        bags: Of each list column, its ids (int32), their number in every row (int64 [n]) and their weights.
        bad: What is wrong with rows that were skipped, by place from 0 among all rows given; they are not among the n.
    """

    dense: NDArray[np.float32]
    sparse: NDArray[np.int32]
    bags: Mapping[str, CopiedBags]
    bad: Mapping[int, str]

    def __len__(self) -> int:
        """Return n."""
        return len(self.dense)

    def slice(self, start: int, stop: int) -> "EncodedRows":
        """Take the rows from ``start`` to before ``stop``, as views; ``bad`` is empty."""
        bags = {}
        for name, one in self.bags.items():
            first, last = int(one.lengths[:start].sum()), int(one.lengths[:stop].sum())
            weights = None if one.weights is None else one.weights[first:last]
            bags[name] = CopiedBags(ids=one.ids[first:last], lengths=one.lengths[start:stop], weights=weights)
        return EncodedRows(dense=self.dense[start:stop], sparse=self.sparse[start:stop], bags=bags, bad={})

    def batches(self) -> Iterator["EncodedRows"]:
        """Yield all rows in order, ``BATCH_ROWS`` at a time: activations of more would take much memory."""
        for start in range(0, len(self), BATCH_ROWS):
            yield self.slice(start, min(start + BATCH_ROWS, len(self)))


class RowEncoder:
    r"""Treats new rows as ``prepare`` treated those of a folder. Vocabularies are read once, when it is opened.

    Args:
        folder: The folder that ``save`` wrote.

    Attributes:
        schema: Columns of encoded rows.
        raw_schema: Columns of raw rows.
        num_embeddings: Ids per categorical column of ``schema``.
        sha256: Digest of the encoder, vocabularies included: the same for the same data.

    Raises:
        UserError: The folder is missing or damaged, or does not record what is needed to encode rows.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torchrec_deepfm.data.prepare.prepare import prepare
        >>> schema = Schema(label="click", numeric=("price",), categorical=("user",))
        >>> with TemporaryDirectory() as folder:
        ...     raw = Path(folder, "log.tsv")
        ...     _ = raw.write_text("1\t5\tab\n0\t\tcd\n1\t2\tab\n")
        ...     data = prepare([raw], Path(folder, "data"), schema=schema, min_count=1, split="none")
        ...     RowEncoder.save(data, Path(folder, "encoder"))
        ...     encoder = RowEncoder.open(Path(folder, "encoder"))
        >>> rows = encoder.encode([{"price": 5, "user": "ab"}, {"price": None, "user": "ffff"}])
        >>> rows.dense.shape, rows.sparse.tolist()
        ((2, 1), [[1], [0]])
    """

    def __init__(self, folder: Path) -> None:
        file, self.sha256 = read_encoder(folder)
        where = folder / ENCODER
        try:
            self.schema, self.raw_schema = Schema.from_json(file.schema), Schema.from_json(file.raw_schema)
        except UserError as error:
            raise error.within(where) from error
        self.num_embeddings: Mapping[str, int] = file.num_embeddings
        names = self.schema.categorical
        if set(names) != set(file.num_embeddings) or set(self.raw_schema.numeric) != set(file.transforms):
            raise UserError("its keys name different columns", where=where, remedy=AGAIN)
        self._reading = numeric.settled(self.raw_schema, file.transforms)
        try:
            self._numbers = numeric.with_statistics(numeric.numeric_columns(self._reading, None), file.statistics or {})
        except (KeyError, UserError) as error:
            raise UserError(f"it lacks what a transform learned ({error})", where=where, remedy=AGAIN) from error
        if "log" in file.transforms.values() and file.minimum is None:
            raise UserError(
                "the smallest number of the training rows, which --numeric log shifts by, was not "
                "recorded by an earlier version",
                where=where,
                remedy="prepare and train again",
            )
        self._minimum = file.minimum or 0
        self._hashing: Hashing | None = None
        self._vocabularies: list[Vocabulary] = []
        if file.hashed:
            self._hashing = Hashing(duckdb.connect(), [file.num_embeddings[name] for name in names])
        else:
            self._vocabularies = [self._vocabulary(folder, j, file) for j in range(len(names))]
        self._types = self._value_types(where, file.types)
        self._accepted: dict[tuple[pa.DataType, ...], tuple[str | None, ...]] = {}  # by types of ``features_read``

    @classmethod
    def open(cls, folder: Path | str) -> "RowEncoder":
        """Read the folder that ``save`` wrote; see the class."""
        return cls(Path(folder))

    @staticmethod
    def sha256_of(folder: Path) -> str:
        """Read the digest of a saved encoder without its vocabularies."""
        return read_encoder(folder)[1]

    @staticmethod
    def save(data: PreparedData, folder: Path) -> None:
        """Write what encodes new rows as those of a prepared folder; it appears whole or not at all.

        UserError: ``prepare`` did not make the data, a vocabulary is damaged, or the disk refuses.
        """
        if "raw_schema" not in data.made:
            raise UserError(
                "the folder does not record its raw columns", where=data.named, remedy="make it with prepare"
            )
        content = encoder_content(data)
        files: Mapping[str, Any] = content["files"]
        with new_folder(folder) as partial:
            for name, entry in files.items():
                shutil.copyfile(data.file(name), partial / name)
                if digest(partial / name) != entry:
                    raise UserError(
                        "the file is damaged (its checksum differs)",
                        where=data.folder / name,
                        remedy="prepare the data again",
                    )
            write_bytes(partial / ENCODER, seal(content))

    def encode(self, frame: Any, *, on_bad_row: Literal["error", "skip"] = "error") -> EncodedRows:
        """Encode rows in memory.

        Args:
            frame: A pandas or polars DataFrame, an Arrow table, or a list of dicts, with the raw columns by name; a
                label is not read. None, NaN and null are missing. A category is text or an integer as in training, in
                Criteo's layout hexadecimal text or the integer that it stands for.
            on_bad_row: Stop at a row that does not fit, or leave it out and list it in ``bad``.

        Returns:
            The rows.

        Raises:
            UserError: A column is absent or of a wrong type, or a row has a value that does not fit; the message names
                row, counted from 1, and column.
        """
        return self.encode_piece(*self._read(frame, on_bad_row))

    def read(self, frame: Any) -> pl.DataFrame:
        """Convert rows in memory to the types of a ``raw.source.Piece``; see ``encode``."""
        return self._read(frame, "error")[0]

    def _read(self, frame: Any, on_bad_row: str) -> tuple[pl.DataFrame, dict[int, str]]:
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"choose {one_of(('error', 'skip'), on_bad_row)}", where=f"on_bad_row {on_bad_row!r}")
        table = frame if self._is_accepted(frame) else as_arrow(frame, self.raw_schema.features_read)
        types = self._category_types(table.schema)
        raw, bad = table_frame(table, self._reading, types, labelled=False)
        if bad and on_bad_row == "error":
            row = min(bad)
            raise UserError(f"row {row + 1}, {bad[row]}", remedy="correct it, or skip such rows (on_bad_row='skip')")
        return raw, bad

    def example(self) -> dict[str, Any]:
        """Make a raw row to try: the most frequent categories, or None where they are hashed, and 0 for numbers."""
        raw, row = self.raw_schema, dict.fromkeys(self.raw_schema.features_read)
        row |= {name: [0.0] * width if (width := raw.options(name).width) else 0 for name in raw.numeric}
        first = len(self.schema.categorical) - len(raw.categorical)  # before them are the bucketized numbers
        for j, name in enumerate(raw.categorical):
            value = self._vocabularies[first + j].most_frequent if self._vocabularies else None
            options = raw.options(name)
            if value is None:
                continue
            if raw.layout == "criteo":
                value = f"{value:08x}"
            row[name] = [value] if options.list and options.separator is None else value
            if options.weights is not None:
                row[options.weights] = [1.0]
        return row

    def texts(self, raw: pl.DataFrame) -> list[tuple[str, ...]]:
        """Write the raw values of n rows as text, in the order of the model's fields; an empty text is missing."""
        keys = {name: f"n{j}" for j, name in enumerate(self.raw_schema.numeric)}
        keys |= {name: f"c{j}" for j, name in enumerate(self.raw_schema.categorical)}
        missing = {column.indicator_name: keys[column.name] for column in self._numbers if column.indicator}
        hexadecimal = self.raw_schema.layout == "criteo"
        columns = []
        for name in (*self.schema.numeric, *self.schema.categorical):
            if name in missing:
                columns.append([str(int(value is None)) for value in raw[missing[name]].to_list()])
                continue
            code = hexadecimal and keys[name].startswith("c")
            columns.append([_text(value, code=code) for value in raw[keys[name]].to_list()])
        return list(zip(*columns, strict=True))

    def encode_piece(self, raw: pl.DataFrame, bad: Mapping[int, str] | None = None) -> EncodedRows:
        """Encode n rows of a ``raw.source.Piece``; ``bad`` is what is wrong with others, not among them."""
        dense = numeric.dense(raw, self._numbers)
        if dense.dtype == np.int32:
            # A number below the smallest one of the training rows has no logarithm: it counts as that one.
            dense = numeric.shifted_log(np.maximum(dense, self._minimum).astype(np.int32), self._minimum)
        columns = raw
        if any(column.is_category for column in self._numbers):
            columns = categorical_columns(raw, self._numbers)
        one_hot, bags = [], {}
        for j, name in enumerate(self.schema.categorical):
            if name not in self.schema.multi_hot:
                one_hot.append(j)
                continue
            lists = list_values(columns, j)
            bags[name] = CopiedBags(ids=self._ids(j, lists.values), lengths=lists.lengths, weights=lists.weights)
        if self._hashing is not None:
            sparse = self._hashing.block(columns, one_hot)
        else:
            series = dict(zip(columns.columns, columns.get_columns(), strict=True))
            sparse = np.empty((len(raw), len(one_hot)), np.int32)
            for column, j in enumerate(one_hot):
                sparse[:, column] = self._vocabularies[j].ids(series[f"c{j}"])
        return EncodedRows(dense=dense.astype(np.float32, copy=False), sparse=sparse, bags=bags, bad=bad or {})

    @property
    def reading(self) -> Schema:
        """The raw schema with every transform named, as sources of raw rows take it."""
        return self._reading

    @property
    def types(self) -> tuple[str | None, ...]:
        """Type of the values per raw categorical column: ``string``, ``integer`` or ``hex``."""
        return self._types

    def _is_accepted(self, frame: Any) -> bool:
        """Whether it is a table of types that are read as they are."""
        if not isinstance(frame, pa.Table) or frame.schema.names != list(self.raw_schema.features_read):
            return False
        try:
            self._category_types(frame.schema)
        except UserError:  # of columns of missing values perhaps, which have any type
            return False
        return True

    def _category_types(self, fields: pa.Schema) -> tuple[str | None, ...]:
        kinds = tuple(fields.types)
        types = self._accepted.get(kinds)
        if types is None:
            found = dict(zip(fields.names, kinds, strict=True))
            types = category_types(found, self._reading, types=self._types, labelled=False)
            if len(self._accepted) < _ACCEPTED:
                self._accepted[kinds] = types
        return types

    def _ids(self, j: int, values: pl.Series) -> NDArray[np.int32]:
        return self._vocabularies[j].ids(values) if self._hashing is None else self._hashing.ids(j, values)

    def _vocabulary(self, folder: Path, j: int, file: EncoderFile) -> Vocabulary:
        path, name = vocabulary_file(folder, j), self.schema.categorical[j]
        try:
            found = digest(path)
        except OSError as error:
            raise UserError(f"the vocabulary can't be read ({error.strerror})", where=path, remedy=AGAIN) from error
        if found != file.files.get(path.name):
            raise UserError(
                f"the vocabulary of column {name!r} is damaged or of another run (its checksum differs)",
                where=path,
                remedy=AGAIN,
            )
        vocabulary = Vocabulary.read(path)
        if len(vocabulary) + 1 != file.num_embeddings[name]:
            raise UserError(
                f"holds {len(vocabulary)} values, not {file.num_embeddings[name] - 1}", where=path, remedy=AGAIN
            )
        return vocabulary

    def _value_types(self, where: Path, recorded: Mapping[str, str | None] | None) -> tuple[str | None, ...]:
        raw = self.raw_schema
        types: list[str | None] = []
        if raw.layout == "criteo":
            return (HEX,) * len(raw.categorical)
        first = len(self.schema.categorical) - len(raw.categorical)  # before them are the bucketized numbers
        for j, name in enumerate(raw.categorical):
            if self._vocabularies:
                types.append("string" if self._vocabularies[first + j].dtype == pl.String else "integer")
            elif recorded is not None:
                types.append(recorded.get(name))
            elif raw.options(name).type is not None:
                types.append(raw.options(name).type)
            else:
                raise UserError(
                    f"an earlier version did not record whether column {name!r} held text or integers, which "
                    "hashing depends on",
                    where=where,
                    remedy="prepare and train again",
                )
        return tuple(types)


def _text(value: Any, *, code: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        shown = [f"{one:g}" if isinstance(one, float) else str(one) for one in value[:_SHOWN]]
        return "[" + ", ".join(shown) + (f", ... {len(value):,} in all]" if len(value) > _SHOWN else "]")
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:08x}" if code else str(value)

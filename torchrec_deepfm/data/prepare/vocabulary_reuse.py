"""Reuse of a prepared folder's vocabulary for other data."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from torchrec_deepfm.data.dataset.prepared import PreparedData, read_manifest
from torchrec_deepfm.data.dataset.publish import digest
from torchrec_deepfm.data.prepare.vocabulary import vocabulary_file
from torchrec_deepfm.data.prepare.work_folder import sync
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError


class OldVocabulary:
    """The vocabulary of a finished folder."""

    def __init__(self, folder: Path, schema: Schema, transforms: Mapping[str, str]) -> None:
        data = PreparedData.open(folder)
        self.folder, self._schema = folder, schema
        theirs = data.schema
        if schema.categorical != theirs.categorical or schema.multi_hot != theirs.multi_hot:
            different = [name for name in schema.categorical if name not in theirs.categorical]
            different += [name for name in theirs.categorical if name not in schema.categorical]
            what = (
                f"column {different[0]!r} is in one of them only" if different else "the columns' order or kind differs"
            )
            raise UserError(f"--vocabulary {folder}: its categorical columns are not those of --schema; {what}")
        if schema.missing != theirs.missing:
            raise UserError(
                f"--vocabulary {folder}: was prepared with --missing {theirs.missing}, now it is {schema.missing}; "
                "choose the same --missing"
            )
        then = data.made.get("numeric")
        if isinstance(then, Mapping) and dict(then) != dict(transforms):
            names = [name for name in {**then, **transforms} if then.get(name) != transforms.get(name)]
            raise UserError(
                f"--vocabulary {folder}: numeric column {names[0]!r} was prepared with {then.get(names[0])}, now it is "
                f"{transforms.get(names[0])}; choose the same --numeric"
            )
        files = read_manifest(folder).get("files", {})
        self.digests: dict[str, Any] = {}
        for j in range(len(schema.categorical)):
            path = vocabulary_file(folder, j)
            if path.name not in files:
                raise UserError(
                    f"--vocabulary {folder}: {path.name} is missing; name a folder that was prepared without --hash"
                )
            self.digests[path.name] = files[path.name]

    def copy(self, staged: Sequence[Path], drafts: Path, target: Path) -> None:
        """Copy the files after checking their checksums and types.

        ``drafts``: a folder on the disk of ``target`` for unfinished files.
        """
        for j, name in enumerate(self._schema.categorical):
            path = vocabulary_file(self.folder, j)
            if digest(path) != self.digests[path.name]:
                raise UserError(f"{path}: the file is damaged (its checksum differs); name another --vocabulary")
            self._check_type(j, name, pl.read_parquet_schema(path)["value"], staged)
            draft = drafts / path.name
            shutil.copyfile(path, draft)
            sync(draft)
            draft.replace(target / path.name)

    def _check_type(self, j: int, name: str, kept: pl.DataType, staged: Sequence[Path]) -> None:
        for path in staged:
            kind = pl.read_parquet_schema(path)[f"c{j}"]
            inner = kind.inner if isinstance(kind, pl.List) else kind
            if (kept == pl.String) == (inner == pl.String):
                continue
            column = pl.read_parquet(path, columns=[f"c{j}"], glob=False, hive_partitioning=False)[f"c{j}"]
            if column.null_count() < len(column):  # a column without values has no known type
                raise UserError(f"--vocabulary {self.folder}: column {name!r} holds {kept} there and {inner} here")

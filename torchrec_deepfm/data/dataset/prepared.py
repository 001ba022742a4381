"""The prepared folder: its files, its manifest, its checks.

The arrays are in TorchRec's own numpy layout, three files per day, so that its readers open them too. ``docs/data.md``
describes every file and key. Folders without a manifest, as other tools write them, are read by ``external.py``.

Shape letters: N rows of a stem's files, I numeric columns, F1 categorical columns with one id per row, M ids of a list
column.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.arrays import DENSE as DENSE
from torchrec_deepfm.data.dataset.arrays import LABELS as LABELS
from torchrec_deepfm.data.dataset.arrays import MAX_NUM_EMBEDDINGS as MAX_NUM_EMBEDDINGS
from torchrec_deepfm.data.dataset.arrays import ROW_WEIGHTS as ROW_WEIGHTS
from torchrec_deepfm.data.dataset.arrays import SPARSE as SPARSE
from torchrec_deepfm.data.dataset.arrays import Bags, DayArrays
from torchrec_deepfm.data.dataset.arrays import Day as Day
from torchrec_deepfm.data.dataset.checksums import CHECKSUMS, HASH, borders
from torchrec_deepfm.data.dataset.external import ExternalData, open_external
from torchrec_deepfm.data.dataset.npy_mmap import MappedRows, map_npy
from torchrec_deepfm.data.dataset.remote_rows import RemoteCopy, open_copy
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError, one_of
from torchrec_deepfm.files import check_seal, read_bytes
from torchrec_deepfm.remote.address import address_of

FORMAT_VERSION: Final = 2
MANIFEST: Final = "manifest.json"
SPLITS: Final = ("train", "validation", "test")
MAX_MANIFEST_BYTES: Final = 64 << 20
HEADER_BYTES: Final = 4096  # that hold the header of any array

_AGAIN = "prepare the data again"


def offsets_file(stem: str, j: int) -> str:
    """Name the file with the bag borders of the multi-hot column at place ``j`` of ``schema.categorical``."""
    return f"{stem}_offsets_{j}.npy"


def ids_file(stem: str, j: int) -> str:
    """Name the file with the ids of the multi-hot column at place ``j`` of ``schema.categorical``."""
    return f"{stem}_ids_{j}.npy"


def weights_file(stem: str, j: int) -> str:
    """Name the file with the weights of the multi-hot column at place ``j`` of ``schema.categorical``."""
    return f"{stem}_weights_{j}.npy"


def stem_files(schema: Schema, stem: str) -> list[str]:
    """Name the files of a stem, the prefix of their names.

    Dense, sparse, labels, and the weights of the rows if they have any; then the offsets, ids and weights of each
    multi-hot column that has them.
    """
    endings = (DENSE, SPARSE, LABELS, *([] if schema.weight is None else [ROW_WEIGHTS]))
    names = [f"{stem}{ending}" for ending in endings]
    for name in schema.multi_hot:
        j = schema.categorical.index(name)
        names += [offsets_file(stem, j), ids_file(stem, j)]
        names += [weights_file(stem, j)] if name in schema.weighted else []
    return names


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """An opened prepared folder: the content of its manifest.

    Args:
        folder: Its path.
        schema: The columns.
        num_embeddings: Ids per categorical column; ids run from 0 to this number minus 1.
        splits: The days of ``train``, ``validation`` and ``test``; a split may be empty.
        made: How it was prepared: mode, thresholds, split, sources, versions.
        optimum: The best reachable ``auc`` and ``logloss`` per split for synthetic data, else empty.
        external: How to read it if another tool wrote it.
        blocks: Rows per block with a checksum; ``None`` in folders without block checksums.
        checksums_sha256: Digest of the file that holds them.
        remote: The copy that ``folder`` is, if the data are at an address.
    """

    folder: Path
    schema: Schema
    num_embeddings: Mapping[str, int]
    splits: Mapping[str, tuple[Day, ...]]
    made: Mapping[str, Any]
    optimum: Mapping[str, Mapping[str, float]]
    external: ExternalData | None = None
    blocks: int | None = None
    checksums_sha256: str = ""
    remote: RemoteCopy | None = None

    @property
    def named(self) -> str:
        """The folder as the user named it, which may be an address."""
        return str(self.folder) if self.remote is None else self.remote.address

    @classmethod
    def open(cls, folder: Path | str, *, num_embeddings: int | Sequence[int] | None = None) -> "PreparedData":
        """Read the manifest of a prepared folder and check that its files exist and have the right size.

        A folder without a manifest that holds the day files of TorchRec's or MLPerf's scripts is also opened:
        its last day is halved into validation and test, the others train. See docs/loader.md.

        Args:
            folder: The folder that ``prepare`` or those scripts wrote.
            num_embeddings: Only for folders of other tools: take every id modulo this number, one for all columns or
                one for each (TorchRec's ``hashes``). Without it the ids are used unchanged, and all files are read once
                to find the largest.

        Returns:
            The opened data. With a manifest, no array is read yet.

        Raises:
            UserError: The folder or its manifest is missing or damaged, or a file is missing or has another size.
        """
        address, remote = address_of(folder), None
        if address is not None:
            remote = open_copy(address, MANIFEST, "make one with prepare")
        folder = Path(folder) if remote is None else remote.folder
        if not folder.is_dir():
            raise UserError("no such folder", where=folder, remedy="make it with prepare")
        path = folder / MANIFEST
        content = _read(path)
        if content is None:
            return cls._open_external(folder, num_embeddings)
        if num_embeddings is not None:
            raise UserError("the manifest sets num_embeddings", where=path, remedy="leave the option out")
        manifest = _parse(path, content)
        version = manifest.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise UserError(
                f"format_version is {version!r}, but this version reads 1 and {FORMAT_VERSION}",
                where=path,
                remedy=_AGAIN,
            )
        if version == FORMAT_VERSION and not check_seal(content):
            raise UserError("the manifest is damaged (its checksum does not fit)", where=path, remedy=_AGAIN)
        try:
            data = cls(
                folder=folder,
                remote=remote,
                schema=Schema.from_json(manifest["schema"]),
                num_embeddings={str(name): int(count) for name, count in manifest["num_embeddings"].items()},
                splits={split: tuple(_day(entry) for entry in manifest["splits"][split]) for split in SPLITS},
                made=dict(manifest["made"]),
                optimum={str(split): dict(best) for split, best in manifest["optimum"].items()},
                blocks=_block_rows(manifest),
                checksums_sha256=str(manifest["files"].get(CHECKSUMS, {}).get("sha256", "")),
            )
            sizes = {_file_name(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
            data._check(sizes)
        except UserError as error:
            raise error.within(path) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the manifest is damaged ({type(error).__name__}: {error})", where=path, remedy=_AGAIN
            ) from error
        for name, size in sizes.items():
            _check_size(folder / name, size)
        return data

    @classmethod
    def _open_external(cls, folder: Path, num_embeddings: int | Sequence[int] | None) -> "PreparedData":
        external = open_external(folder, num_embeddings)
        return cls(
            folder=folder,
            schema=external.schema,
            num_embeddings=external.num_embeddings,
            splits=dict(zip(SPLITS, external.splits(), strict=True)),
            made={"mode": "foreign", "modulo": external.modulo},
            optimum={},
            external=external,
        )

    def days(self, split: str) -> tuple[Day, ...]:
        """Return the days of a split.

        Args:
            split: ``train``, ``validation`` or ``test``.

        Returns:
            Its days, in row order.

        Raises:
            UserError: The split does not exist.
        """
        if split not in self.splits:
            raise UserError(
                f"unknown split {split!r}", where=self.folder, remedy=f"choose {one_of(self.splits, split)}"
            )
        return self.splits[split]

    def rows(self, split: str) -> int:
        """Return how many rows a split has.

        Args:
            split: ``train``, ``validation`` or ``test``.

        Returns:
            The number of rows over all its days.

        Raises:
            UserError: The split does not exist.
        """
        return sum(day.rows for day in self.days(split))

    def arrays(self, day: Day) -> DayArrays:
        """Map the arrays of a day into memory, read-only.

        Args:
            day: One of ``days(split)``.

        Returns:
            The arrays of the day's stem. The day's rows are those from ``day.start`` on. No value in them is checked
            except the first and last bag border.

        Raises:
            UserError: A file is missing, is not an array, or differs in shape or type from the manifest.
        """
        if self.external is not None:
            return self.external.arrays(day.stem)
        rows = max(other.start + other.rows for other in self._days_of(day.stem))
        schema, stem = self.schema, day.stem
        return DayArrays(
            dense=self._map(f"{stem}{DENSE}", np.float32, (rows, len(schema.dense_names))),
            sparse=self._map(f"{stem}{SPARSE}", np.int32, (rows, len(schema.one_hot))),
            labels=self._map(f"{stem}{LABELS}", np.int32, (rows, 1)),
            bags={name: self._bags(stem, name, rows) for name in schema.multi_hot},
            weights=None if schema.weight is None else self._map(f"{stem}{ROW_WEIGHTS}", np.float32, (rows, 1)),
        )

    def checksums(self, split: str) -> NDArray[np.uint64] | None:
        """Map the checksums of a split's blocks; see ``checksums.py``.

        Args:
            split: ``train``, ``validation`` or ``test``.

        Returns:
            uint64 [P, A]; ``None`` where the folder has none.

        Raises:
            UserError: Their file is missing, damaged, or does not fit the manifest.
        """
        if self.blocks is None:
            return None
        parts = [len(borders(self.splits[name], self.blocks)) - 1 if self.splits[name] else 0 for name in SPLITS]
        arrays = len(stem_files(self.schema, ""))
        mapped = self._map(CHECKSUMS, np.uint64, (sum(parts), arrays))
        with self.file(CHECKSUMS).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.checksums_sha256:
                raise UserError(
                    "the content is not what was written (SHA-256 differs)", where=mapped.where, remedy=_AGAIN
                )
        first = sum(parts[: SPLITS.index(split)])
        return mapped.array[first : first + parts[SPLITS.index(split)]]

    def file(self, name: str) -> Path:
        """Return the path of a file, which is fetched first if the folder is at an address."""
        if self.remote is not None:
            self.remote.whole(name)
        return self.folder / name

    def _bags(self, stem: str, name: str, rows: int) -> Bags:
        j = self.schema.categorical.index(name)
        offsets = self._map(offsets_file(stem, j), np.int64, (rows + 1,))
        with offsets.ends():
            first, last = int(offsets[0]), int(offsets[rows])
        if first != 0 or last < 0:
            raise UserError(
                f"the borders run from {first} to {last} and must begin at 0", where=offsets.where, remedy=_AGAIN
            )
        ids = self._map(ids_file(stem, j), np.int32, (last,))
        weighted = name in self.schema.weighted
        weights = self._map(weights_file(stem, j), np.float32, (last,)) if weighted else None
        return Bags(ids=ids, offsets=offsets, weights=weights)

    def _map(self, name: str, dtype: type[Any], shape: tuple[int, ...]) -> MappedRows:
        if name == CHECKSUMS:
            self.file(name)
        elif self.remote is not None:
            self.remote.head(name, HEADER_BYTES)
        rows = map_npy(self.folder / name, _AGAIN)
        if rows.dtype != dtype or rows.shape != shape:
            raise UserError(
                f"expected {np.dtype(dtype)} of shape {shape}, found {rows.dtype} of shape {rows.shape}",
                where=rows.where,
                remedy=_AGAIN,
            )
        if self.remote is not None and name != CHECKSUMS:
            _, first, row_bytes = rows.raw
            rows.where = f"{self.named}/{name}"
            rows.remote = self.remote.file(name, first, row_bytes, len(rows))
        return rows

    def _days_of(self, stem: str) -> list[Day]:
        return sorted((day for days in self.splits.values() for day in days if day.stem == stem), key=lambda d: d.start)

    def _check(self, sizes: Mapping[str, int]) -> None:
        """Check that the parts of the manifest fit each other."""
        if set(self.num_embeddings) != set(self.schema.categorical):
            raise UserError("num_embeddings and the schema name different columns", remedy=_AGAIN)
        for column, count in self.num_embeddings.items():
            if not 1 <= count <= MAX_NUM_EMBEDDINGS:
                raise UserError(f"num_embeddings of column {column} is {count}", remedy=_AGAIN)
        for stem in sorted({day.stem for days in self.splits.values() for day in days}):
            days = self._days_of(stem)
            for day, following in itertools.pairwise(days):
                if day.start + day.rows > following.start:
                    raise UserError(f"the splits share rows of {stem}", remedy=_AGAIN)
            for name in stem_files(self.schema, stem):
                if name not in sizes:
                    raise UserError(f"the file {name} is not listed", remedy=_AGAIN)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a prepared folder; it is only checked to exist and to be JSON."""
    path = folder / MANIFEST
    content = _read(path)
    if content is None:
        raise UserError(f"not a prepared folder, {MANIFEST} is missing", where=folder, remedy="make one with prepare")
    return _parse(path, content)


def _read(path: Path) -> bytes | None:
    try:
        return read_bytes(path, most=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"the manifest can't be read ({error.strerror})", where=path, remedy=_AGAIN) from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
        raise UserError(f"the manifest is not valid JSON ({error})", where=path, remedy=_AGAIN) from error
    if not isinstance(manifest, dict):
        raise UserError("the manifest is not a JSON object", where=path, remedy=_AGAIN)
    return manifest


def _block_rows(manifest: Mapping[str, Any]) -> int | None:
    blocks = manifest.get("blocks")
    if blocks is None:
        return None
    if blocks["hash"] != HASH or type(blocks["rows"]) is not int or blocks["rows"] < 1:
        raise ValueError(f"blocks are {blocks}")
    if CHECKSUMS not in manifest["files"]:
        raise ValueError(f"the file {CHECKSUMS} is not listed")
    return blocks["rows"]


def _day(entry: Mapping[str, Any]) -> Day:
    day = Day(**entry)
    _file_name(day.stem)
    for number in (day.start, day.rows):
        if type(number) is not int:
            raise ValueError(f"{number!r} is not a number of rows")
    if day.rows < 1 or day.start < 0:
        raise ValueError(f"{day.rows} rows from row {day.start} on")
    return day


def _file_name(name: Any) -> str:
    """Check that a name stays in its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} is not a file name")
    return name


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError("the file is missing", where=path, remedy=_AGAIN) from error
    if found != size:
        raise UserError(f"the file has {found} bytes, the manifest lists {size}", where=path, remedy=_AGAIN)

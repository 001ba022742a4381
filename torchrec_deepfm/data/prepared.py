"""The prepared folder: its files, its manifest, its checks.

The arrays are in TorchRec's own numpy layout, three files a day, so that its readers open them too. ``docs/data.md``
describes every file and key.

Shape letters: N rows of a day, I numeric columns, F categorical columns.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError

FORMAT_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
VOCABULARY: Final = "vocabulary.parquet"
DENSE: Final = "_dense.npy"
SPARSE: Final = "_sparse.npy"
LABELS: Final = "_labels.npy"
SPLITS: Final = ("train", "validation", "test")
MAX_NUM_EMBEDDINGS: Final = 2**31 - 1  # ids are int32

_AGAIN = "prepare the data again"


@dataclass(frozen=True, kw_only=True)
class Day:
    """One run of rows, kept in three arrays whose names begin with the same stem.

    Args:
        stem: The head of the file names, such as ``day_0``.
        rows: N, the number of rows.
        positives: How many of them have label 1.
    """

    stem: str
    rows: int
    positives: int


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A prepared folder that has been opened: what its manifest says.

    Args:
        folder: Where it lies.
        schema: The columns.
        num_embeddings: Ids per categorical column; ids run from 0 to this number minus 1.
        splits: The days of ``train``, ``validation`` and ``test``.
        made: How it was made: mode, thresholds, split, sources, versions.
        optimum: The best reachable ``auc`` and ``logloss`` per split where they are known (synthetic data), else empty.
    """

    folder: Path
    schema: Schema
    num_embeddings: Mapping[str, int]
    splits: Mapping[str, tuple[Day, ...]]
    made: Mapping[str, Any]
    optimum: Mapping[str, Mapping[str, float]]

    @classmethod
    def open(cls, folder: Path) -> "PreparedData":
        """Read the manifest of a prepared folder and check that its files are there and of the right size.

        Args:
            folder: The folder that ``prepare`` wrote.

        Returns:
            The opened data. No array is read yet.

        Raises:
            UserError: The folder or its manifest is missing or damaged, or a file is missing or has another size.
        """
        manifest = _read_manifest(folder)
        path = folder / MANIFEST
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; {_AGAIN}")
        try:
            data = cls(
                folder=folder,
                schema=Schema.from_json(manifest["schema"]),
                num_embeddings={str(name): int(count) for name, count in manifest["num_embeddings"].items()},
                splits={split: tuple(_day(entry) for entry in manifest["splits"][split]) for split in SPLITS},
                made=dict(manifest["made"]),
                optimum={str(split): dict(best) for split, best in manifest["optimum"].items()},
            )
            sizes = {str(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: the manifest is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error
        if set(data.num_embeddings) != set(data.schema.categorical):
            raise UserError(f"{path}: num_embeddings and the schema name different columns; {_AGAIN}")
        for column, count in data.num_embeddings.items():
            if not 1 <= count <= MAX_NUM_EMBEDDINGS:
                raise UserError(f"{path}: num_embeddings of column {column} is {count}; {_AGAIN}")
        for name, size in sizes.items():
            _check_size(folder / name, size)
        return data

    def days(self, split: str) -> tuple[Day, ...]:
        """Return the days of a split.

        Args:
            split: ``train``, ``validation`` or ``test``.

        Returns:
            Its days, in row order.

        Raises:
            UserError: There is no such split.
        """
        if split not in self.splits:
            raise UserError(f"{self.folder}: there is no split {split!r}; choose one of {', '.join(self.splits)}")
        return self.splits[split]

    def rows(self, split: str) -> int:
        """Return how many rows a split has.

        Args:
            split: ``train``, ``validation`` or ``test``.

        Returns:
            The number of rows over all its days.

        Raises:
            UserError: There is no such split.
        """
        return sum(day.rows for day in self.days(split))

    def arrays(self, day: Day) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
        """Map the three arrays of a day into memory, read-only.

        Args:
            day: One of ``days(split)``.

        Returns:
            Dense float32 [N, I], sparse int32 [N, F] and labels int32 [N, 1]. No value in them has been looked at.

        Raises:
            UserError: A file is missing, is no array, or has another shape or type than the manifest says.
        """
        dense = _map(self.folder / f"{day.stem}{DENSE}", np.float32, (day.rows, len(self.schema.numeric)))
        sparse = _map(self.folder / f"{day.stem}{SPARSE}", np.int32, (day.rows, len(self.schema.categorical)))
        labels = _map(self.folder / f"{day.stem}{LABELS}", np.int32, (day.rows, 1))
        return dense, sparse, labels


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with prepare")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no prepared folder, there is no {MANIFEST}; make one with prepare") from error
    except OSError as error:
        raise UserError(f"{path}: the manifest can't be read ({error.strerror}); check its permissions") from error
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        raise UserError(f"{path}: the manifest is no valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: the manifest is no JSON object; {_AGAIN}")
    return manifest


def _day(entry: Mapping[str, Any]) -> Day:
    day = Day(**entry)
    if not isinstance(day.stem, str) or Path(day.stem).name != day.stem:
        raise ValueError(f"{day.stem!r} is no stem of a file name")
    if not isinstance(day.rows, int) or day.rows < 1:
        raise ValueError(f"{day.rows!r} is no number of rows")
    return day


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: the file is missing; {_AGAIN}") from error
    if found != size:
        raise UserError(f"{path}: the file has {found} bytes, the manifest says {size}; {_AGAIN}")


def _map(path: Path, dtype: type[Any], shape: tuple[int, int]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing; {_AGAIN}") from error
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: this is no whole .npy array ({reason}); {_AGAIN}") from error
    whole = isinstance(array, np.ndarray) and array.flags.c_contiguous
    if not whole or array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: expected {np.dtype(dtype)} of shape {shape}, found {found}; {_AGAIN}")
    return array

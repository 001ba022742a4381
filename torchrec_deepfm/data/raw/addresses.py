"""Where a user's table lies: a local path, or an address that fsspec knows (``s3://...``, ``memory://...``).

This module finds and opens files; ``table_files.py`` reads them.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote

import pyarrow as pa

from torchrec_deepfm.data.raw.file_kind import compression
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote.address import AddressFile, open_address, reported
from torchrec_deepfm.remote.address import one_line as one_line

PARQUET: Final = (".parquet", ".pq")
CSV: Final = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")
ORC: Final = (".orc",)
ARROW: Final = (".arrow", ".feather", ".ipc")
JSON: Final = tuple(f"{name}{packed}" for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst"))
_FORMATS: Final = {"Parquet": PARQUET, "CSV": CSV, "ORC": ORC, "Arrow": ARROW, "JSON lines": JSON}
_SUFFIXES: Final = (*PARQUET, *CSV, *ORC, *ARROW, *JSON)
# What Hive and Spark call the folder of missing values.
_MISSING: Final = "__HIVE_DEFAULT_PARTITION__"
# Files that often lie beside data. Any other unknown file is an error: skipped silently, it could be half of the rows.
_BESIDE: Final = (".md", ".txt", ".toml", ".json", ".crc")
_KINDS: Final = (
    "a Parquet file (.parquet), a CSV with a header (.csv, .tsv, also .gz or .zst), ORC (.orc), Arrow (.arrow, "
    ".feather) or JSON lines (.jsonl)"
)


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a table.

    ``name``: as the user named it; a file of a folder has the folder's name before its own. ``filesystem``: the fsspec
    file system, ``None`` for a local path. ``partitions``: what the names of folders such as ``day=3`` say.
    """

    name: str
    bytes: int
    path: str
    filesystem: Any = None
    partitions: Mapping[str, int | str | None] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """The ending that gives the format: one of ``PARQUET`` or ``CSV``."""
        return _suffix(self.path)

    @property
    def format(self) -> str:
        """The format in words, as messages give it."""
        return next((name for name, suffixes in _FORMATS.items() if self.suffix in suffixes), "")

    def unpacked(self, opened: Any) -> Any:
        """The content of the opened file without its compression."""
        codec = compression(self.path)
        return pa.CompressedInputStream(opened, codec) if codec else opened

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file for reading, seekable, as pyarrow takes it; errors while it is open name the file."""
        try:
            if self.filesystem is None:
                with pa.OSFile(self.path) as file:
                    yield file
            else:
                with AddressFile(self.filesystem, self.path) as file:
                    yield file
        except FileNotFoundError as error:
            raise UserError("the file is gone", where=self.name, remedy="check the path") from error
        except PermissionError as error:
            raise UserError(
                "reading is not permitted", where=self.name, remedy="check permissions and credentials"
            ) from error
        except OSError as error:
            remedy = "download or write the file again"
            if self.filesystem is not None:
                remedy = "check address and network, then run the same command again"
            raise UserError(f"reading failed ({one_line(error)})", where=self.name, remedy=remedy) from error


def find_files(named: str) -> list[File]:
    """Find the files of a table.

    ``named``: a local path or an fsspec address, of one file, of a folder of files and folders, or a pattern such as
    ``clicks/*.parquet``. Returns the files, in natural order (``part-2`` before ``part-10``).
    """
    files = _find_remote(named) if "://" in named or "::" in named else _find_local(named)
    kinds = sorted({file.format for file in files}, key=list(_FORMATS).index)
    if len(kinds) > 1:
        raise UserError(
            f"the folder mixes {' and '.join(kinds)} files", where=named, remedy="name the files, or use two folders"
        )
    return _typed(files, named)


def _typed(files: list[File], named: str) -> list[File]:
    """Make integers of partitions that are integers in every file."""
    for file in files:
        if set(file.partitions) != set(files[0].partitions):
            other = sorted(set(file.partitions) ^ set(files[0].partitions))[0]
            raise UserError(
                f"only some files lie in a folder {other}=...", where=named, remedy="name the folders of one kind"
            )
    for name in files[0].partitions:
        values = [file.partitions[name] for file in files]
        if all(value is None or re.fullmatch(r"-?(0|[1-9]\d{0,17})", str(value)) for value in values):
            files = [
                replace(file, partitions={**file.partitions, name: None if value is None else int(value)})
                for file, value in zip(files, values, strict=True)
            ]
    return files


def _partitions(relative: str) -> dict[str, int | str | None]:
    """What the folders in a path say."""
    found: dict[str, int | str | None] = {}
    for part in PurePosixPath(relative).parts[:-1]:
        key, equals, value = part.partition("=")
        if equals and key:
            found[key] = None if value == _MISSING else unquote(value)
    return found


def _suffix(name: str) -> str:
    lower = name.lower()
    return max((suffix for suffix in _SUFFIXES if lower.endswith(suffix)), key=len, default="")


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts if part], name


def _find_local(named: str) -> list[File]:
    path = Path(named)
    try:
        if path.is_dir():
            entries = [
                (Path(folder, name).relative_to(path).as_posix(), Path(folder, name).is_dir())
                for folder, folders, names in os.walk(path, followlinks=True, onerror=_raise)
                for name in (*folders, *names)
            ]
            return [
                File(
                    name=str(path / name),
                    bytes=(path / name).stat().st_size,
                    path=str(path / name),
                    partitions=_partitions(name),
                )
                for name in _tables_of(named, entries)
            ]
        if glob.has_magic(named) and not path.exists():
            # Path.glob takes no absolute pattern.
            matches = sorted(glob.glob(named, recursive=True), key=_natural)  # noqa: PTH207
            if not matches:
                raise UserError("nothing matches this pattern", where=named, remedy="check it")
            return [file for match in matches for file in _find_local(match)]
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UserError("no such file or folder", where=named, remedy="check the path") from error
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", where=named, remedy="check its permissions") from error
    _check_kind(named, path.name)
    return [File(name=named, bytes=size, path=str(path))]


def _raise(error: OSError) -> None:
    raise error


def find_text(named: str) -> File:
    """Find a text file of any name, at a path or an fsspec address; a local one may not exist."""
    if "://" not in named and "::" not in named:
        path = Path(named)
        return File(name=named, bytes=path.stat().st_size if path.is_file() else 0, path=named)
    filesystem, path_there = open_address(named)
    try:
        info = filesystem.info(path_there)
    except FileNotFoundError as error:
        raise UserError("there is nothing at this address", where=named, remedy="check it") from error
    except Exception as error:  # of each driver's own kind, as in _find_remote
        raise UserError(
            f"it can't be reached ({one_line(error)})", where=named, remedy="check address and credentials"
        ) from error
    if info["type"] == "directory":
        raise UserError("this is a folder", where=named, remedy="name the files in it")
    return File(name=named, bytes=int(info["size"] or 0), path=path_there, filesystem=filesystem)


def text_files(named: str) -> list[str] | None:
    """List the paths or addresses of the files in a folder of texts, sorted; None if it is not a folder."""
    if "://" not in named and "::" not in named:
        folder = Path(named)
        return [str(path) for path in sorted(folder.iterdir())] if folder.is_dir() else None
    filesystem, path = open_address(named)
    with reported(named):
        if not filesystem.isdir(path):
            return None
        filesystem.invalidate_cache()
        return [str(filesystem.unstrip_protocol(one)) for one in sorted(filesystem.ls(path, detail=False))]


def is_table_file(named: str, *, tsv: bool = True) -> bool:
    """Whether a name is that of a Parquet file or CSV, tables with named columns.

    Criteo's text may end in .tsv too; without ``tsv`` such files are not tables.
    """
    suffix = _suffix(named)
    return bool(suffix) and (tsv or not suffix.startswith(".tsv"))


def _find_remote(named: str) -> list[File]:
    filesystem, path = open_address(named)
    try:
        if glob.has_magic(path) and not filesystem.exists(path):
            matches = sorted(filesystem.glob(path), key=_natural)
            if not matches:
                raise UserError("nothing matches this pattern", where=named, remedy="check it")
            return [file for match in matches for file in _find_remote(filesystem.unstrip_protocol(match))]
        info = filesystem.info(path)
        if info["type"] == "directory":
            filesystem.invalidate_cache()  # fsspec caches listings, and a table may have grown since
            root = info["name"].rstrip("/")
            listed = filesystem.find(path, withdirs=True, detail=True).values()
            entries = {entry["name"].rstrip("/").removeprefix(root).lstrip("/"): entry for entry in listed}
            found = _tables_of(named, [(name, entry["type"] == "directory") for name, entry in entries.items()])
            folder = named.rstrip("/")
            return [
                File(
                    name=f"{folder}/{name}",
                    bytes=int(entries[name]["size"] or 0),
                    path=entries[name]["name"],
                    filesystem=filesystem,
                    partitions=_partitions(name),
                )
                for name in found
            ]
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("nothing exists at this address", where=named, remedy="check it") from error
    # Each driver raises errors of its own (botocore's, aiohttp's, ...), and all of them are about this address.
    except Exception as error:
        raise UserError(
            f"can't be reached ({one_line(error)})", where=named, remedy="check address and credentials"
        ) from error
    _check_kind(named, path)
    return [File(name=named, bytes=int(info["size"] or 0), path=path, filesystem=filesystem)]


def _check_kind(named: str, path: str) -> None:
    if not _suffix(path):
        raise UserError("the name has no known ending", where=named, remedy=f"give {_KINDS}, or a folder of such files")


def _tables_of(named: str, entries: list[tuple[str, bool]]) -> list[str]:
    """The names of the data files among a folder's (name, is a folder) entries, in natural order."""
    names = {name for name, _ in entries}
    if "_delta_log" in names:
        raise UserError(
            "a Delta table, whose folder also holds rows that were deleted",
            where=named,
            remedy="write it as plain Parquet first",
        )
    if "_temporary" in names and "_SUCCESS" not in names:  # Spark removes the one and writes the other at its end
        raise UserError(
            "Spark has not finished writing this folder (_temporary is there, _SUCCESS is not)",
            where=named,
            remedy="let the job end, or run it again",
        )
    seen = [
        (name, folder)
        for name, folder in entries
        if name and not any(part.startswith((".", "_")) and "=" not in part for part in PurePosixPath(name).parts)
    ]
    files = [name for name, folder in seen if not folder and not name.lower().endswith(_BESIDE)]
    for name in sorted(files):
        if not _suffix(name):
            raise UserError(f"{name!r} is not {_KINDS}", where=named, remedy="move it, or name the files one by one")
    if not files:
        raise UserError("no data in this folder", where=named, remedy=f"give {_KINDS}, or a folder of such files")
    return sorted(files, key=_natural)

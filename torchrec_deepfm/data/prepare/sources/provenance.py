"""The origin of a prepared folder: sources and versions for its manifest."""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Final

import fsspec
import pyarrow as pa
import xxhash

from torchrec_deepfm.data.prepare.sources.units import Unit
from torchrec_deepfm.data.raw.chunk_files import ChunkTable
from torchrec_deepfm.data.raw.source import Source
from torchrec_deepfm.data.raw.table_source import TableSource
from torchrec_deepfm.errors import UserError

TRUTH: Final = "truth.json"


# Bytes digested at the head and at the tail of a source; a source of up to twice as many is digested whole.
EDGE_BYTES: Final = 1 << 20


def source_state(source: Source) -> dict[str, int | str]:
    """Return a state that changes when the bytes of a source change.

    Returns ``bytes``; ``etag`` where the file system of an address gives one, which represents the whole content. Else
    ``digest``, XXH3 of head and tail, and, unless that covers all of it, ``modified``, the time of the last change.
    """
    if isinstance(source, TableSource) and isinstance(source.file, ChunkTable) and source.file.memory is not None:
        hashing = _Hashing()
        with pa.ipc.new_stream(pa.PythonFile(hashing, mode="w"), source.file.memory.schema) as stream:
            stream.write_table(source.file.memory)
        return {"bytes": source.bytes, "digest": hashing.digest.hexdigest()}
    try:
        if "://" not in source.path and "::" not in source.path:
            stat = Path(source.path).stat()
            with Path(source.path).open("rb") as file:
                return _state(file, stat.st_size, stat.st_mtime_ns)
        filesystem, path = fsspec.core.url_to_fs(source.path)
        filesystem.invalidate_cache()  # an old listing must not be used
        info = {key.lower(): value for key, value in filesystem.info(path).items()}
        size = int(info["size"] or 0)
        if info.get("etag"):
            return {"bytes": size, "etag": str(info["etag"])}
        modified = next(
            (str(info[key]) for key in ("lastmodified", "last_modified", "updated", "mtime") if key in info), ""
        )
        with filesystem.open(path, "rb") as file:
            return _state(file, size, modified)
    except Exception as error:  # each driver of an address raises errors of its own
        raise UserError(
            f"can't be read ({' '.join(str(error).split())})", where=source.path, remedy="check path and permissions"
        ) from error


class _Hashing(io.RawIOBase):
    """A file that keeps the digest of what is written."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(bytes(data))
        return len(data)


def _state(file: IO[bytes], size: int, modified: int | str) -> dict[str, int | str]:
    digest = xxhash.xxh3_128(file.read(EDGE_BYTES))
    file.seek(max(size - EDGE_BYTES, EDGE_BYTES))
    digest.update(file.read(EDGE_BYTES))
    state: dict[str, int | str] = {"bytes": size, "digest": digest.hexdigest()}
    return state if size <= 2 * EDGE_BYTES else {**state, "modified": modified}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Compare two states of a source.

    A digest of the whole source decides alone: neither a copy nor ``touch`` changes it. For a larger one
    head and tail do not cover the middle, so the time of the last change counts too.

    ``before``: an earlier state; what older versions did not record is not compared. Returns what differs, for
    messages; empty if nothing does.
    """
    if before["bytes"] != now["bytes"]:
        return f"{before['bytes']:,} bytes then, {now['bytes']:,} now"
    if before.get("etag", now.get("etag")) != now.get("etag"):
        return "another ETag"
    if before.get("digest", now.get("digest")) != now.get("digest"):
        return "other content"
    if before.get("modified", now.get("modified")) != now.get("modified"):
        return "another time of modification"
    return ""


def known_optimum(named: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float]]:
    """Read the best reachable metrics that ``synthetic`` leaves beside its files, for splits of one whole file.

    Returns ``auc`` and ``logloss`` by split, where they are known.
    """
    optimum = {}
    for split, paths in named.items():
        if len(paths) != 1 or not isinstance(paths[0], str | Path):
            continue
        source = Path(paths[0])
        path = source.parent / TRUTH
        if not path.is_file():
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))["files"].get(source.name)
            if entry is not None:
                optimum[split] = {key: float(entry[key]) for key in ("auc", "logloss")}
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the file is damaged ({type(error).__name__})", where=path, remedy="remove it") from error
    return optimum


def data_versions() -> dict[str, Any]:
    """Return the versions of the packages that make a prepared folder."""
    found = {}
    for package in ("torchrec_deepfm", "duckdb", "polars", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
            found[package] = metadata.version(package)
    return found


def source_name(source: Source) -> str:
    """A source as the manifest names it."""
    return Path(source.path).name


def unit_state(unit: Unit) -> dict[str, list[dict[str, Any]]]:
    """Name and state of the sources of a unit."""
    return {"sources": [{"name": source_name(source), **source_state(source)} for source in unit.sources]}


def what_changed(before: Mapping[str, Any], now: Mapping[str, list[dict[str, Any]]], unit: Unit) -> str:
    """Say which source of a unit has changed, if any has."""
    pairs = zip(unit.sources, before.get("sources", ()), now["sources"], strict=False)
    for source, then, state in pairs:
        what = difference(then, state) if then["name"] == state["name"] else "another file"
        if what:
            return f"{source.path} has changed ({what})"
    return "" if len(before.get("sources", ())) == len(unit.sources) else f"{unit}: the files that share arrays changed"

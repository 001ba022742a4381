"""Where a prepared folder comes from: what its manifest says of sources and versions."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.data.source import Source
from torchrec_deepfm.errors import UserError

TRUTH: Final = "truth.json"


def source_state(source: Source) -> dict[str, int]:
    """Return what changes when a source does.

    Args:
        source: The source.

    Returns:
        Its size, and the time of its last change where it is a local file.
    """
    state = {"bytes": source.bytes}
    with suppress(OSError):  # an address of another file system has no time that we could ask for
        state["modified_ns"] = Path(source.path).stat().st_mtime_ns
    return state


def known_optimum(named: Mapping[str, Sequence[str | Path]]) -> dict[str, dict[str, float]]:
    """Read the best reachable metrics that ``synthetic`` leaves beside its files, for splits of one whole file.

    Args:
        named: The files of each split.

    Returns:
        ``auc`` and ``logloss`` by split, where they are known.

    Raises:
        UserError: What ``synthetic`` left is damaged.
    """
    optimum = {}
    for split, paths in named.items():
        if len(paths) != 1:
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
            raise UserError(f"{path}: the file is damaged ({type(error).__name__}); remove it") from error
    return optimum


def versions() -> dict[str, Any]:
    """Return the versions of what makes a prepared folder.

    Returns:
        Versions by package.
    """
    found = {}
    for package in ("torchrec_deepfm", "duckdb", "polars", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # a checkout that is on the path but not installed
            found[package] = metadata.version(package)
    return found

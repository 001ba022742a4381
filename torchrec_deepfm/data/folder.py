"""Writing an output folder all at once: it appears whole, or not at all."""

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrec_deepfm.data.prepared import FORMAT_VERSION, MANIFEST, SPLITS, Day
from torchrec_deepfm.data.schema import Schema
from torchrec_deepfm.errors import UserError


def check_free(output: Path) -> None:
    """Check that an output folder does not exist yet, or is empty.

    Args:
        output: The folder that is to be written.

    Raises:
        UserError: Something is there already.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"{output}: the output folder is not empty; name another one or remove it")
    elif output.exists() or output.is_symlink():
        raise UserError(f"{output}: the output exists and is no folder; name another one")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary sibling of ``output`` to write into; rename it at the end.

    Args:
        output: The folder that is to appear.

    Yields:
        The temporary folder. When the block raises, it is removed and ``output`` stays as it was.

    Raises:
        UserError: ``output`` is taken, or the disk refuses.
    """
    check_free(output)
    output = output.absolute()
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        check_free(output)
        partial.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{output}: no space is left on the device; free some or name another output") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{output}: the folder can't be written ({error.strerror}); name another output") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(
    folder: Path,
    *,
    schema: Schema,
    num_embeddings: Mapping[str, int],
    splits: Mapping[str, Sequence[Day]],
    made: Mapping[str, Any],
    optimum: Mapping[str, Mapping[str, float]],
) -> None:
    """Write ``manifest.json`` with the size and checksum of every other file in the folder.

    Args:
        folder: A folder that is complete but for the manifest.
        schema: The columns.
        num_embeddings: Ids per categorical column.
        splits: The days of each split.
        made: How the folder was made.
        optimum: The best reachable metrics per split, where known.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {
        "format_version": FORMAT_VERSION,
        "schema": schema.to_json(),
        "num_embeddings": dict(num_embeddings),
        "splits": {split: [vars(day) for day in splits[split]] for split in SPLITS},
        "files": files,
        "made": dict(made),
        "optimum": {split: dict(best) for split, best in optimum.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

"""The checksums of a prepared folder's files and of their blocks of rows."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_deepfm.data.dataset.checksums import CHECKSUMS, stem_borders
from torchrec_deepfm.data.dataset.prepared import SPLITS, Day, offsets_file, stem_files
from torchrec_deepfm.data.dataset.publish import FileParts, digest, digest_parts, find_parts, sync
from torchrec_deepfm.data.loader import epoch_order
from torchrec_deepfm.data.prepare.work_folder import WorkFolder
from torchrec_deepfm.data.schema import Schema

Splits = Mapping[str, Sequence[Mapping[str, Any]]]


def borders_of_stems(splits: Splits) -> dict[str, NDArray[np.int64]]:
    """The rows of each stem's files where a part with a checksum of its own begins or ends."""
    stems: dict[str, list[NDArray[np.int64]]] = {}
    for split in SPLITS:
        days = [Day(**day) for day in splits[split]]
        for day, borders in zip(days, stem_borders(days, epoch_order.BLOCK_ROWS), strict=True):
            stems.setdefault(day.stem, []).append(borders)
    return {stem: np.unique(np.concatenate(parts)) for stem, parts in stems.items()}


def parts_of(folder: Path, name: str, rows: NDArray[np.int64]) -> FileParts:
    """Find the blocks of a file, which begin and end at ``rows``."""
    offsets = re.fullmatch(r"(.*)_(?:ids|weights)_(\d+)\.npy", name)
    if offsets:
        rows = np.load(folder / offsets_file(offsets[1], int(offsets[2])), mmap_mode="r")[rows]
    return find_parts(folder / name, rows)


def take_sums(work: WorkFolder, name: str, parts: FileParts | None) -> dict[str, int | str]:
    """Return the checksum of a file; those of its ``parts`` wait in the work folder."""
    if parts is None:
        return digest(work.out / name)
    found, checksums = digest_parts(parts)
    np.save(_waiting(work, name), checksums)
    sync(_waiting(work, name))
    return found


def write_checksums(work: WorkFolder, schema: Schema, splits: Splits) -> None:
    """Bring the checksums of all blocks into the order of the splits."""
    parts, done = [], dict.fromkeys(borders_of_stems(splits), 0)
    for split in SPLITS:
        days = [Day(**day) for day in splits[split]]
        for day, borders in zip(days, stem_borders(days, epoch_order.BLOCK_ROWS), strict=True):
            first, done[day.stem] = done[day.stem], done[day.stem] + len(borders) - 1
            names = stem_files(schema, day.stem)
            parts.append(np.stack([np.load(_waiting(work, name))[first : done[day.stem]] for name in names], 1))
    np.save(work.out / CHECKSUMS, np.concatenate(parts))
    sync(work.out / CHECKSUMS)


def _waiting(work: WorkFolder, name: str) -> Path:
    return work.staged / f"checksums_{name}"

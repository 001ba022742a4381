"""Tables of the public DLRM data sets, in the forms in which sharding papers use them.

The data set (facebookresearch/dlrm_datasets, embedding_bag) is a ``.pt`` file with three tensors: the ids of all
tables, one after the other; the offsets of their bags [T * B + 1]; the lengths of the bags [T, B]. A table has as many
rows as its largest id + 1, and looks up its bags' mean length. DreamShard (arXiv 2210.02023) and NeuroShard (arXiv
2305.01868) keep that as JSON: ``row``, ``pooling_factor``, in DreamShard ``index`` and ``dim`` as well.

Letters: T tables, B samples.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError

LEAST_POOLING_FACTOR: Final = 0.001
"""Ids per sample of a table whose bags are all empty, as some are; a planner needs more than none."""


def is_table_config(table: Any) -> bool:
    """Whether an entry of a JSON list is a table as DreamShard and NeuroShard describe it.

    Example:
        >>> is_table_config({"row": 100, "pooling_factor": 1.5, "bin_0": 0.9})
        True
    """
    return isinstance(table, dict) and "row" in table and "num_embeddings" not in table


def from_table_config(number: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a table to those of a list of tables; ``bin_*``, its ids by frequency, are left out.

    Example:
        >>> from_table_config(3, {"index": 7, "row": 100, "dim": 16, "pooling_factor": 0.0, "bin_0": 1.0})
        {'name': 't7', 'num_embeddings': 100, 'embedding_dim': 16, 'pooling_factor': 0.001}
    """
    pooling_factor = config.get("pooling_factor", 1.0)
    return {
        "name": f"t{config.get('index', number)}",
        "num_embeddings": config["row"],
        **({"embedding_dim": config["dim"]} if "dim" in config else {}),
        "pooling_factor": LEAST_POOLING_FACTOR if pooling_factor == 0 else pooling_factor,
        **{key: value for key, value in config.items() if not _known(key)},
    }


def _known(key: str) -> bool:
    return key in ("index", "row", "dim", "pooling_factor") or key.startswith("bin_")


def read_dlrm_tensors(path: Path) -> list[dict[str, Any]]:
    """Read rows and mean bag lengths out of a ``.pt`` file, which loads torch: tables without their widths."""
    import torch

    remedy = "name a file of dlrm_datasets/embedding_bag, which holds ids, offsets and lengths"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", where=path, remedy=remedy) from error
    except Exception as error:  # torch raises many kinds for what is not its file
        raise UserError("not a file of tensors", where=path, remedy=remedy) from error
    if not (isinstance(held, list | tuple) and len(held) == 3 and all(isinstance(each, torch.Tensor) for each in held)):
        raise UserError("does not hold three tensors", where=path, remedy=remedy)
    ids, offsets, lengths = held
    whole = all(not each.is_floating_point() for each in held)
    if not whole or lengths.dim() != 2 or ids.dim() != 1 or offsets.shape != (lengths.numel() + 1,):
        raise UserError(
            f"shapes {tuple(ids.shape)}, {tuple(offsets.shape)}, {tuple(lengths.shape)} are not those "
            "of ids, offsets [T * B + 1] and lengths [T, B]",
            where=path,
            remedy=remedy,
        )
    samples = lengths.shape[1]
    ends = offsets[::samples].tolist() if samples else [0]
    if not samples or ends[0] != 0 or ends[-1] != len(ids) or sorted(ends) != ends:
        raise UserError(f"its offsets do not divide its {len(ids):,} ids into tables", where=path, remedy=remedy)
    means = lengths.double().mean(dim=1).tolist()
    tables = []
    for number, (first, end) in enumerate(itertools.pairwise(ends)):
        rows = int(ids[first:end].max()) + 1 if end > first else 1
        if end > first and int(ids[first:end].min()) < 0:
            raise UserError(f"table {number} has a negative id", where=path, remedy=remedy)
        tables.append(from_table_config(number, {"row": rows, "pooling_factor": means[number]}))
    return tables

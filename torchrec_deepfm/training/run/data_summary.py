"""``data.json`` of a run: what it was trained on, in numbers."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from torchrec_deepfm.data.dataset.prepared import SPLITS, PreparedData
from torchrec_deepfm.training.run import folder as run_folder
from torchrec_deepfm.training.scoring.row_sample import sample_rows

_BLOCKS: Final = 64


def write_data_summary(folder: Path, data: PreparedData) -> dict[str, Any]:
    """Write ``data.json`` of a run: rows and clicks of each split, and the share of id 0 in a sample of each."""
    content = data_summary(data)
    run_folder.write_json(folder / run_folder.DATA, content)
    return content


def data_summary(data: PreparedData) -> dict[str, Any]:
    """Summarise prepared data; reads at most 65,536 rows of each split.

    Returns the content of ``data.json``: ``mode`` (``vocabulary``, ``hash``, ``foreign``), and by split ``rows``,
    ``positives`` (None if unknown), ``sampled`` rows, and the share of id 0 by categorical column, ``zero``. With a
    vocabulary, id 0 is that of rare and unseen values.
    """
    splits = {}
    for split in SPLITS:
        if not data.rows(split):
            continue
        days = data.days(split)
        known = [day.positives for day in days if day.positives is not None]
        zeros, counts = np.zeros(len(data.schema.categorical)), np.zeros(len(data.schema.categorical))
        sampled = 0
        for rows in sample_rows(data, split, _BLOCKS):
            sampled += len(rows.labels)
            for j, name in enumerate(data.schema.categorical):
                ids = rows.bags[name].ids if name in rows.bags else rows.sparse[:, data.schema.one_hot.index(name)]
                zeros[j] += np.count_nonzero(ids == 0)
                counts[j] += len(ids)
        shares = (zeros / np.maximum(counts, 1)).tolist()
        splits[split] = {
            "rows": data.rows(split),
            "positives": sum(known) if len(known) == len(days) else None,
            "sampled": sampled,
            "zero": dict(zip(data.schema.categorical, shares, strict=True)),
        }
    return {"format_version": 1, "mode": str(data.made.get("mode", "")), "splits": splits}

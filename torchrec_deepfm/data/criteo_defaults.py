"""Usual options of ``prepare`` for the published data sets."""

from dataclasses import dataclass
from typing import Final

# Rows of the 26 tables in MLPerf's DLRM: the values of each column, taken modulo 40 million where there are more.
# Source: mlcommons/training, recommendation/torchrec_dlrm, and the same list in FBGEMM's and TorchRec's benchmarks.
MLPERF_NUM_EMBEDDINGS: Final = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults of ``prepare`` for a named schema.

    ``min_count``: values seen less often in training become id 0; ``None`` uses the default of ``prepare``.
    """

    split: str | None = None
    num_embeddings: tuple[int, ...] | None = None
    min_count: int | None = None


_PRESETS: Final = {
    "criteo-terabyte": Preset(split="last-day", num_embeddings=MLPERF_NUM_EMBEDDINGS),
    # min_categr_count of BARS' configurations: 1 (DeepFM_criteo_x1, DeepFM_frappe_x1), 10 (DeepFM_criteo_x4_001).
    "criteo-x1": Preset(min_count=1),
    "criteo-x4": Preset(min_count=10),
    "frappe-x1": Preset(min_count=1),
}


def preset(schema: str) -> Preset:
    """Return the defaults for a schema.

    Returns the preset; an empty one for most.

    Example:
        >>> preset("criteo-terabyte").split
        'last-day'
    """
    return _PRESETS.get(schema, Preset())

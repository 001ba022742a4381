"""Usual options of ``prepare`` for the published data sets."""

from typing import Any, Final

# Rows of the 26 tables in MLPerf's DLRM: the values of each column, taken modulo 40 million where there are more.
# Source: mlcommons/training, recommendation/torchrec_dlrm, and the same list in FBGEMM's and TorchRec's benchmarks.
MLPERF_NUM_EMBEDDINGS: Final = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip


# min_categr_count of BARS' configurations: 1 (DeepFM_criteo_x1, DeepFM_frappe_x1), 10 (DeepFM_criteo_x4_001).
_MIN_COUNTS: Final = {"criteo-x1": 1, "criteo-x4": 10, "frappe-x1": 1}


def criteo_preset(schema: str, *, hash: bool, held_out: bool) -> dict[str, Any]:  # noqa: A002 (the option's name)
    """Return the options of ``prepare`` that are customary for a schema, by field of ``PrepareOptions``.

    ``schema`` is a name or a TOML file; ``held_out``: files are given for validation or test. Most schemas have none.

    Example:
        >>> criteo_preset("criteo-terabyte", hash=False, held_out=False)
        {'split': 'last-day'}
    """
    found: dict[str, Any] = {}
    if schema == "criteo-terabyte":
        found = {"num_embeddings": MLPERF_NUM_EMBEDDINGS} if hash else {}
        found |= {} if held_out else {"split": "last-day"}
    elif schema in _MIN_COUNTS and not hash:
        found = {"min_count": _MIN_COUNTS[schema]}
    return found

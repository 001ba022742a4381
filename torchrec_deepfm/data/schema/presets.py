"""The columns of published data sets."""

from typing import Final

from torchrec_deepfm.data.schema.column import Column
from torchrec_deepfm.data.schema.schema import Schema

_NUMERIC: Final = tuple(f"I{i}" for i in range(1, 14))
_CATEGORICAL: Final = tuple(f"C{i}" for i in range(1, 27))
_FRAPPE: Final = (
    "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city",
)  # fmt: skip


def _criteo() -> Schema:
    return Schema(label="label", numeric=_NUMERIC, categorical=_CATEGORICAL)


# Both publications have the same columns. They have separate names because their day files and splits differ.
CRITEO_KAGGLE = _criteo()
CRITEO_TERABYTE = _criteo()

# The benchmark data of BARS (reczoo/Datasets): CSV files with a header, as its configurations of FuxiCTR read them.
# Criteo_x1 is AFN's: the numbers are scaled, the categories numbered already.
CRITEO_X1 = Schema(
    label="label",
    numeric=_NUMERIC,
    categorical=_CATEGORICAL,
    layout="table",
    numeric_transform="none",
    columns={name: Column(type="integer") for name in _CATEGORICAL},
)
# Criteo_x4 has the challenge's raw values. FuxiCTR gives missing values the id of rare values.
CRITEO_X4 = Schema(
    label="Label",
    numeric=_NUMERIC,
    categorical=_CATEGORICAL,
    layout="table",
    numeric_transform="fuxictr",
    missing="rare",
    columns={name: Column(type="string") for name in _CATEGORICAL},
)
FRAPPE_X1 = Schema(
    label="label",
    numeric=(),
    categorical=_FRAPPE,
    layout="table",
    columns={name: Column(type="integer") for name in _FRAPPE},
)

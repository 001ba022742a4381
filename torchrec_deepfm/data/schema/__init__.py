"""The columns of a data set: built-in schemas, and those that a user writes as TOML. Standard library only."""

from torchrec_deepfm.data.schema.column import BUCKETS as BUCKETS
from torchrec_deepfm.data.schema.column import TRANSFORMS as TRANSFORMS
from torchrec_deepfm.data.schema.column import UNITS as UNITS
from torchrec_deepfm.data.schema.column import Column as Column
from torchrec_deepfm.data.schema.column import is_date as is_date
from torchrec_deepfm.data.schema.column import toml_key as toml_key
from torchrec_deepfm.data.schema.column import toml_text as toml_text
from torchrec_deepfm.data.schema.file import load_schema as load_schema
from torchrec_deepfm.data.schema.file import parse_schema as parse_schema
from torchrec_deepfm.data.schema.file import read_schema as read_schema
from torchrec_deepfm.data.schema.label_rule import LabelRule as LabelRule
from torchrec_deepfm.data.schema.presets import CRITEO_KAGGLE as CRITEO_KAGGLE
from torchrec_deepfm.data.schema.presets import CRITEO_TERABYTE as CRITEO_TERABYTE
from torchrec_deepfm.data.schema.presets import CRITEO_X1 as CRITEO_X1
from torchrec_deepfm.data.schema.presets import CRITEO_X4 as CRITEO_X4
from torchrec_deepfm.data.schema.presets import FRAPPE_X1 as FRAPPE_X1
from torchrec_deepfm.data.schema.schema import Schema as Schema
from torchrec_deepfm.data.schema.schema import dense_names as dense_names

"""Names of tables: torch takes them as modules, and no two features share one."""

from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from torchrec_deepfm.model.table_name import feature_of, table_name

NAMES = st.text(st.sampled_from("a.%2E5/ _é"), min_size=1, max_size=8)


@given(st.sets(NAMES, min_size=2, max_size=6))
@example({"user.id", "user_id", "user%2Eid", "user%252Eid", "%2E", "%252E"})
def test_every_column_has_a_table_of_its_own(features):
    tables = [table_name(feature) for feature in features]
    assert len(set(tables)) == len(features)
    assert [feature_of(table) for table in tables] == list(features)
    assert len(nn.ModuleDict({table: nn.Identity() for table in tables})) == len(features)


def test_names_of_saved_plans_and_checkpoints_stay():
    assert [table_name(name) for name in ("C1", "user id", "a/b", "100%")] == ["t_C1", "t_user id", "t_a/b", "t_100%"]
    assert feature_of("users") == "users"

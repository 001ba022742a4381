"""The one exception that a user is meant to read."""

import pickle

from torchrec_deepfm.errors import UserError


def test_its_line_is_made_of_its_fields_and_both_travel_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(UserError("not a number", where="a.csv, row 3", remedy="use a dot")))
    assert (error.what, error.where, error.remedy) == ("not a number", "a.csv, row 3", "use a dot")
    assert str(error) == "a.csv, row 3: not a number; use a dot"
    assert str(UserError("whole")) == "whole"

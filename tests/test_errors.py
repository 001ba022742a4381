"""The one exception that a user is meant to read."""

import ast
import pickle
import re
from pathlib import Path

from torchrec_deepfm.errors import UserError

ROOT = Path(__file__).parent.parent


def test_its_line_is_made_of_its_fields_and_both_travel_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(UserError("not a number", where="a.csv, row 3", remedy="use a dot")))
    assert (error.what, error.where, error.remedy) == ("not a number", "a.csv, row 3", "use a dot")
    assert str(error) == "a.csv, row 3: not a number; use a dot"
    assert error.args == (str(error),)  # which libraries show
    assert str(UserError("whole")) == "whole"


def test_a_caller_puts_its_place_before_the_error_s_own() -> None:
    inner = UserError("not a number", where="row 3", remedy="use a dot")
    assert str(inner.within("a.csv")) == "a.csv: row 3: not a number; use a dot"
    assert str(UserError("empty").within("a.csv")) == "a.csv: empty"
    assert inner.within("a.csv").remedy == "use a dot"


def test_place_and_remedy_are_fields_wherever_it_is_raised() -> None:
    mixed = []
    for file in sorted((ROOT / "torchrec_deepfm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="UserError"), args=[ast.Constant() | ast.JoinedStr() as what, *_]):
                    pieces = what.values if isinstance(what, ast.JoinedStr) else [what]
                    text = "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in pieces)
                    fields = {each.arg for each in node.keywords}
                    placed = not re.match(r"\{\}: |--[a-z-]+( \{\})?: ", text) or "where" in fields
                    if not placed or ("; " in text and "remedy" not in fields):
                        mixed.append(f"{file.name}:{node.lineno}: {text}")
    assert mixed == []

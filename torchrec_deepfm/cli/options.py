"""How options are read from dataclasses and shown by ``--help``."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.struct_rule
def _dataclass(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Read a dataclass as tyro does; its help is the docstring below each field, which may end in "Default: ...".

    Without that, and where the default is None or empty, the help names no default.
    """
    if not dataclasses.is_dataclass(info.type):
        return None
    hints, found = get_type_hints(info.type, include_extras=True), []
    for one in dataclasses.fields(info.type):
        default: Any = tyro.MISSING_NONPROP if one.default is dataclasses.MISSING else one.default
        if dataclasses.is_dataclass(info.default):
            default = getattr(info.default, one.name)
        shown = functools.partial(_default_text, info.type, one.name, one.metadata.get("default", default))
        kind, *marks = get_args(hints[one.name]) if hasattr(hints[one.name], "__metadata__") else [hints[one.name]]
        kind = next((mark.type for mark in marks if isinstance(mark, Unset)), kind)
        look = tyro.conf.arg(metavar=_metavar(kind), help_behavior_hint=shown)
        found.append(
            tyro.constructors.StructFieldSpec(
                name=one.name,
                type=Annotated[(kind, look, *marks)],  # type: ignore[arg-type]
                default=default,
                helptext=functools.partial(_help_text, info.type, one.name),
            )
        )
    return tyro.constructors.StructConstructorSpec(instantiate=info.type, fields=tuple(found))


class Unset:
    """Annotates an attribute that holds the fields of ``group``, None where they are not given."""

    def __init__(self, group: type) -> None:
        hints = get_type_hints(group, include_extras=True)
        fields = [
            (one.name, hints[one.name] | None, dataclasses.field(default=None, metadata={"default": one.default}))
            for one in dataclasses.fields(group)
        ]
        self.type = dataclasses.make_dataclass(
            group.__name__, fields, bases=(group,), namespace={"__doc__": group.__doc__}, frozen=True, kw_only=True
        )


def given(group: Any) -> dict[str, Any]:
    """Return the values that are given of an ``Unset`` group."""
    return {
        one.name: getattr(group, one.name) for one in dataclasses.fields(group) if getattr(group, one.name) is not None
    }


def _metavar(kind: Any) -> str | None:
    """Write the value of an option that takes several; tyro's own word suits the others."""
    if get_origin(kind) is types.UnionType:
        kind = get_args(kind)[0]
    if get_origin(kind) is not tuple:
        return None
    one = get_args(kind)[0]
    if get_origin(one) is Literal:
        return f"[{{{','.join(get_args(one))}}} ...]"
    return f"[{one.__name__.upper()} ...]" if isinstance(one, type) else None


def _help_text(options: type, name: str) -> str:
    return re.sub(r" ?Default: .*\.$", "", _docstrings(options).get(name, ""))


def _default_text(options: type, name: str, default: Any, _label: str) -> str:
    written = re.search(r"Default: (.*)\.$", _docstrings(options).get(name, ""))
    if written:
        return f"(default: {written[1]})"
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"(default: {'yes' if default else 'no'})"
    return f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


@functools.cache
def _docstrings(options: type) -> Mapping[str, str]:
    """Return the string below each field of a class and its bases, on one line."""
    found: dict[str, str] = {}
    for one in reversed(options.__mro__[:-1]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        except OSError:  # made by ``Unset``
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                assert isinstance(text.value, ast.Constant)
                found[field.target.id] = " ".join(str(text.value.value).split()).replace("``", "")
    return found

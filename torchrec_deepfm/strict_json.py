"""Values of JSON and TOML files, checked against dataclasses whose fields declare types and ranges (``msgspec``)."""

import json
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from torchrec_deepfm.errors import UserError, one_of, shown

T = TypeVar("T")
_TYPES: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "object": "a table of keys",
    "array": "a list",
}


def parse_json(text: str, *, where: str, remedy: str) -> Any:
    """Parse JSON strictly: NaN, a key given twice, and text that can't be printed are errors."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise UserError("damaged (nested too deeply)", where=where, remedy=remedy) from error
    except ValueError as error:
        raise UserError(f"damaged ({error})", where=where, remedy=remedy) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in one object")
    for key, value in pairs:
        for text in (key, value):
            if isinstance(text, str) and not " ".join(text.split()).isprintable():
                raise ValueError(f"key {key!a}: {text!a} can't be printed")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid number")


def as_type(raw: Any, wanted: type[T], *, where: str, remedy: str) -> T:
    """Check plain values against a dataclass, and the dataclasses inside it.

    Returns an instance of the dataclass.

    Example:
        >>> from torchrec_deepfm.sharding.inputs.tables import Table
        >>> as_type({"name": "t", "num_embeddings": 0, "embedding_dim": 4}, Table, where="a.json", remedy="correct it")
        Traceback (most recent call last):
        torchrec_deepfm.errors.UserError: a.json: num_embeddings: expected a whole number >= 1, not 0; correct it
    """
    try:
        found = msgspec.convert(raw, wanted)
    except msgspec.ValidationError as error:
        raise UserError(_explain(str(error), raw, wanted), where=where, remedy=remedy) from error
    _refuse_unknown(raw, found, where)
    return found


def _explain(message: str, raw: Any, wanted: Any) -> str:
    """Rewrite a message such as "Expected `int` >= 1 - at `$.tables[1].rows`" for a reader of the file."""
    what, _, path = message.partition(" - at `")
    place, value, types = "", raw, wanted
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if name:
            types = get_type_hints(types, include_extras=True)[name]
        else:  # a sequence, or a mapping whose keys msgspec does not name
            *_, types = (each for each in get_args(_plain(types)) if each is not Ellipsis)
        if index == "...":
            name, value = next((key, each) for key, each in value.items() if not _fits(each, types))
        else:
            value = value[name] if name else value[int(index)]
        if isinstance(types, UnionType):
            types = next((each for each in get_args(types) if is_dataclass(each)), types)
        place += f".{name}" if name else f"[{index}]"
        if not name and isinstance(value, dict) and str(value.get("name", "")).isprintable():
            place += f" ({value['name']})" if value.get("name") else ""
    place = f"{place.lstrip('.')}: " if place else ""
    if what.startswith("Object missing required field"):
        missing = [each.name for each in fields(types) if each.name not in value and _is_required(each)]
        unknown = sorted(value.keys() - {each.name for each in fields(types)})
        more = f", unknown {', '.join(map(shown, unknown))}" if unknown else ""
        return f"{place}missing {', '.join(missing)}{more}"
    if wrong := re.fullmatch(r"Invalid enum value (.*)", what):
        choices = get_args(get_args(_plain(types))[0] if path.startswith("key") else types)
        return f"{place}{wrong[1]} is not valid; choose {one_of(choices, wrong[1].strip(chr(39)))}"
    if what == "Number out of range":
        return f"{place}{shown(value)} is out of range"
    if what.startswith("Expected"):
        expected = re.sub(r"`([^`]*)`", lambda found: _words(found[1]), what.partition(", got")[0])
        return f"{place}{expected[0].lower()}{expected[1:]}, not {shown(value)}"
    return place + what  # of a dataclass's own check


def _plain(types: Any) -> Any:
    return get_args(types)[0] if get_origin(types) is Annotated else types


def _is_required(key: "Field[Any]") -> bool:
    return key.default is MISSING and key.default_factory is MISSING


def _fits(value: Any, types: Any) -> bool:
    try:
        msgspec.convert(value, types)
    except msgspec.ValidationError:
        return False
    return True


def _words(types: str) -> str:
    return " or ".join(_TYPES.get(each, each) for each in types.split(" | "))


def _refuse_unknown(raw: Any, found: Any, where: str, place: str = "") -> None:
    if isinstance(raw, dict) and is_dataclass(found):
        known = [each.name for each in fields(found)]
        for key, value in raw.items():
            if key not in known:
                what = f"unknown key {key!r}; choose {one_of(known, key)}"
                raise UserError(f"{place.lstrip('.')}{': ' if place else ''}{what}", where=where)
            _refuse_unknown(value, getattr(found, key), where, f"{place}.{key}")
    elif isinstance(raw, list) and isinstance(found, tuple):
        for number, (value, each) in enumerate(zip(raw, found, strict=True)):
            _refuse_unknown(value, each, where, f"{place}[{number}]")

"""Hardware as a preset's name or a TOML file. Standard library only.

A description of your own is a TOML file; whatever it leaves out comes from its ``base``:

    name = "our cluster"
    base = "h100"                        # a preset, or leave it out and give every key
    hbm_bytes = "80 GiB"                 # a number of bytes, or a text with a unit
    inter_host_bandwidth = "25 GB/s"     # bytes per second, or a text with a unit

    [extra]                              # what bandwidths do not say, in milliseconds (see EXTRA)
    shard_ms = 0.01
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.hardware import BANDWIDTHS, CAPACITIES, Hardware, choices
from torchrec_deepfm.sharding.presets import PRESETS, preset
from torchrec_deepfm.small_file import parse_toml, read_text, write_text

_MAX_TOML_BYTES: Final = 1 << 20
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(?:([kKMGTP])(i?))?(?:B(/s)?)?\s*")


def read_hardware(name_or_toml: str) -> Hardware:
    """Find a preset, or read a description from a TOML file.

    Args:
        name_or_toml: The name of a preset, or a file's path (``.toml``).

    Returns:
        The description.

    Raises:
        UserError: There is no such preset or file, or the file is no description.

    Example:
        >>> read_hardware("h200").hbm_bytes // 2**30
        141
    """
    if not isinstance(name_or_toml, str) or not name_or_toml:
        raise UserError(f"hardware {name_or_toml!r}: name a preset, or a TOML file; choose from {', '.join(PRESETS)}")
    if name_or_toml.lower() in PRESETS:
        return preset(name_or_toml)
    path = Path(name_or_toml)
    if path.suffix != ".toml" and os.sep not in name_or_toml and not path.is_file():
        return preset(name_or_toml)
    instead = f"name a TOML file, or a preset: {', '.join(PRESETS)}"
    text = read_text(path, most=_MAX_TOML_BYTES, what="description of hardware", instead=instead)
    value = parse_toml(path, text)
    if not value:
        raise UserError(f"{path}: empty; give name, base and what differs, or all keys")
    try:
        return _described({"name": path.stem, **value})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Write a description as a TOML file that ``read_hardware`` reads back equal.

    Args:
        hardware: The description.
        path: The file; one that is there is replaced.

    Raises:
        UserError: The file can't be written.
    """
    lines = [
        f"{each.name} = {_toml(getattr(hardware, each.name))}"
        for each in fields(hardware)
        if each.name != "extra" and getattr(hardware, each.name) is not None
    ]
    if hardware.extra:
        lines += ["", "[extra]", *(f"{key} = {_toml(cost)}" for key, cost in hardware.extra.items())]
    write_text(path, "\n".join(lines) + "\n", what="description")


def _described(value: Mapping[str, Any]) -> Hardware:
    """What a file's keys say: those left out come from the base, amounts may be texts."""
    known = tuple(each.name for each in fields(Hardware))
    for key in value:
        if key not in (*known, "base"):
            raise UserError(f"{key}: there is no such key; choose from {choices(key, (*known, 'base'))}")
    given = {key: each for key, each in value.items() if key != "base"}
    if "base" in value:
        base = preset(value["base"])
        if "source" not in given:
            given["source"] = f"{base.name} ({base.source}), and the user's own figures"
        given = {**base.to_json(), **given}
    given.setdefault("extra", {})
    given.setdefault("source", "the user's own figures")
    if given.get("compute_device") == "cpu":  # neither is ever used there
        given.setdefault("hbm_bytes", None)
        given.setdefault("hbm_bandwidth", given.get("ddr_bandwidth"))
        given.setdefault("hbm_to_ddr_bandwidth", given.get("ddr_bandwidth"))
    missing = [key for key in known if key not in given]
    if missing:
        raise UserError(f'{", ".join(missing)}: missing; add what is missing, or name a preset: base = "h100"')
    for key in CAPACITIES:
        if isinstance(given[key], str):
            given[key] = round(_quantity(key, given[key], "80 GiB"))
    for key in BANDWIDTHS:
        if isinstance(given[key], str):
            given[key] = _quantity(key, given[key], "450 GB/s")
    return Hardware(**given)


def _toml(value: str | float) -> str:
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quantity(key: str, text: str, like: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[4] is not None) != like.endswith("/s"):
        raise UserError(f"{key}: {text!r} is no amount; write it as {like!r}")
    prefix = match[2]
    power = "KMGTP".index(prefix.upper()) + 1 if prefix else 0
    amount = float(match[1]) * float(1024 if match[3] else 1000) ** power
    if amount == math.inf:
        raise UserError(f"{key}: {text!r} is more than there is; write it as {like!r}")
    return amount

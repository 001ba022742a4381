"""Hardware as a preset's name or a TOML file. Loads no torch.

A description of your own is a TOML file; whatever it leaves out comes from its ``base``:

    name = "our cluster"
    base = "h100"                        # a preset, or leave it out and give every key
    hbm_bytes = "80 GiB"                 # a number of bytes, or a text with a unit
    inter_host_bandwidth = "25 GB/s"     # bytes per second, or a text with a unit

    [extra]                              # what bandwidths do not say, in milliseconds (see EXTRA)
    shard_ms = 0.01
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from torchrec_deepfm.data.schema import toml_text
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import parse_toml, read_text, write_text
from torchrec_deepfm.sharding.inputs.hardware import BANDWIDTHS, CAPACITIES, Hardware
from torchrec_deepfm.sharding.inputs.presets import PRESETS, hardware_preset
from torchrec_deepfm.strict_json import as_type
from torchrec_deepfm.units import parse_quantity

_MAX_TOML_BYTES: Final = 1 << 20
_REMEDY: Final = 'correct it, or take the rest from a preset: base = "h100"'


def read_hardware(name_or_toml: str) -> Hardware:
    """Find a preset, or read a description from a TOML file.

    Args:
        name_or_toml: The name of a preset, or a file's path (``.toml``).

    Raises:
        UserError: The preset or file does not exist, or the file does not describe hardware.

    Example:
        >>> read_hardware("h200").hbm_bytes // 2**30
        141
    """
    path = Path(name_or_toml)
    if not name_or_toml or name_or_toml.lower() in PRESETS:
        return hardware_preset(name_or_toml)
    if path.suffix != ".toml" and os.sep not in name_or_toml and not path.is_file():
        return hardware_preset(name_or_toml)
    instead = f"name a TOML file, or a preset: {', '.join(PRESETS)}"
    given = parse_toml(path, read_text(path, most=_MAX_TOML_BYTES, what="description of hardware", instead=instead))
    if not given:
        raise UserError("empty", where=path, remedy="give name, base and what differs, or all keys")
    try:
        completed = _completed({"name": path.stem, **given})
    except UserError as error:
        raise error.within(path) from error
    return as_type(completed, Hardware, where=str(path), remedy=_REMEDY)


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Write a description as a TOML file that ``read_hardware`` reads back equal; an existing one is replaced."""
    lines = [
        f"{each.name} = {toml_text(getattr(hardware, each.name))}"
        for each in fields(hardware)
        if each.name != "extra" and getattr(hardware, each.name) is not None
    ]
    if hardware.extra:
        lines += ["", "[extra]", *(f"{key} = {toml_text(cost)}" for key, cost in hardware.extra.items())]
    write_text(path, "\n".join(lines) + "\n", what="description")


def _completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the base has, and turn amounts with units into numbers."""
    found = {"source": "the user's own figures", "extra": {}, **given}
    if "base" in found:
        base = hardware_preset(found.pop("base"))
        mixed = f"{base.name} ({base.source}), and the user's own figures"
        found = {**base.to_json(), "source": mixed, **{key: given[key] for key in given if key != "base"}}
    if found.get("compute_device") == "cpu":  # none of these is used there
        found.setdefault("hbm_bytes", None)
        if "ddr_bandwidth" in found:
            found = {**dict.fromkeys(("hbm_bandwidth", "hbm_to_ddr_bandwidth"), found["ddr_bandwidth"]), **found}
    for keys, like in ((CAPACITIES, "80 GiB"), (BANDWIDTHS, "450 GB/s")):
        for key in keys:
            if isinstance(text := found.get(key), str):
                amount = parse_quantity(f"{key}:", text, like=like)
                found[key] = round(amount) if keys is CAPACITIES else amount
    return found

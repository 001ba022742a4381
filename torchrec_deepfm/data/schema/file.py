"""Reads a schema that a user wrote as TOML, or finds a built-in one."""

from pathlib import Path
from typing import Final

from torchrec_deepfm.data.schema import presets
from torchrec_deepfm.data.schema.schema import Schema, build_schema
from torchrec_deepfm.errors import UserError, did_you_mean
from torchrec_deepfm.files import parse_toml, read_text

# A larger file was named by mistake: most likely a data file.
_MAX_TOML_BYTES: Final = 1 << 20
_NAMED = {
    "criteo-kaggle": presets.CRITEO_KAGGLE,
    "criteo-terabyte": presets.CRITEO_TERABYTE,
    "criteo-x1": presets.CRITEO_X1,
    "criteo-x4": presets.CRITEO_X4,
    "frappe-x1": presets.FRAPPE_X1,
}


def read_schema(path: Path | str) -> Schema:
    """Read a schema that a user wrote as TOML; ``docs/tables.md`` lists its keys.

    Args:
        path: A TOML file of at most 1 MiB.

    Returns:
        The schema; its layout is ``table`` unless the file sets another.

    Raises:
        UserError: The file can't be read, is not TOML, or is not a valid schema. The message names file and key.
    """
    path = Path(path)
    text = read_text(path, most=_MAX_TOML_BYTES, what="schema", instead="name a TOML file, or write one: schema infer")
    return parse_schema(text, path)


def parse_schema(text: str, where: Path) -> Schema:
    """Read the content of a schema's file; ``where`` names it in messages."""
    value = parse_toml(where, text)
    try:
        return build_schema(value, layout="table")
    except UserError as error:
        inside = error.where.removeprefix("schema")
        raise UserError(error.what, where=f"{where}{inside}", remedy=error.remedy) from error


def load_schema(name_or_path: str) -> Schema:
    """Return a built-in schema, or read a ``.toml`` file.

    Args:
        name_or_path: ``criteo-kaggle``, ``criteo-terabyte``, ``criteo-x1``, ``criteo-x4`` or ``frappe-x1``, or the path
            of a TOML file.

    Returns:
        The schema.

    Raises:
        UserError: The schema or file does not exist, or the file is not a valid schema.

    Example:
        >>> load_schema("criteo-terabyte") is presets.CRITEO_TERABYTE
        True
    """
    if name_or_path in _NAMED:
        return _NAMED[name_or_path]
    if name_or_path.lower().endswith(".toml"):
        return read_schema(name_or_path)
    hint = did_you_mean(name_or_path, _NAMED)
    raise UserError(
        f"unknown schema {name_or_path!r}",
        where="--schema",
        remedy=f"choose one of {', '.join(_NAMED)}, or name a .toml file{hint}",
    )

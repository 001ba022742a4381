"""Amounts as people write and read them: bytes. Standard library only."""

import re

from torchrec_deepfm.errors import UserError

_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """Write an amount of memory with one decimal, in powers of 1024.

    Args:
        count: bytes.

    Returns:
        The amount with its unit.

    Example:
        >>> format_bytes(2048), format_bytes(5 * 2**30)
        ('2.0 KiB', '5.0 GiB')
    """
    for prefix in _PREFIXES[:-1]:
        if count < 1024:
            return f"{count:,.1f} {prefix}"
        count /= 1024
    return f"{count:,.1f} {_PREFIXES[-1]}"


def parse_bytes(option: str, text: str) -> int:
    """Read an amount of memory.

    Args:
        option: the option's name, for the message.
        text: such as ``2GiB``, ``1500MB`` or plain bytes.

    Returns:
        Bytes.

    Raises:
        UserError: the text is not an amount of memory.

    Example:
        >>> parse_bytes("--memory", "1.5 GiB")
        1610612736
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"{option} {text}: not an amount of memory; write it as 2GiB or 1500MB")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)

"""Amounts as people write and read them: bytes. Standard library only."""

import math
import re

from torchrec_deepfm.errors import UserError

_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """Write an amount of memory with one decimal, in powers of 1024.

    ``count``: bytes. Returns the amount with its unit.

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

    ``text``: such as ``2GiB``, ``1500MB`` or plain bytes.

    Example:
        >>> parse_bytes("--memory", "1.5 GiB")
        1610612736
    """
    return int(parse_quantity(option, text, like="2GiB or 1500MB"))


def parse_quantity(option: str, text: str, *, like: str) -> float:
    """Read an amount of memory or a bandwidth.

    ``text``: the amount with its unit, or plain bytes. ``like``: an example for the message; one that ends in ``/s``
    stands for a bandwidth. Returns bytes, or bytes per second.

    Example:
        >>> parse_quantity("inter_host_bandwidth:", "12.5 GB/s", like="450 GB/s")
        12500000000.0
    """
    rate = like.endswith("/s")
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:E[+-]?[0-9]+)?) *(?:([KMGTP])(i?))?(?:B(/s)?)?", text.strip(), re.I)
    number, prefix, binary, per_second = match.groups() if match else ("inf", None, None, "/s")
    power = "KMGTP".index(prefix.upper()) + 1 if prefix else 0
    amount = float(number) * float(1024 if binary else 1000) ** power
    if math.isinf(amount) or (per_second is not None) != rate:
        raise UserError(
            f"not {'a bandwidth' if rate else 'an amount of memory'}",
            where=f"{option} {text}",
            remedy=f"write it as {like}",
        )
    return amount

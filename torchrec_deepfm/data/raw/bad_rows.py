"""Rows of a table that cannot be used: refused in one line, or left out and listed."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchrec_deepfm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A bad row that was left out; ``place`` counts all rows of its piece from 0, bad ones included."""

    line: int
    reason: str
    place: int = 0


def refuse_or_list(
    faults: Mapping[int, str], *, first: int, path: str, skip_bad: bool = False, before: int = 0
) -> list[Skipped]:
    """List the bad rows in their order; unless they are to be skipped, the first one is a ``UserError``.

    ``faults``: what is wrong with a row, by its place. ``first``: the row number at place 0. ``before``: rows of the
    piece before place 0.
    """
    if faults and not skip_bad:
        place = min(faults)
        raise UserError(f"row {first + place}, {faults[place]}", where=path, remedy="repair or remove the row")
    return [Skipped(line=first + place, reason=faults[place], place=before + place) for place in sorted(faults)]

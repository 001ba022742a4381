"""Markdown tables, sizes, ranges and versions, as the benchmarks print them."""

import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata

MIB, GIB = 1 << 20, 1 << 30


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]] = ()) -> str:
    """Lay out a Markdown table.

    Example:
        >>> print(markdown(["rows", "s"], [[1000, 2]]))
        | rows | s |
        | --- | --- |
        | 1000 | 2 |
    """
    return "\n".join(markdown_row(cells) for cells in (head, ["---"] * len(head), *rows))


def markdown_row(cells: Sequence[object]) -> str:
    """Lay out one row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Format the median with the range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def size(amount: float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of installed packages."""
    return {"Python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def versions_line(found: dict[str, str]) -> str:
    """Format versions as one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items())

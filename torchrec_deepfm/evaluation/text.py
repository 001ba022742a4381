"""The result of ``evaluate`` in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("auc", "logloss", "ne", "calibration")


def evaluation_text(result: Mapping[str, Any]) -> str:
    """Format what ``evaluate_run`` returns: the rows and their slices, the metrics by user, the best reachable AUC."""
    name = str(result["data"].get("split", "input"))
    parts: list[tuple[str, Mapping[str, Any]]] = [(name, result)]
    for column, found in result.get("slices", {}).items():
        parts += [(_slice_name(column, one), one) for one in found]
    lines = _table(parts, _COLUMNS, lambda one: one, "rows")
    if "by_user" in result:
        names = tuple(result["by_user"])
        lines += ["", *_table(parts, names, lambda one: one["by_user"], "users")]
        if result["rows_without_user"]:
            lines.append(f"left out there: {result['rows_without_user']:,} rows without a user")
    if "lift" in result:
        lines.append(
            f"best reachable {name} AUC {result['best_reachable_auc']:.5f}: "
            f"{result['lift']:.1%} of the best possible lift"
        )
    return "\n".join([*lines, f"wrote {result['file']}"])


def _slice_name(column: str, one: Mapping[str, Any]) -> str:
    if "others" in one:
        return f"{column}: {one['others']} others"
    return f"{column}={'(missing)' if one['value'] is None else one['value']}"


def _table(
    parts: Sequence[tuple[str, Mapping[str, Any]]],
    columns: Sequence[str],
    of: Any,
    count: str,
) -> list[str]:
    """A head, and per part its figures, their interval, and the other run's and their difference if there is one."""
    rows: list[tuple[str, list[str]]] = [("", [*columns, count])]
    for name, one in parts:
        rows.append((name, [*(_number(of(one)[column]) for column in columns), f"{one[count]:,}"]))
        rows += _borders(one.get("intervals"), columns)
        other = one.get("compare")
        if other is not None:
            rows.append(("  the other run", [_number(other["metrics"][column]) for column in columns]))
            rows.append(("  difference", [_signed(other["difference"][column]) for column in columns]))
            rows += _borders(other.get("intervals"), columns, sign="+")
    width = max(12, *(len(name) + 1 for name, _ in rows))
    wide = max(13, *(len(column) + 2 for column in columns))
    return [f"{name:<{width}}" + "".join(f"{text:>{wide}}" for text in shown) for name, shown in rows]


def _borders(
    intervals: Mapping[str, Sequence[float] | None] | None, columns: Sequence[str], sign: str = ""
) -> list[tuple[str, list[str]]]:
    if intervals is None:
        return []
    show = _signed if sign else _number
    borders = [intervals.get(column) for column in columns]
    return [
        (f"    {word}", [show(None if border is None else border[i]) for border in borders])
        for i, word in enumerate(("from", "to"))
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.5f}"

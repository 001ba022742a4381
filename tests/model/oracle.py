"""The equation of arXiv 1703.04247 in plain Python floats, term by term, over all pairs.

Nothing of the package is in it.

A bag is a list of (id, weight). A table is a list of rows of floats, [v (k) | w | ...].
"""

import math

Bag = list[tuple[int, float]]


def field_of_bag(table: list[list[float]], bag: Bag, k: int) -> tuple[list[float], float]:
    """Sum of weight * [v | w] over a bag."""
    v = [math.fsum(weight * table[i][column] for i, weight in bag) for column in range(k)]
    w = math.fsum(weight * table[i][k] for i, weight in bag)
    return v, w


def field_of_number(row: list[float], x: float, k: int) -> tuple[list[float], float]:
    """x * [v | w]."""
    return [x * row[column] for column in range(k)], x * row[k]


def first_order(fields: list[tuple[list[float], float]]) -> float:
    return math.fsum(w for _, w in fields)


def second_order(fields: list[tuple[list[float], float]]) -> float:
    """Sum over i < j of <v_i, v_j>, pair by pair."""
    total = []
    for i in range(len(fields)):
        for j in range(i + 1, len(fields)):
            total.extend(a * b for a, b in zip(fields[i][0], fields[j][0], strict=True))
    return math.fsum(total)


def mlp(fields: list[tuple[list[float], float]], layers: list[tuple[list[list[float]], list[float] | None]]) -> float:
    """ReLU between the layers, none after the last; a layer is (weight [out][in], bias [out] or None)."""
    x = [value for v, _ in fields for value in v]
    for number, (weight, bias) in enumerate(layers):
        y = []
        for unit, row in enumerate(weight):
            total = math.fsum(a * b for a, b in zip(row, x, strict=True)) + (bias[unit] if bias is not None else 0.0)
            y.append(total if number == len(layers) - 1 else max(total, 0.0))
        x = y
    return x[0]

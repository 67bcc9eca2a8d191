"""Fronts that are kept as points arrive, against the definition written out."""

import random
from collections.abc import Sequence

import pytest

from orchestrator.pareto.sorting import Fronts

Points = list[tuple[float, ...]]


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def standing_of_last(points: Points) -> tuple[int, int, int]:
    """Return (points on better fronts, size of its front, position in farthest-point order) of the last point."""
    left, newcomer, num_before = list(range(len(points))), len(points) - 1, 0
    while newcomer not in (front := [i for i in left if not any(dominates(points[j], points[i]) for j in left)]):
        num_before += len(front)
        left = [i for i in left if i not in front]
    return num_before, len(front), farthest_point_order(points, front).index(newcomer)


def farthest_point_order(points: Points, front: list[int]) -> list[int]:
    spans = [(max(column) - min(column)) or 1.0 for column in zip(*points, strict=True)]

    def squared(i: int, j: int) -> float:
        return sum(((a - b) / span) ** 2 for a, b, span in zip(points[i], points[j], spans, strict=True))

    order = [min(front, key=lambda i: (points[i][0], i))]
    while len(order) < len(front):
        left = [i for i in front if i not in order]
        order.append(max(left, key=lambda i: (min(squared(i, j) for j in order), -i)))
    return order


def draw_points(kind: str, num_objectives: int, num: int, seed: int) -> Points:
    draw = random.Random(seed)
    if kind == "grid":  # full of equal points and equal distances
        return [tuple(float(draw.randrange(5)) for _ in range(num_objectives)) for _ in range(num)]
    if kind == "one front":
        return [(t := draw.random(), -t, t * t, 1 - t)[:num_objectives] for _ in range(num)]
    if kind == "one line":  # every point a front of its own
        return [(draw.random(),) * num_objectives for _ in range(num)]
    return [tuple(draw.random() for _ in range(num_objectives)) for _ in range(num)]


@pytest.mark.parametrize("kind", ["uniform", "grid", "one front", "one line"])
@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_each_newcomer_is_where_the_definition_puts_it(kind: str, num_objectives: int) -> None:
    for seed in range(2):
        fronts = Fronts(num_objectives)
        points = draw_points(kind, num_objectives, 20, seed)
        for num in range(1, len(points) + 1):
            front = fronts.add(points[num - 1])
            num_before, front_size, position = standing_of_last(points[:num])
            assert (fronts.num_before(front), fronts.num_before(front + 1)) == (num_before, num_before + front_size)
            firsts = [fronts.is_among_first(count) for count in range(1, front_size + 1)]
            assert firsts == [position < count for count in range(1, front_size + 1)]

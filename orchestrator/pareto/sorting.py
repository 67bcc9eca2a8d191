"""The non-dominated fronts of a growing set of points, kept as points arrive; smaller is better in every objective.

A scheduler asks after each point where it stands among 100,000 others, so nothing is sorted anew. PairFronts is for two
objectives, where a front is a line and a newcomer moves one stretch of it to the next front: Yakupov and Buzdalov,
"Incremental non-dominated sorting with O(N) insertion for the two-dimensional case", CEC 2015. ManyFronts compares
points with NumPy, for three objectives and more.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Point = tuple[float, float, int]
"""Two losses and the order of arrival."""


class Fronts(Protocol):
    """A set of points, sorted into fronts. Equal points share a front."""

    def add(self, losses: Sequence[float]) -> int:
        """Add a point and return the index of its front; 0 is the non-dominated one."""

    def num_before(self, front: int) -> int:
        """Return the number of points on better fronts."""

    def is_among_first(self, num: int) -> bool:
        """Return whether the point added last is one of the first num of its front, num > 0.

        The order is farthest-point: the best in the first objective, then always the point farthest from those already
        taken, the earlier one of equals; every objective is scaled to [0, 1] over all points. It spreads what it takes.
        """


class PairFronts:
    """Fronts in two objectives; with one, the other is 0 for all. A point takes O(fronts) at worst, in 100,000 random
    points some hundred short steps."""

    def __init__(self) -> None:
        self._fronts: list[list[Point]] = []  # each by the first loss, rising; hence the second falls
        self._scale = _Scale(2)
        self._num = 0
        self._last: tuple[list[Point], Point] | None = None

    def add(self, losses: Sequence[float]) -> int:
        """Add a point and return the index of its front; 0 is the non-dominated one."""
        x, y = losses if len(losses) == 2 else (losses[0], 0.0)
        point = (x, y, self._num)
        self._num += 1
        self._scale.add((x, y))
        level = bisect_left(range(len(self._fronts)), True, key=lambda i: not _dominates_one(self._fronts[i], point))
        self._insert(point, level)
        front = self._fronts[level]
        self._last = front, point
        return level

    def num_before(self, front: int) -> int:
        """Return the number of points on better fronts."""
        return sum(map(len, self._fronts[:front]))

    def is_among_first(self, num: int) -> bool:
        """Return whether the point added last is one of the first num of its front; see Fronts."""
        assert self._last is not None
        front, point = self._last
        return num >= len(front) or _FarthestPoints(front, self._scale).is_among_first(bisect_left(front, point), num)

    def _insert(self, point: Point, level: int) -> None:
        """Put the point on its front; what it dominates there moves to the next front, and so on."""
        moved = [point]
        for index in range(level, len(self._fronts)):
            front = self._fronts[index]
            start, end = _dominated_stretch(front, moved)
            if end - start == len(front):  # the whole front moves, hence each one behind it
                self._fronts.insert(index, moved)
                return
            front[start:end], moved = moved, front[start:end]
            if not moved:
                return
        self._fronts.append(moved)


def _dominates_one(front: list[Point], point: Point) -> bool:
    """Return whether some point of the front dominates the point."""
    x, y, _ = point
    index = bisect_right(front, (x, math.inf, 0)) - 1  # of those not to the right, the last has the smallest y
    if index < 0:
        return False
    best_x, best_y, _ = front[index]
    return best_y <= y and (best_x < x or best_y < y)


def _dominated_stretch(front: list[Point], moved: list[Point]) -> tuple[int, int]:
    """Return the start and the end of the stretch of the front that the moved points dominate, and that they replace.

    moved: a newcomer that the front does not dominate, or points that dominate others of the front before this one.
    """
    start = bisect_left(front, moved[0])
    if start and front[start - 1][:2] == moved[0][:2]:  # equal points dominate the same: nothing is left to move
        return start, start
    return start, max(start, bisect_right(front, -moved[-1][1], key=lambda point: -point[1]))


class _FarthestPoints:
    """The farthest-point order along a front in two objectives.

    Both losses change in one direction along the front, so the taken point that is nearest to another is one of its two
    neighbours, and the next point of a gap is where the distances to both ends cross. A gap inside another one has a
    smaller distance: a point comes before another exactly if its distance, when it was taken, is larger.
    """

    def __init__(self, front: list[Point], scale: "_Scale") -> None:
        self._front = front
        self._x_span, self._y_span = scale.spans

    def is_among_first(self, place: int, num: int) -> bool:
        """Return whether the point at this place of the line, the last to arrive, is one of the first num."""
        last = bisect_left(self._front, self._front[-1][:2])  # the first to arrive of those at the end
        if place == 0:
            return True
        if self._front[place][:2] == self._front[place - 1][:2]:
            return False  # the same as one that is taken: it comes last of all
        if place == last:
            return num >= 2
        gaps, num_taken, left, right = [], 2, 0, last
        distance, best = self._best(left, right)
        while best != place:
            num_taken += 1
            if best < place:
                gaps.append((left, best))
                left = best
            else:
                gaps.append((best, right))
                right = best
            distance, best = self._best(left, right)
        return self._has_fewer(gaps, distance, num - num_taken)

    def _has_fewer(self, gaps: list[tuple[int, int]], distance: float, num: int) -> bool:
        """Return whether fewer than num points in the gaps are taken before one at this distance."""
        while gaps and num > 0:
            left, right = gaps.pop()
            if right - left < 2:
                continue
            gap_distance, best = self._best(left, right)
            if gap_distance >= distance:
                num -= 1
                gaps += (left, best), (best, right)
        return num > 0

    def _best(self, left: int, right: int) -> tuple[float, int]:
        """Return the largest distance to the ends of the gap, and whose it is. right - left > 1."""
        nearer_right = bisect_left(range(left + 1, right), True, key=lambda i: self._is_nearer_right(i, left, right))
        after = left + 1 + nearer_right
        candidates = []
        if after - 1 > left:
            candidates.append((self._squared(after - 1, left), -self._front[after - 1][2], after - 1))
        if after < right:
            candidates.append((self._squared(after, right), -self._front[after][2], after))
        distance, _, best = max(candidates)
        return distance, best

    def _is_nearer_right(self, index: int, left: int, right: int) -> bool:
        return self._squared(index, right) <= self._squared(index, left)

    def _squared(self, first: int, second: int) -> float:
        a, b = self._front[first], self._front[second]
        return ((a[0] - b[0]) / self._x_span) ** 2 + ((a[1] - b[1]) / self._y_span) ** 2


class ManyFronts:
    """Fronts in any number of objectives. A point is compared with those of the fronts that it changes."""

    def __init__(self, num_objectives: int) -> None:
        self._fronts: list[np.ndarray] = []  # each (points, objectives), in no order; the order of arrival beside it
        self._arrivals: list[np.ndarray] = []
        self._scale = _Scale(num_objectives)
        self._num = 0
        self._last = 0

    def add(self, losses: Sequence[float]) -> int:
        """Add a point and return the index of its front; 0 is the non-dominated one."""
        point = np.array(losses)
        self._scale.add(losses)
        level = bisect_left(range(len(self._fronts)), True, key=lambda i: not _any_dominates(self._fronts[i], point))
        self._insert(point[None], np.array([self._num]), level)
        self._num += 1
        self._last = level
        return level

    def num_before(self, front: int) -> int:
        """Return the number of points on better fronts."""
        return sum(map(len, self._fronts[:front]))

    def is_among_first(self, num: int) -> bool:
        """Return whether the point added last is one of the first num of its front; see Fronts."""
        order = np.argsort(self._arrivals[self._last])
        newcomer = len(order) - 1
        if num > newcomer:
            return True
        # (objectives, points): NumPy sums over the first of two axes several times faster than over a short last one
        points, spans = self._fronts[self._last][order].T.copy(), np.array(self._scale.spans)[:, None]
        taken = int(points[0].argmin())
        distances = np.full(len(order), np.inf)
        steps, squared = np.empty_like(points), np.empty(len(order))  # written over: new ones took half of the time
        for _ in range(num - 1):
            if taken == newcomer:
                return True
            np.subtract(points, points[:, taken, None], out=steps)
            np.divide(steps, spans, out=steps)
            np.einsum("ij,ij->j", steps, steps, out=squared)
            np.minimum(distances, squared, out=distances)
            distances[taken] = -1.0  # equal points are at distance 0 and still come once each
            taken = int(distances.argmax())
        return taken == newcomer

    def _insert(self, moved: np.ndarray, arrivals: np.ndarray, level: int) -> None:
        for index in range(level, len(self._fronts)):
            front, front_arrivals = self._fronts[index], self._arrivals[index]
            behind = _dominated(front, moved)
            if behind.all():
                self._fronts.insert(index, moved)
                self._arrivals.insert(index, arrivals)
                return
            self._fronts[index] = np.concatenate([front[~behind], moved])
            self._arrivals[index] = np.concatenate([front_arrivals[~behind], arrivals])
            moved, arrivals = front[behind], front_arrivals[behind]
            if len(moved) == 0:
                return
        self._fronts.append(moved)
        self._arrivals.append(arrivals)


def _any_dominates(front: np.ndarray, point: np.ndarray) -> bool:
    return bool(((front <= point).all(axis=1) & (front < point).any(axis=1)).any())


def _dominated(front: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return an (n,) mask of the (n, objectives) points of the front that one of the moved points dominates."""
    reached = np.flatnonzero((front >= moved.min(axis=0)).all(axis=1))  # most are not, and need no comparison by pairs
    mask = np.zeros(len(front), dtype=bool)
    mask[reached] = [
        bool(((moved <= point).all(axis=1) & (moved < point).any(axis=1)).any()) for point in front[reached]
    ]
    return mask


class _Scale:
    """The smallest and the largest value of each objective so far."""

    def __init__(self, num_objectives: int) -> None:
        self._low = [math.inf] * num_objectives
        self._high = [-math.inf] * num_objectives

    def add(self, losses: Sequence[float]) -> None:
        self._low = [min(pair) for pair in zip(self._low, losses, strict=True)]
        self._high = [max(pair) for pair in zip(self._high, losses, strict=True)]

    @property
    def spans(self) -> list[float]:
        """Largest minus smallest value; 1 where all are equal."""
        return [(high - low) or 1.0 for low, high in zip(self._low, self._high, strict=True)]

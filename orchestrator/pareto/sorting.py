"""Fronts: the non-dominated fronts of a set to which points are added; smaller is better in every objective."""

from collections.abc import Sequence

import numpy as np


class Fronts:
    """A set of points in the order of arrival, sorted into fronts. Equal points share a front.

    Each point is compared with all others once: 5,000 points are few enough for that.
    """

    def __init__(self, num_objectives: int) -> None:
        self._points = np.empty((0, num_objectives))
        self._levels = np.empty(0, dtype=np.int64)  # the front of each point; 0 is the non-dominated one

    def add(self, losses: Sequence[float]) -> int:
        """Add a point and return the index of its front; 0 is the non-dominated one."""
        point = np.array(losses)
        is_at_least, is_at_most = (self._points >= point).all(axis=1), (self._points <= point).all(axis=1)
        level = int(self._levels[is_at_most & ~is_at_least].max(initial=-1)) + 1
        behind = np.flatnonzero(is_at_least & ~is_at_most)
        self._points = np.concatenate([self._points, point[None]])
        self._levels = np.append(self._levels, level)
        self._push_back(behind, level)
        return level

    def num_before(self, front: int) -> int:
        """Return the number of points on better fronts."""
        return int((self._levels < front).sum())

    def is_among_first(self, num: int) -> bool:
        """Return whether the point added last is one of the first num of its front, num > 0.

        The order is farthest-point: the best in the first objective, then always the point farthest from those already
        taken, the earlier one of equals; every objective is scaled to [0, 1] over all points. It spreads what it takes.
        """
        front = self._points[self._levels == self._levels[-1]].T.copy()  # (objectives, points): sums are faster so
        newcomer = front.shape[1] - 1
        if num > newcomer:
            return True
        spans = np.ptp(self._points, axis=0)[:, None]
        spans[spans == 0] = 1.0
        taken, distances = int(front[0].argmin()), np.full(newcomer + 1, np.inf)
        for _ in range(num - 1):
            if taken == newcomer:
                return True
            steps = (front - front[:, taken, None]) / spans
            np.minimum(distances, (steps * steps).sum(axis=0), out=distances)
            distances[taken] = -1.0  # equal points are at distance 0 and are still taken once each
            taken = int(distances.argmax())
        return taken == newcomer

    def _push_back(self, behind: np.ndarray, level: int) -> None:
        """Move points to the next front where the point added last, or one that it moved, dominates them.

        behind: indices of all points that it dominates.    level: its own front.
        """
        joining = np.array([len(self._points) - 1])
        while len(joining):
            there = behind[self._levels[behind] == level]  # before others join: none equals one that does
            self._levels[joining] = level
            is_dominated = (self._points[joining, None] <= self._points[there]).all(axis=2).any(axis=0)
            joining, level = there[is_dominated], level + 1

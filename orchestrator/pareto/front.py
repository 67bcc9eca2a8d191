"""Which networks are worth having: the non-dominated set, its hypervolume, and the questions asked of it.

A row is a dict as in results.parquet. An objective is a metric and its mode ("max" or "min").
Nothing here reads a file or a clock: the same rows give the same answer.
"""

import math
from collections.abc import Sequence

import numpy as np

from orchestrator.pareto.asha import Mode


def non_dominated(points: Sequence[Sequence[float]], modes: Sequence[Mode]) -> list[bool]:
    """Return for each point whether no other point is at least as good in every objective and better in one.

    Equal points are both kept; a point with a NaN is never kept and dominates nothing.

    >>> non_dominated([(90, 2.0), (80, 1.0), (80, 3.0)], ["max", "min"])
    [True, True, False]
    """
    losses = _losses(points, modes)
    valid = np.flatnonzero(~np.isnan(losses).any(axis=1))
    kept, front, num = np.zeros(len(losses), dtype=bool), np.empty_like(losses), 0
    # sorted by the first objective, then the next: what dominates a point comes before it, and so does a kept point that does
    for index in valid[np.lexsort(losses[valid].T[::-1])]:
        if not _is_dominated(losses[index], front[:num]):
            kept[index], front[num] = True, losses[index]
            num += 1
    return kept.tolist()


def hypervolume(points: Sequence[Sequence[float]], modes: Sequence[Mode], reference_point: Sequence[float]) -> float:
    """Return the exact volume of objective space that the points dominate, up to the reference point.

    A point that is not better than the reference in every objective adds nothing. The unit is the product of the
    objectives' units. Exact by slicing along the last objective: the work grows as n**(objectives - 1): 0.04 s for
    200 points in three, 1.6 s for 150 in four.

    >>> hypervolume([(90, 2.0), (80, 1.0)], ["max", "min"], (10, 4.0))  # (90-10)*(4-2) + (80-10)*(2-1)
    230.0
    """
    reference = _losses([reference_point], modes)[0]
    losses = _losses(points, modes)
    return _dominated_volume(losses[(losses < reference).all(axis=1)], reference)


def _loss(value: float | None, mode: Mode) -> float:
    if value is None:
        return math.nan
    return -float(value) if mode == "max" else float(value)


def _losses(points: Sequence[Sequence[float]], modes: Sequence[Mode]) -> np.ndarray:
    """Return (points, objectives) float64 where less is better everywhere."""
    signs = np.array([-1.0 if mode == "max" else 1.0 for mode in modes])
    return np.asarray(points, dtype=np.float64).reshape(-1, len(modes)) * signs


def _is_dominated(loss: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others <= loss).all(axis=1) & (others < loss).any(axis=1)).any())


def _dominated_volume(losses: np.ndarray, reference: np.ndarray) -> float:
    if len(losses) == 0:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - losses.min())
    losses = losses[np.argsort(losses[:, -1], kind="stable")]
    slice_ends = np.append(losses[1:, -1], reference[-1])
    heights = slice_ends - losses[:, -1]
    return sum(
        height * _dominated_volume(losses[: count + 1, :-1], reference[:-1])
        for count, height in enumerate(heights.tolist())
        if height > 0
    )

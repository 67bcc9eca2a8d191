"""The grid of widths at which a kind of call is timed: which points to measure next, and their times as a Grid."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gator.graph.ops import OpKind

FIRST_SHARES = (0.0, 0.25, 0.5, 1.0)
"""Shares of the largest width that a grid starts with; at least one channel."""
TOLERANCE = 0.15
"""Relative error of a straight line in its middle above which the grid gets a line there ..."""
LEAST_ERROR = 0.03
"""... unless it is below this share of the time at the largest width."""
MAX_LINES = 6
STEPS = (64, 32, 16, 8, 4, 2)
"""Hardware steps that are searched for, in channels."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Times of one kind of call on a grid of widths, monotone along both axes; linear between the lines."""

    lines_in: Tensor
    """(A,) float64, rising."""
    lines_out: Tensor
    """(B,) float64, rising; (1,) where the outputs follow the inputs."""
    times_ms: Tensor
    """(A, B) float64."""


# --- which points -----------------------------------------------------------------------------------------------------


def next_points(
    kind: OpKind, most_in: int, most_out: int, times: Mapping[tuple[int, int], float], step: int = 1
) -> list[tuple[int, int]]:
    """Return the points of a kind to be measured next, given the times so far; empty when its grid is complete.

    step: all widths are multiples of this, except the largest one and those along an axis that ends at a step or below.

    >>> relu = OpKind("relu", (0, 8, 8), "{}")
    >>> next_points(relu, 64, 64, {})
    [(1, 1), (16, 16), (32, 32), (64, 64), (8, 8), (24, 24), (48, 48)]
    >>> next_points(relu, 64, 64, {(n, n): float(n) for n in (1, 8, 16, 24, 32, 48, 64)})    # a straight line
    []
    """
    if not kind.has_two_widths:
        outputs, unit = _outputs_follow(kind), math.lcm(_unit(kind), step)
        return [(n, outputs(n)) for n in _scan({i: ms for (i, _), ms in times.items()}, most_in, unit)[1]]
    lines_in, wanted_in = _scan({i: ms for (i, o), ms in times.items() if o == most_out}, most_in, step)
    lines_out, wanted_out = _scan({o: ms for (i, o), ms in times.items() if i == most_in}, most_out, step)
    near = [most_out - each // 2 for each in STEPS if each <= most_out and each // 2 % step == 0]
    points = [(i, most_out) for i in wanted_in] + [(most_in, o) for o in [*wanted_out, *near]]
    if not wanted_in and not wanted_out:
        points += [(i, o) for i in lines_in for o in lines_out]
    return [point for point in dict.fromkeys(points) if point not in times]


def _unit(kind: OpKind) -> int:
    """Return how many input channels are pruned together."""
    per_group = kind.arguments.get("per_group", 1)
    return int(per_group if isinstance(per_group, int) else per_group[0])


def _outputs_follow(kind: OpKind) -> Callable[[int], int]:
    per_group = kind.arguments.get("per_group", [1, 1])
    before, after = per_group if isinstance(per_group, list) else (1, 1)
    return lambda num_in: num_in // before * after


def _scan(times: Mapping[int, float], most: int, unit: int) -> tuple[list[int], list[int]]:
    """Return the grid lines along one axis that are known so far, and the widths to measure next."""
    unit = unit if unit < most else 1
    first = sorted({min(most, max(unit, round(share * most / unit) * unit)) for share in FIRST_SHARES} | {most})
    lines, wanted = list(first), [width for width in first if width not in times]
    gaps = list(itertools.pairwise(first))
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2 // unit * unit
        if middle <= low:
            continue
        if not {low, middle, high} <= times.keys():
            wanted += [middle] if middle not in times else []
            continue
        straight_ms = times[low] + (times[high] - times[low]) * (middle - low) / (high - low)
        error_ms = abs(times[middle] - straight_ms)
        if error_ms > max(TOLERANCE * straight_ms, LEAST_ERROR * times.get(most, 0.0)) and len(lines) < MAX_LINES:
            lines.append(middle)
            gaps += [(low, middle), (middle, high)]
    return sorted(lines), wanted


# --- from points to a grid --------------------------------------------------------------------------------------------


def grid_of(kind: OpKind, most_in: int, most_out: int, times: Mapping[tuple[int, int], float], step: int = 1) -> Grid:
    """Return the grid of a kind of call from its times, which are complete up to these widths."""
    if kind.has_two_widths:
        lines_in, _ = _scan({i: ms for (i, o), ms in times.items() if o == most_out}, most_in, step)
        lines_out, _ = _scan({o: ms for (i, o), ms in times.items() if i == most_in}, most_out, step)
        values = [[times[i, o] for o in lines_out] for i in lines_in]
    else:
        by_width = dict(sorted((num_in, ms) for (num_in, _), ms in times.items() if num_in <= most_in))
        lines_in, lines_out, values = [*by_width], [1], [[ms] for ms in by_width.values()]
    lines_A, lines_B, times_AB = (torch.tensor(n, dtype=torch.float64) for n in (lines_in, lines_out, values))
    return Grid(lines_A, lines_B, _rising(times_AB))


def _rising(times_AB: Tensor) -> Tensor:
    """Return times that never fall along either axis: midway between the least rising curve above and the greatest below."""
    for dim in (0, 1):
        above = times_AB.cummax(dim).values
        below = times_AB.flip(dim).cummin(dim).values.flip(dim)
        times_AB = (above + below) / 2
    return times_AB

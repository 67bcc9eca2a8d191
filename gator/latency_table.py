"""Measured times of single calls over their widths, and of a few whole networks: what a LatencyCost is made of.

A table holds for one device, dtype, batch size and mode. It is built point by point: next_points() says what is missing,
from nothing but what is there, so a build that was cut short goes on where it stopped. The grid of a kind of call starts
with four widths an axis and is halved where a straight line between two of them misses the time in the middle.

Whatever else runs on the machine can only add time, often for some seconds on end. So a point is timed in several turns,
each after all other points, and the fastest of them counts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from gator.costs import full_widths
from gator.errors import LatencyError
from gator.graph import ChannelGraph
from gator.latency import Conditions, LatencyMeasurement, time_forward
from gator.ops import OpChain, OpKind, example_inputs

FIRST_SHARES = (0.0, 0.25, 0.5, 1.0)
"""Shares of the largest width at which a grid begins; at least one channel."""
TOLERANCE = 0.15
"""Relative error of a straight line in its middle that calls for a grid line there ..."""
LEAST_ERROR = 0.03
"""... unless it is below this share of the time at the largest width."""
MAX_LINES = 6
STEPS = (64, 32, 16, 8, 4, 2)
"""Hardware steps that are looked for, in channels."""
NUM_TURNS = 5
"""Of each point. On a machine whose neighbours slow it for seconds at a time one turn in ten was hit (docs/latency.md)."""
REPEATS_PER_TURN = 5
AGREEMENT = 0.05
"""Relative difference up to which two turns agree."""
PORTION = 40
"""Points that are timed, and stored, together."""

Point = tuple[OpKind, int, int]
"""A kind of call, the channels it reads and the channels it writes."""


@dataclass(frozen=True, kw_only=True)
class OpTime:
    """The time of one call at one point, in milliseconds: its fastest turn."""

    kind: OpKind
    num_in: int
    num_out: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    """Timed calls, of all turns."""
    noisy: bool = False
    """Whether no two turns agree on the least time."""
    num_turns: int = 1

    @property
    def point(self) -> Point:
        """Kind and widths."""
        return self.kind, self.num_in, self.num_out

    def and_turn(self, other: "OpTime") -> Self:
        """Return the faster of two times of the same point, with the turns of both."""
        faster, slower = (self, other) if self.median_ms <= other.median_ms else (other, self)
        return replace(
            self,
            **{name: getattr(faster, name) for name in ("median_ms", "p10_ms", "p90_ms")},
            noisy=faster.noisy and slower.median_ms > (1 + AGREEMENT) * faster.median_ms,
            n=self.n + other.n,
            num_turns=self.num_turns + other.num_turns,
        )


@dataclass(frozen=True, kw_only=True)
class NetworkTime:
    """The time of a whole network, in milliseconds, for the calibration."""

    fingerprint: str
    """Of its ChannelGraph."""
    input_shape: tuple[int, ...]
    """Of the first input, without the batch."""
    widths: Mapping[str, int]
    """Kept channels of each group."""
    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    noisy: bool = False
    """Whether no two turns agree on the least time, or a GPU was disturbed in the fastest of them."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Times of one kind of call on a grid of widths, monotone along both; between the lines straight."""

    lines_in: Tensor
    """(A,) float64, rising."""
    lines_out: Tensor
    """(B,) float64, rising; (1,) where the outputs follow the inputs."""
    times_ms: Tensor
    """(A, B) float64."""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of calls and networks under one set of conditions."""

    conditions: Conditions
    ops: tuple[OpTime, ...] = ()
    networks: tuple[NetworkTime, ...] = ()
    grids: dict[Point, Grid] = field(default_factory=dict, init=False, repr=False)

    def with_ops(self, ops: Iterable[OpTime]) -> Self:
        """Return the table with more points; of a point that is there already the faster time counts."""
        by_point = {time.point: time for time in self.ops}
        for time in ops:
            by_point[time.point] = by_point[time.point].and_turn(time) if time.point in by_point else time
        return replace(self, ops=tuple(by_point.values()))

    def with_networks(self, networks: Iterable[NetworkTime]) -> Self:
        """Return the table with more networks; one that is there already is replaced."""
        by_widths = {
            (time.fingerprint, time.input_shape, tuple(time.widths.items())): time
            for time in (*self.networks, *networks)
        }
        return replace(self, networks=tuple(by_widths.values()))

    def merged(self, other: "LatencyTable") -> Self:
        """Return both tables as one: of a point the faster time, of a network the other's.

        Raises: LatencyError if their conditions differ.
        """
        self.conditions.check_same(other.conditions, "the other table")
        return self.with_ops(other.ops).with_networks(other.networks)

    @cached_property
    def times(self) -> dict[OpKind, dict[tuple[int, int], float]]:
        """Kind -> (in, out) -> milliseconds."""
        times: dict[OpKind, dict[tuple[int, int], float]] = {}
        for op in self.ops:
            times.setdefault(op.kind, {})[op.num_in, op.num_out] = op.median_ms
        return times

    def missing(self, graph: ChannelGraph) -> list[Point]:
        """Return the points that the grids of a network lack, as far as is known; empty when they are complete."""
        return [
            (kind, *point)
            for kind, largest in largest_widths(graph).items()
            for point in next_points(kind, *largest, self.times.get(kind, {}))
        ]

    def due(self, graph: ChannelGraph) -> list[Point]:
        """Return the points to be timed next for a network: those missing, then those that lack turns; empty when all is done."""
        kinds = largest_widths(graph)
        return self.missing(graph) or [op.point for op in self.ops if op.kind in kinds and op.num_turns < NUM_TURNS]

    def turns_to_go(self, graph: ChannelGraph) -> int:
        """Return how many turns of points a network still needs, as far as is known."""
        kinds = largest_widths(graph)
        lacking = sum(max(0, NUM_TURNS - op.num_turns) for op in self.ops if op.kind in kinds)
        return NUM_TURNS * len(self.missing(graph)) + lacking

    def networks_of(self, graph: ChannelGraph) -> list[NetworkTime]:
        """Return the whole-network times of a graph."""
        return [
            time
            for time in self.networks
            if time.fingerprint == graph.fingerprint and time.input_shape == graph.input_shapes[0][1:]
        ]

    def grid(self, kind: OpKind, most_in: int, most_out: int) -> Grid:
        """Return the grid of a kind of call up to these widths, or the smallest complete one beyond them, of a larger network.

        Raises: LatencyError if the table does not have it, or not all of it.
        """
        if (kind, most_in, most_out) not in self.grids:
            times = self.times.get(kind, {})
            above = sorted((i * o, i, o) for i, o in times if i >= most_in and o >= most_out)
            complete = [(i, o) for _, i, o in above if not next_points(kind, i, o, times)]
            if not complete:
                state = "only in part, because its measurement was cut short" if times else "not at all"
                raise LatencyError(
                    f"the table has {kind} {state}; run `python -m orchestrator.measure` for this network again"
                )
            self.grids[kind, most_in, most_out] = _grid(kind, *complete[0], times)
        return self.grids[kind, most_in, most_out]

    def hardware_step(self, kind: OpKind, most_in: int, most_out: int) -> int:
        """Return the channels by which the outputs of a kind must shrink from these widths before it gets faster: 1, 2, 4, ... or 64.

        The largest step s for which s / 2 fewer channels save less than a quarter of what the line to half the width promises.
        """
        times = self.times.get(kind, {})
        if not times or not kind.has_two_widths:
            return 1
        full_ms, half_ms = times.get((most_in, most_out)), times.get((most_in, max(1, round(0.5 * most_out))))
        if full_ms is None or half_ms is None:  # a larger network's table: it tells nothing of steps at these widths
            return 1
        slope_ms = max(0.0, full_ms - half_ms) / max(1, most_out - most_out // 2)
        for step in STEPS:
            near_ms = times.get((most_in, most_out - step // 2))
            if near_ms is not None and slope_ms and full_ms - near_ms < 0.25 * slope_ms * (step // 2):
                return step
        return 1


def largest_widths(graph: ChannelGraph) -> dict[OpKind, tuple[int, int]]:
    """Return the largest (in, out) with which the unpruned network makes each kind of call."""
    full = torch.cat([full_widths(graph), torch.ones(1, dtype=torch.float64)])
    largest: dict[OpKind, tuple[int, int]] = {}
    for op in graph.ops:
        most_in, most_out = largest.get(op.kind, (0, 0))
        largest[op.kind] = (
            max(most_in, round(float(op.num_in @ full))),
            max(most_out, round(float(op.num_out @ full))),
        )
    return largest


# --- which points -----------------------------------------------------------------------------------------------------


def next_points(
    kind: OpKind, most_in: int, most_out: int, times: Mapping[tuple[int, int], float]
) -> list[tuple[int, int]]:
    """Return the points of a kind that are to be measured next, given what was; empty when its grid is complete.

    >>> relu = OpKind("relu", (0, 8, 8), "{}")
    >>> next_points(relu, 64, 64, {})
    [(1, 1), (16, 16), (32, 32), (64, 64), (8, 8), (24, 24), (48, 48)]
    >>> next_points(relu, 64, 64, {(n, n): float(n) for n in (1, 8, 16, 24, 32, 48, 64)})    # a straight line
    []
    """
    if not kind.has_two_widths:
        outputs = _outputs_follow(kind)
        return [(n, outputs(n)) for n in _scan({i: ms for (i, _), ms in times.items()}, most_in, _unit(kind))[1]]
    lines_in, wanted_in = _scan({i: ms for (i, o), ms in times.items() if o == most_out}, most_in, 1)
    lines_out, wanted_out = _scan({o: ms for (i, o), ms in times.items() if i == most_in}, most_out, 1)
    near = [most_out - step // 2 for step in STEPS if step <= most_out]
    points = [(i, most_out) for i in wanted_in] + [(most_in, o) for o in [*wanted_out, *near]]
    if not wanted_in and not wanted_out:
        points += [(i, o) for i in lines_in for o in lines_out]
    return [point for point in dict.fromkeys(points) if point not in times]


def _unit(kind: OpKind) -> int:
    """Return how many input channels go together."""
    per_group = kind.arguments.get("per_group", 1)
    return int(per_group if isinstance(per_group, int) else per_group[0])


def _outputs_follow(kind: OpKind) -> Callable[[int], int]:
    per_group = kind.arguments.get("per_group", [1, 1])
    before, after = per_group if isinstance(per_group, list) else (1, 1)
    return lambda num_in: num_in // before * after


def _scan(times: Mapping[int, float], most: int, unit: int) -> tuple[list[int], list[int]]:
    """Return the grid lines along one axis as far as known, and the widths to measure before more is known."""
    first = sorted({max(unit, round(share * most / unit) * unit) for share in FIRST_SHARES})
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


def _grid(kind: OpKind, most_in: int, most_out: int, times: Mapping[tuple[int, int], float]) -> Grid:
    if not kind.has_two_widths:
        by_width = dict(sorted((num_in, ms) for (num_in, _), ms in times.items() if num_in <= most_in))
        column = torch.tensor(list(by_width.values()), dtype=torch.float64)[:, None]
        return Grid(
            torch.tensor(list(by_width), dtype=torch.float64), torch.ones(1, dtype=torch.float64), _rising(column)
        )
    lines_in, _ = _scan({i: ms for (i, o), ms in times.items() if o == most_out}, most_in, 1)
    lines_out, _ = _scan({o: ms for (i, o), ms in times.items() if i == most_in}, most_out, 1)
    values = torch.tensor([[times[i, o] for o in lines_out] for i in lines_in], dtype=torch.float64)
    return Grid(
        torch.tensor(lines_in, dtype=torch.float64), torch.tensor(lines_out, dtype=torch.float64), _rising(values)
    )


def _rising(times_AB: Tensor) -> Tensor:
    """Return times that never fall along either axis: midway between the least curve above and the greatest below."""
    for dim in (0, 1):
        above = times_AB.cummax(dim).values
        below = times_AB.flip(dim).cummin(dim).values.flip(dim)
        times_AB = (above + below) / 2
    return times_AB


# --- measuring --------------------------------------------------------------------------------------------------------


def time_op(point: Point, conditions: Conditions, num_repeats: int = REPEATS_PER_TURN) -> LatencyMeasurement:
    """Return the time of one call at a point, on the device and under the settings of the conditions.

    Raises: LatencyError if this kind of call is not timed alone.
    """
    kind, num_in, num_out = point
    device, dtype = torch.device(conditions.device_type), getattr(torch, conditions.dtype)
    with torch.random.fork_rng(devices=[]):
        chain = OpChain(kind, num_in, num_out, device, dtype)
        inputs = example_inputs(kind, num_in, conditions.batch_size, device, dtype)
    if conditions.layout == "channels_last":
        chain.weights = [[_channels_last(weight) for weight in weights] for weights in chain.weights]
        inputs = tuple(_channels_last(tensor) for tensor in inputs)
    measured = time_forward(
        chain,
        inputs,
        mode=conditions.mode,
        num_repeats=num_repeats,
        max_warmup=0,  # a median over the repeats passes over the first, and the fastest turn over the rest
        num_threads=conditions.num_threads,
    )
    return measured.divided(chain.length)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def time_points(points: Iterable[Point], timer: Callable[[Point], LatencyMeasurement]) -> Iterator[OpTime]:
    """Yield the time of each point, over one turn."""
    for kind, num_in, num_out in points:
        measured = timer((kind, num_in, num_out))
        times_ms = {name: getattr(measured, name) for name in ("median_ms", "p10_ms", "p90_ms")}
        yield OpTime(kind=kind, num_in=num_in, num_out=num_out, n=measured.n, noisy=True, **times_ms)


def completed(
    table: LatencyTable,
    graph: ChannelGraph,
    measure: Callable[[Sequence[Point]], Iterable[OpTime]],
    portion: int = PORTION,
) -> Iterator[LatencyTable]:
    """Yield the table with one more turn of up to `portion` points each time, until it has all of the network."""
    while due := table.due(graph):
        for begin in range(0, len(due), portion):
            table = table.with_ops(measure(due[begin : begin + portion]))
            yield table

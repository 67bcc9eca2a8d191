"""The latency table: measured times of single calls over their widths, and of a few whole networks.

A table holds for one device, dtype, batch size and runtime. It is built point by point: next_points() returns the missing
points from those that are there, so a build that was stopped can resume. The grid of a kind of call starts with four
widths an axis and is halved where a straight line between two of them misses the time in the middle.

Other programs on the machine can only add time, often for several seconds. So each point is timed in several turns, each
after all other points, and the fastest of them counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch

from gator.errors import LatencyError
from gator.graph.graph import ChannelGraph, full_widths
from gator.graph.ops import OpKind
from gator.latency.grid import STEPS, Grid, grid_of, next_points
from gator.latency.measurement import Conditions

NUM_TURNS = 5
"""Of each point. On a machine whose neighbours slow it for seconds at a time one turn in ten was hit (docs/latency.md)."""
CALL_RUNTIMES = ("eager", "cuda_graph")
"""In which every call takes the same time alone as in a network."""
AGREEMENT = 0.05
"""Relative difference up to which two turns agree."""
ONNX_STEP = 4
"""Multiples of this are the widths of a table for ONNX Runtime on a CPU. It computes in blocks of 8 or 16 channels, and with a number
of channels that 4 does not divide convolutions take slower ways: a depthwise one takes four times as long."""
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
class LatencyTable:
    """Times of calls and networks under one set of conditions."""

    conditions: Conditions
    ops: tuple[OpTime, ...] = ()
    networks: tuple[NetworkTime, ...] = ()
    grids: dict[Point, Grid] = field(default_factory=dict, init=False, repr=False)

    def with_ops(self, ops: Iterable[OpTime]) -> Self:
        """Return the table with more points; for a point that it has already the faster time counts."""
        by_point = {time.point: time for time in self.ops}
        for time in ops:
            by_point[time.point] = by_point[time.point].and_turn(time) if time.point in by_point else time
        return replace(self, ops=tuple(by_point.values()))

    def with_networks(self, networks: Iterable[NetworkTime]) -> Self:
        """Return the table with more networks; one that it has already is replaced."""
        by_widths = {
            (time.fingerprint, time.input_shape, tuple(time.widths.items())): time
            for time in (*self.networks, *networks)
        }
        return replace(self, networks=tuple(by_widths.values()))

    @cached_property
    def times(self) -> dict[OpKind, dict[tuple[int, int], float]]:
        """Kind -> (in, out) -> milliseconds."""
        times: dict[OpKind, dict[tuple[int, int], float]] = {}
        for op in self.ops:
            times.setdefault(op.kind, {})[op.num_in, op.num_out] = op.median_ms
        return times

    @property
    def width_step(self) -> int:
        """Of which number the widths of networks must be multiples for the table to hold."""
        return ONNX_STEP if (self.conditions.runtime, self.conditions.device_type) == ("onnxruntime", "cpu") else 1

    def is_own(self, kind: OpKind) -> bool:
        """Return whether the table's runtime times this kind alone. The times of other kinds come from PyTorch's runtimes.

        A runtime that fuses calls leaves convolutions and linear layers; ONNX Runtime on a CPU times these.
        """
        return self.conditions.runtime in CALL_RUNTIMES or (self.width_step > 1 and kind.is_layer)

    def missing(self, graph: ChannelGraph) -> list[Point]:
        """Return the points that the grids of a network still need, as far as is known; empty when they are complete."""
        return [
            (kind, *point)
            for kind, largest in largest_widths(graph).items()
            for point in next_points(kind, *largest, self.times.get(kind, {}), self._step(kind))
        ]

    def due(self, graph: ChannelGraph) -> list[Point]:
        """Return the points to be timed next for a network: missing ones, then those that need more turns; empty when done."""
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

        Raises: LatencyError if the table does not have it, or only a part of it.
        """
        if (kind, most_in, most_out) not in self.grids:
            times = self.times.get(kind, {})
            above = sorted((i * o, i, o) for i, o in times if i >= most_in and o >= most_out)
            complete = [(i, o) for _, i, o in above if not next_points(kind, i, o, times, self._step(kind))]
            if not complete:
                state = "only in part, because its measurement was stopped" if times else "not at all"
                raise LatencyError(f"the table has {kind} {state}; measure the table for this network")
            self.grids[kind, most_in, most_out] = grid_of(kind, *complete[0], times, self._step(kind))
        return self.grids[kind, most_in, most_out]

    def hardware_step(self, kind: OpKind, most_in: int, most_out: int) -> int:
        """Return the channels by which the outputs of a kind must shrink from these widths before it gets faster: 1, 2, 4, ... or 64.

        The largest step s for which s / 2 fewer channels save less than a quarter of what the line to half the width promises.
        """
        times, least = self.times.get(kind, {}), self._step(kind)
        if not times or not kind.has_two_widths:
            return least
        full_ms, half_ms = times.get((most_in, most_out)), times.get((most_in, max(1, round(0.5 * most_out))))
        if full_ms is None or half_ms is None:  # a larger network's table: it says nothing about steps at these widths
            return least
        slope_ms = max(0.0, full_ms - half_ms) / max(1, most_out - most_out // 2)
        for step in STEPS:
            near_ms = times.get((most_in, most_out - step // 2))
            if near_ms is not None and slope_ms and full_ms - near_ms < 0.25 * slope_ms * (step // 2):
                return step
        return least

    def _step(self, kind: OpKind) -> int:
        return self.width_step if self.is_own(kind) else 1


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

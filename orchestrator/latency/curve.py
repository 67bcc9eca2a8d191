"""The latency curve: milliseconds over MACs, measured once for networks that are timed apart from their trials."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import FiniteFloat, TypeAdapter
from torch import nn

import gator
from orchestrator.config.trial import ProfileConfig
from orchestrator.errors import LatencyTableError
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.timing import MIN_TURNS, NUM_REPEATS_OF_ESTIMATE, time_in_turns
from orchestrator.storage.files import parse_json

CURVE_VERSION = 1
CURVE_WIDTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of every group's channels that the networks of a curve keep."""


@dataclass(frozen=True)
class Curve:
    """Latency over MACs, of a network that was narrowed evenly."""

    points: Mapping[int, tuple[Sequence[float], Sequence[float]]]
    """Batch size -> MACs per image and milliseconds, both rising."""

    def at(self, macs: float, batch_size: int) -> float:
        """Return milliseconds, linear between the points."""
        return float(np.interp(macs, *self.points[batch_size]))

    def error(self, batch_size: int) -> float:
        """Return the mean relative error with which each inner point is predicted from all other points."""
        macs, times_ms = (np.array(line) for line in self.points[batch_size])
        missed = [
            abs(np.interp(macs[i], np.delete(macs, i), np.delete(times_ms, i)) / times_ms[i] - 1)
            for i in range(1, len(macs) - 1)
        ]
        return float(np.mean(missed))

    def to_json(self) -> str:
        """Return the points as JSON text."""
        points = {str(size): [list(line) for line in lines] for size, lines in self.points.items()}
        return json.dumps({"version": CURVE_VERSION, "points": points}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the curve from the text of to_json. Raises: LatencyTableError if it is damaged or of another version."""
        try:
            content = parse_json(text)
            if (version := content["version"]) != CURVE_VERSION:
                raise LatencyTableError(
                    f"the latency curve has version {version!r}, this program reads {CURVE_VERSION}; use the release that wrote it"
                )
            points = _POINTS.validate_python(content["points"])
            if not points or not all(map(_is_curve, points.values())):
                raise ValueError("expected as many times as MACs for each batch size, both rising")
        except (ValueError, KeyError, TypeError) as error:
            raise LatencyTableError(
                f"the latency curve is damaged ({error}); restore it from a copy, or start the search under another name"
            ) from error
        return cls(points)


_POINTS = TypeAdapter(dict[int, tuple[list[FiniteFloat], list[FiniteFloat]]])


def _is_curve(lines: tuple[Sequence[float], Sequence[float]]) -> bool:
    macs, times_ms = lines
    return len(macs) == len(times_ms) > 0 and all(line[0] >= 0 and list(line) == sorted(line) for line in lines)


def take_curve(network: nn.Module, graph: gator.ChannelGraph, profile: ProfileConfig) -> Curve:
    """Return the curve of the network, timed in this process on the device that holds it."""
    macs, device = gator.MacsCost(graph), next(network.parameters()).device
    keeps = [{group.name: range(math.ceil(share * group.num_channels)) for group in graph} for share in CURVE_WIDTHS]
    narrowed = [gator.Architecture.from_keep(graph, keep) for keep in keeps]
    networks = [gator.prune(network, graph, architecture) for architecture in narrowed]
    timing = Timing.on(device, profile)
    timers = [timing.timers(network, graph.input_shapes[0][1:], profile.batch_sizes) for network in networks]
    points = {}
    for size in profile.batch_sizes:
        latencies = time_in_turns([by_size[size] for by_size in timers], MIN_TURNS * NUM_REPEATS_OF_ESTIMATE, device)
        medians_ms = np.maximum.accumulate([latency.median_ms for latency in latencies])
        points[size] = [macs(architecture) for architecture in narrowed], medians_ms.tolist()
    return Curve(points)

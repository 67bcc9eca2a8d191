"""How fast a pruned network is: one interface, three clocks.

DeviceClock   times the network where it lies. On a GPU the worker does so where it trained, while the other ranks wait.
CurveClock    where networks are timed apart from their trials: predicts by the latency table, if there is one, or by a curve
              over multiply-adds that was taken before the first trial.
ModelClock    no clock: so many multiply-adds per millisecond. For runs that must give the same numbers twice.

Apart are CPUs, which trials share (timing.py says why), and the nodes that a cluster reserves for measurements. When the last
trial has ended all finished networks are timed there in turns: remeasure.py.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from pydantic import FiniteFloat, TypeAdapter
from torch import nn

import gator
from orchestrator.config import ProfileConfig, TrialConfig
from orchestrator.errors import LatencyTableError
from orchestrator.models import example_images
from orchestrator.state_files import parse_json
from orchestrator.timing import MIN_TURNS, NUM_REPEATS_OF_ESTIMATE, device_lock, time_calmly, time_networks

CURVE_VERSION = 1
MODEL_CLOCK_MACS_PER_MS = 1e7
CURVE_WIDTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of every group's channels that the networks of a curve keep."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of the forward pass of one batch: median and spread over the repeats."""

    median_ms: float
    p10_ms: float | None = None
    p90_ms: float | None = None
    device: str | None = None
    """None, like the spread, for an estimate."""
    noisy: bool | None = None
    """Whether the measurement was disturbed, however often it was made again; over turns, whether no two of them agree on the least."""
    conditions: str | None = None
    """How it was taken, as JSON: gator.latency.Conditions with their fingerprint, which another latency must share to compare,
    the repeats, the commit, the time, and what the GPU's driver said."""


@dataclass(frozen=True)
class Curve:
    """Latency over multiply-adds, of a network that was narrowed evenly."""

    points: Mapping[int, tuple[Sequence[float], Sequence[float]]]
    """Batch size -> multiply-adds per image and milliseconds, both rising."""

    def at(self, macs: float, batch_size: int) -> float:
        """Return milliseconds, linear between the points."""
        return float(np.interp(macs, *self.points[batch_size]))

    def error(self, batch_size: int) -> float:
        """Return by what share of its time a point between the ends is missed when it is left out, on average."""
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
        """Read what to_json returned. Raises: LatencyTableError if it is damaged, or of another version."""
        try:
            content = parse_json(text)
            if (version := content["version"]) != CURVE_VERSION:
                raise LatencyTableError(
                    f"the latency curve has version {version!r}, this program reads {CURVE_VERSION}; use the release that wrote it"
                )
            points = _POINTS.validate_python(content["points"])
            if not points or not all(map(_is_curve, points.values())):
                raise ValueError("expected as many times as multiply-adds for each batch size, both rising")
        except (ValueError, KeyError, TypeError) as error:
            raise LatencyTableError(
                f"the latency curve is damaged ({error}); restore it from a copy, or start the search under another name"
            ) from error
        return cls(points)


_POINTS = TypeAdapter(dict[int, tuple[list[FiniteFloat], list[FiniteFloat]]])


def _is_curve(lines: tuple[Sequence[float], Sequence[float]]) -> bool:
    macs, times_ms = lines
    return len(macs) == len(times_ms) > 0 and all(line[0] >= 0 and list(line) == sorted(line) for line in lines)


class Clock(Protocol):
    """What tells the latency of a pruned network."""

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return the latency of `network`, which is the trial's model cut to `architecture`."""

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Return what a scheduler may compare networks by that are not done; with a spread where it was timed."""


class ModelClock:
    """Latency from the multiply-adds: exact, repeatable, and true of no device."""

    def __init__(self, macs: gator.MacsCost) -> None:
        self._macs = macs

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return multiply-adds over MODEL_CLOCK_MACS_PER_MS, without spread."""
        latency_ms = self._macs(architecture) * batch_size / MODEL_CLOCK_MACS_PER_MS
        return Latency(median_ms=latency_ms, p10_ms=latency_ms, p90_ms=latency_ms, device="model")

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Return what measure() does."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=1)


class DeviceClock:
    """Latency on the device that holds the network, in this process."""

    def __init__(self, input_shape: tuple[int, ...], num_threads: int) -> None:
        self._input_shape = input_shape
        self._num_threads = num_threads

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Time the network itself."""
        device = next(network.parameters()).device
        images = example_images(self._input_shape, batch_size).to(device)
        with device_lock(device):
            measured = time_calmly(network, images, num_repeats=num_repeats, num_threads=self._num_threads)
        return _latency(measured, noisy=measured.is_noisy)

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Time a few repeats: nothing else runs on the device."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=NUM_REPEATS_OF_ESTIMATE)


class CurveClock:
    """Latency by a prediction: the same for all trials, whatever runs beside them.

    table: predicts for its batch size in the place of the curve, which knows no more than the multiply-adds.
    """

    def __init__(self, curve: Curve, macs: gator.MacsCost, table: gator.LatencyCost | None = None) -> None:
        self._curve = curve
        self._macs = macs
        self._table = table

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return the estimate; what is measured comes from remeasure.py."""
        return self.estimate(network, architecture, batch_size=batch_size)

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Return the milliseconds of the architecture by the table, or of its multiply-adds by the curve."""
        if self._table is not None and self._table.table.conditions.batch_size == batch_size:
            return Latency(median_ms=self._table(architecture))
        return Latency(median_ms=self._curve.at(self._macs(architecture), batch_size))


def make_clock(
    config: TrialConfig,
    input_shape: tuple[int, ...],
    macs: gator.MacsCost,
    device: torch.device,
    curve: Curve | None,
    table: gator.LatencyCost | None = None,
) -> Clock:
    """Return the clock for networks that were trained on the device: profile.clock decides, then where they run.

    curve: where networks are timed apart from their trials; None elsewhere.    table: a cost of the device they are timed on.
    """
    if config.profile.clock == "model":
        return ModelClock(macs)
    if curve is not None:
        return CurveClock(curve, macs, table)
    return DeviceClock(input_shape, config.profile.num_threads)


def measure_latencies(
    clock: Clock, network: nn.Module, architecture: gator.Architecture, profile: ProfileConfig
) -> dict[str, Any]:
    """Return the latency columns of results.parquet: the first batch size with its conditions, others with their spread."""
    return _columns(
        {
            size: vars(clock.measure(network, architecture, batch_size=size, num_repeats=profile.num_repeats))
            for size in profile.batch_sizes
        }
    )


def measure_in_turns(
    networks: Sequence[tuple[nn.Module, gator.Architecture]], profile: ProfileConfig, device: torch.device
) -> list[dict[str, Any]]:
    """Return the latency columns of each network, all timed on the device in this process."""
    by_size = {
        size: time_in_turns(networks, size, profile.num_repeats, profile.num_threads, device)
        for size in profile.batch_sizes
    }
    return [
        _columns({size: vars(latencies[place]) for size, latencies in by_size.items()})
        for place in range(len(networks))
    ]


def time_in_turns(
    networks: Sequence[tuple[nn.Module, gator.Architecture]],
    batch_size: int,
    num_repeats: int,
    num_threads: int,
    device: torch.device,
) -> list[Latency]:
    """Return the latency of each network, that of its fastest turn; num_repeats: of each, over the least number of turns."""
    images = example_images(networks[0][1].input_shapes[0][1:], batch_size).to(device)
    with device_lock(device):
        measured = time_networks(
            [network.to(device) for network, _ in networks],
            images,
            num_repeats=math.ceil(num_repeats / MIN_TURNS),
            num_threads=num_threads,
        )
    return [_latency(one, noisy=one.is_disturbed or not is_settled) for one, is_settled in measured]


def take_curve(network: nn.Module, graph: gator.ChannelGraph, profile: ProfileConfig) -> Curve:
    """Return the curve of the network, timed where it lies in this process."""
    macs, device = gator.MacsCost(graph), next(network.parameters()).device
    narrowed = [
        gator.Architecture.from_keep(
            graph, {group.name: range(math.ceil(share * group.num_channels)) for group in graph.groups}
        )
        for share in CURVE_WIDTHS
    ]
    networks = [(gator.prune(network, graph, architecture), architecture) for architecture in narrowed]
    points = {}
    for size in profile.batch_sizes:
        latencies = time_in_turns(networks, size, MIN_TURNS * NUM_REPEATS_OF_ESTIMATE, profile.num_threads, device)
        medians_ms = np.maximum.accumulate([latency.median_ms for latency in latencies])
        points[size] = [macs(architecture) for architecture in narrowed], medians_ms.tolist()
    return Curve(points)


def _latency(measured: gator.LatencyMeasurement, *, noisy: bool) -> Latency:
    return Latency(
        median_ms=measured.median_ms,
        p10_ms=measured.p10_ms,
        p90_ms=measured.p90_ms,
        device=measured.device,
        noisy=noisy,
        conditions=_conditions_json(measured),
    )


def _conditions_json(measured: gator.LatencyMeasurement) -> str:
    gpu = {} if measured.gpu is None else asdict(measured.gpu)
    return json.dumps(
        {
            **asdict(measured.conditions),
            "fingerprint": measured.conditions.fingerprint,
            **{name: getattr(measured, name) for name in ("clock", "n", "num_warmup", "is_warm", "commit", "time")},
            **{f"gpu_{name}": value for name, value in gpu.items()},
        }
    )


def _columns(by_size: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """by_size: the fields of a Latency per batch size, the first of profile.batch_sizes first."""
    first, *others = by_size.items()
    latency = first[1]
    return {
        "latency_ms": latency["median_ms"],
        "latency_p10_ms": latency["p10_ms"],
        "latency_p90_ms": latency["p90_ms"],
        "latency_device": latency["device"],
        "latency_noisy": _any(other["noisy"] for other in by_size.values()),
        "latency_conditions": latency["conditions"],
        **{
            f"latency_{kind}_b{size}": other[f"{name}_ms"]
            for size, other in others
            for kind, name in (("ms", "median"), ("p10_ms", "p10"), ("p90_ms", "p90"))
        },
    }


def _any(noisy: Iterable[bool | None]) -> bool | None:
    """Return whether any was; None where none is known."""
    known = [one for one in noisy if one is not None]
    return any(known) if known else None

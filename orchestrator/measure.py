"""How fast a network is: one interface, three clocks.

ProbeClock    CPU: the networks of all trials are timed one after another in a process of their own, so that neither
              another measurement nor the heap of a training process disturbs them. It reads the process's CPU time.
DeviceClock   CUDA: the worker times the network where it trained, while the other ranks wait.
ModelClock    no clock: so many multiply-adds per millisecond. For runs that must give the same numbers twice.

Cores share caches and memory with whatever trains beside them: on 2 cores the same network took up to twice as long
while another trial trained, also by process time. So nothing on a CPU is compared by what was timed in that noise. After
an epoch the probe estimates, from a curve that it took before the first trial; and when the last trial has ended, it
times all finished networks again, in turns (`measure_in_turns`).
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor, nn

import gator
from orchestrator import models
from orchestrator.cluster import ClusterConfig
from orchestrator.config import ModelConfig, ProfileConfig, TrialConfig

PROBE_NAME = "latency_probe"
MODEL_CLOCK_MACS_PER_MS = 1e7
NUM_REPEATS_OF_ESTIMATE = 20
CURVE_WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Shares of every group's channels that the networks of the probe's curve keep."""
NUM_TURNS = 5
"""In measure_in_turns() every network is timed so many times, each time after all the others."""

# glibc gives large blocks back to the kernel when they are freed, and asks for them again in the next forward pass:
# page faults in the timing. 32 MiB is the largest threshold that every glibc accepts.
_PROBE_ENV = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of the forward pass of one batch: median and spread over the repeats."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    device: str


class Clock(Protocol):
    """What tells the latency of a pruned network."""

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return the latency of `network`, which is the trial's model cut to `architecture`."""

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> float:
        """Return the milliseconds by which a scheduler may compare networks that are not done."""


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

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> float:
        """Return what measure() does."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=1).median_ms


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
        measured = gator.time_forward(network, images, num_repeats=num_repeats, num_threads=self._num_threads)
        return Latency(
            median_ms=measured.median_ms, p10_ms=measured.p10_ms, p90_ms=measured.p90_ms, device=measured.device
        )

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> float:
        """Return the median of a few repeats: nothing else runs on the device."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=NUM_REPEATS_OF_ESTIMATE).median_ms


class ProbeClock:
    """Latency from the search's LatencyProbe."""

    def __init__(self, probe: ActorHandle, model: ModelConfig) -> None:
        self._probe = probe
        self._model_json = model.model_dump_json()

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Have the probe build, prune and time the same architecture; the weights do not matter to the time."""
        architecture_json = json.dumps(architecture.to_json())
        answer = self._probe.measure.remote(self._model_json, architecture_json, batch_size, num_repeats)
        return Latency(**ray.get(answer))

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> float:
        """Return what the probe reads off its curve at the architecture's multiply-adds."""
        architecture_json = json.dumps(architecture.to_json())
        return float(ray.get(self._probe.estimate.remote(self._model_json, architecture_json, batch_size)))


def make_clock(config: TrialConfig, input_shape: tuple[int, ...], macs: gator.MacsCost, device: torch.device) -> Clock:
    """Return the clock for networks that were trained on the device: profile.clock decides, then where they run.

    Without Ray there is no probe, and the process times its own network, also on the CPU.
    """
    if config.profile.clock == "model":
        return ModelClock(macs)
    if device.type != "cpu" or not ray.is_initialized():
        return DeviceClock(input_shape, config.profile.num_threads)
    return ProbeClock(ray.get_actor(PROBE_NAME), config.model)


def measure_latencies(
    clock: Clock, network: nn.Module, architecture: gator.Architecture, profile: ProfileConfig
) -> dict[str, Any]:
    """Return the latency columns of results.parquet: the first batch size with spread and device, other medians."""
    return _columns(
        {
            size: vars(clock.measure(network, architecture, batch_size=size, num_repeats=profile.num_repeats))
            for size in profile.batch_sizes
        }
    )


def measure_in_turns(
    probe: ActorHandle,
    networks: Sequence[tuple[ModelConfig, gator.Architecture]],
    profile: ProfileConfig,
) -> list[dict[str, Any]]:
    """Return the latency columns of each network, all timed by the probe in turns.

    Raises: ray.exceptions.RayError if the probe is lost.
    """
    plain = [(model.model_dump_json(), json.dumps(architecture.to_json())) for model, architecture in networks]
    by_size = {
        size: ray.get(probe.measure_in_turns.remote(plain, size, profile.num_repeats)) for size in profile.batch_sizes
    }
    return [_columns({size: latencies[place] for size, latencies in by_size.items()}) for place in range(len(plain))]


def _columns(by_size: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """by_size: the fields of a Latency per batch size, the first of profile.batch_sizes first."""
    first, *others = by_size.items()
    latency = first[1]
    return {
        "latency_ms": latency["median_ms"],
        "latency_p10_ms": latency["p10_ms"],
        "latency_p90_ms": latency["p90_ms"],
        "latency_device": latency["device"],
        **{f"latency_ms_b{size}": other["median_ms"] for size, other in others},
    }


def take_curve(probe: ActorHandle, model: ModelConfig, graph: gator.ChannelGraph, profile: ProfileConfig) -> None:
    """Have the probe take the curve that its estimates are read off; call it while nothing else computes."""
    full = json.dumps(gator.Architecture.full(graph).to_json())
    ray.get(probe.estimate.remote(model.model_dump_json(), full, profile.batch_sizes[0]))


Curve = tuple[list[float], list[float]]


class _Pruned(NamedTuple):
    network: nn.Module
    architecture: gator.Architecture


class LatencyProbe:
    """Times networks on the CPU of its node, one at a time; a Ray actor, made by `start_probe`.

    Networks come as JSON: of the ModelConfig, and of the Architecture, which knows the shape of an image.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._traced: dict[tuple[str, tuple[int, ...]], tuple[nn.Module, gator.ChannelGraph]] = {}
        self._curves: dict[tuple[str, tuple[int, ...], int], Curve] = {}

    def measure(self, model_json: str, architecture_json: str, batch_size: int, num_repeats: int) -> dict[str, Any]:
        """Return the fields of a Latency."""
        return vars(self._time(self._prune(model_json, _architecture(architecture_json)), batch_size, num_repeats))

    def measure_in_turns(
        self, networks: Sequence[tuple[str, str]], batch_size: int, num_repeats: int
    ) -> list[dict[str, Any]]:
        """Return a Latency's fields for each (model, architecture).

        What slows the machine down for a while hits all of them, and each number is the median over NUM_TURNS turns.
        """
        pruned = [self._prune(model_json, _architecture(text)) for model_json, text in networks]
        return [vars(latency) for latency in self._time_in_turns(pruned, batch_size, num_repeats)]

    def estimate(self, model_json: str, architecture_json: str, batch_size: int) -> float:
        """Return milliseconds, read off the curve of the network narrowed evenly, at the architecture's multiply-adds.

        The first call takes the curve.
        """
        architecture = _architecture(architecture_json)
        _, graph = self._trace(model_json, _image_shape(architecture))
        macs = gator.MacsCost(graph)
        key = (model_json, _image_shape(architecture), batch_size)
        if key not in self._curves:
            self._curves[key] = self._take_curve(model_json, graph, macs, batch_size)
        return float(np.interp(macs(architecture), *self._curves[key]))

    def _take_curve(self, model_json: str, graph: gator.ChannelGraph, macs: gator.MacsCost, batch_size: int) -> Curve:
        """Return multiply-adds and milliseconds, both rising."""
        narrowed = [
            gator.Architecture.from_keep(
                graph, {group.name: range(math.ceil(share * group.num_channels)) for group in graph.groups}
            )
            for share in sorted(CURVE_WIDTHS)
        ]
        pruned = [self._prune(model_json, architecture) for architecture in narrowed]
        latencies = self._time_in_turns(pruned, batch_size, NUM_TURNS * NUM_REPEATS_OF_ESTIMATE)
        medians_ms = np.maximum.accumulate([latency.median_ms for latency in latencies])
        return [macs(architecture) for architecture in narrowed], medians_ms.tolist()

    def _trace(self, model_json: str, image_shape: tuple[int, ...]) -> tuple[nn.Module, gator.ChannelGraph]:
        if (model_json, image_shape) not in self._traced:
            model = ModelConfig.model_validate_json(model_json)
            self._traced[model_json, image_shape] = build_traced(model, image_shape)
        return self._traced[model_json, image_shape]

    def _prune(self, model_json: str, architecture: gator.Architecture) -> _Pruned:
        network = gator.prune(*self._trace(model_json, _image_shape(architecture)), architecture)
        return _Pruned(network, architecture)

    def _time_in_turns(self, pruned: Sequence[_Pruned], batch_size: int, num_repeats: int) -> list[Latency]:
        num_repeats = math.ceil(num_repeats / NUM_TURNS)
        turns = [[self._time(network, batch_size, num_repeats) for network in pruned] for _ in range(NUM_TURNS)]
        return [_median_latency(latencies) for latencies in zip(*turns, strict=True)]

    def _time(self, pruned: _Pruned, batch_size: int, num_repeats: int) -> Latency:
        clock = DeviceClock(_image_shape(pruned.architecture), self._num_threads)
        return clock.measure(pruned.network, pruned.architecture, batch_size=batch_size, num_repeats=num_repeats)


def _architecture(text: str) -> gator.Architecture:
    return gator.Architecture.from_json(json.loads(text))


def _image_shape(architecture: gator.Architecture) -> tuple[int, ...]:
    return architecture.input_shapes[0][1:]


def _median_latency(latencies: Sequence[Latency]) -> Latency:
    medians = {
        name: statistics.median(getattr(latency, name) for latency in latencies)
        for name in ("median_ms", "p10_ms", "p90_ms")
    }
    return Latency(**medians, device=latencies[0].device)


def start_probe(profile: ProfileConfig, cluster: ClusterConfig) -> ActorHandle:
    """Start the search's probe; it lives as long as the driver, and Ray starts it again when it dies."""
    options: dict[str, Any] = {"num_cpus": 0}
    if cluster.measure_on is not None:
        options["resources"] = {cluster.measure_on: 0.001}
    env = {"OMP_NUM_THREADS": str(profile.num_threads), **_PROBE_ENV}
    probe = ray.remote(LatencyProbe).options(
        name=PROBE_NAME,
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=2,
        runtime_env={"env_vars": env},
        **options,
    )
    return probe.remote(profile.num_threads)


def example_images(input_shape: tuple[int, ...], batch_size: int) -> Tensor:
    """Return random images, (batch_size, 3, H, W), without touching the global generator."""
    return torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))


def build_traced(model: ModelConfig, input_shape: tuple[int, ...]) -> tuple[nn.Module, gator.ChannelGraph]:
    """Build the unpruned network, its weights still random, and trace it as every process does: architectures fit."""
    network = models.build(model.model_copy(update={"weights": None}))
    return network, gator.trace(network, example_images(input_shape, 2))

"""How fast a network is: one interface, three clocks.

ProbeClock    CPU: the networks of all trials are timed one after another in a process of their own, so that neither
              another measurement nor the heap of a training process disturbs them. It reads the process's CPU time,
              which other trials on the same cores hardly move.
DeviceClock   CUDA: the worker times the network where it trained, while the other ranks wait.
ModelClock    no clock: so many multiply-adds per millisecond. For runs that must give the same numbers twice.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

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


class ProbeClock:
    """Latency from the search's LatencyProbe."""

    def __init__(self, probe: ActorHandle, model: ModelConfig, input_shape: tuple[int, ...]) -> None:
        self._probe = probe
        self._model_json = model.model_dump_json()
        self._input_shape = input_shape

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Have the probe build, prune and time the same architecture; the weights do not matter to the time."""
        answer = self._probe.measure.remote(
            self._model_json, json.dumps(architecture.to_json()), self._input_shape, batch_size, num_repeats
        )
        return Latency(**ray.get(answer))


def make_clock(config: TrialConfig, input_shape: tuple[int, ...], macs: gator.MacsCost, device: torch.device) -> Clock:
    """Return the clock for networks that were trained on the device: profile.clock decides, then where they run.

    Without Ray there is no probe, and the process times its own network, also on the CPU.
    """
    if config.profile.clock == "model":
        return ModelClock(macs)
    if device.type != "cpu" or not ray.is_initialized():
        return DeviceClock(input_shape, config.profile.num_threads)
    return ProbeClock(ray.get_actor(PROBE_NAME), config.model, input_shape)


def measure_latencies(
    clock: Clock, network: nn.Module, architecture: gator.Architecture, profile: ProfileConfig
) -> dict[str, Any]:
    """Return the latency columns of results.parquet: the first batch size with spread and device, other medians."""
    first, *others = (
        (size, clock.measure(network, architecture, batch_size=size, num_repeats=profile.num_repeats))
        for size in profile.batch_sizes
    )
    latency = first[1]
    return {
        "latency_ms": latency.median_ms,
        "latency_p10_ms": latency.p10_ms,
        "latency_p90_ms": latency.p90_ms,
        "latency_device": latency.device,
        **{f"latency_ms_b{size}": other.median_ms for size, other in others},
    }


class LatencyProbe:
    """Times networks on the CPU of its node, one at a time; a Ray actor, made by `start_probe`."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._traced: dict[tuple[str, tuple[int, ...]], tuple[nn.Module, gator.ChannelGraph]] = {}

    def measure(
        self, model_json: str, architecture_json: str, input_shape: tuple[int, ...], batch_size: int, num_repeats: int
    ) -> dict[str, Any]:
        """Return the fields of a Latency."""
        key = (model_json, tuple(input_shape))
        if key not in self._traced:
            self._traced[key] = build_traced(ModelConfig.model_validate_json(model_json), key[1])
        architecture = gator.Architecture.from_json(json.loads(architecture_json))
        network = gator.prune(*self._traced[key], architecture)
        latency = DeviceClock(key[1], self._num_threads).measure(
            network, architecture, batch_size=batch_size, num_repeats=num_repeats
        )
        return vars(latency)


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

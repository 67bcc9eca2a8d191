"""Measurers, which time calls and networks for latency tables: one process for each kind of accelerator of the cluster."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
import torch

import gator
from gator.latency.measurement import Conditions
from gator.latency.op_timing import time_op, time_points
from gator.latency.table import NetworkTime, OpTime, Point
from orchestrator.cluster.processes import TIMING_ENV
from orchestrator.config.trial import ModelConfig, ProfileConfig
from orchestrator.errors import LatencyTableError, MeasurerError, in_one_line
from orchestrator.latency.onnx_layers import time_layer
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.timing import device_lock, time_networks
from orchestrator.models.networks import build_traced

logger = logging.getLogger(__name__)
Widths = dict[str, int]
WAIT_LOGGED_AFTER_S = 20.0
"""A measurer that has not started by then waits for a device, which a warning names."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure: a network, and under which settings."""

    model: ModelConfig
    image_size: int
    profile: ProfileConfig
    """With one batch size."""

    @property
    def batch_size(self) -> int:
        """Images of a forward pass."""
        return self.profile.batch_sizes[0]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return 3, self.image_size, self.image_size


class Measurer(Protocol):
    """Measures on one device."""

    def conditions(self, task: Task) -> Conditions:
        """Return the conditions of a task's times on this device."""

    def points(self, task: Task, points: Sequence[Point]) -> list[OpTime]:
        """Return the times of single calls, over one turn."""

    def networks(self, task: Task, widths: Sequence[Widths]) -> list[NetworkTime]:
        """Return the times of whole networks."""


class LocalMeasurer:
    """Measures in this process, holding the lock of the device."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def conditions(self, task: Task) -> Conditions:
        """See Measurer."""
        return Timing.on(self._device, task.profile).conditions(task.input_shape, task.batch_size)

    def points(self, task: Task, points: Sequence[Point]) -> list[OpTime]:
        """See Measurer."""
        conditions = self.conditions(task)
        timer = time_layer if conditions.runtime == "onnxruntime" else time_op
        with device_lock(self._device):
            return list(time_points(points, partial(timer, conditions=conditions)))

    def networks(self, task: Task, widths: Sequence[Widths]) -> list[NetworkTime]:
        """See Measurer. Every network is timed in turn with all others; architectures of equal widths take equal time."""
        network, graph = build_traced(task.model, task.input_shape)
        timing = Timing.on(self._device, task.profile)
        keeps = [{name: range(width) for name, width in one.items()} for one in widths]
        architectures = [gator.Architecture.from_keep(graph, keep) for keep in keeps]
        timers = [
            timing.timer(gator.prune(network, graph, architecture), task.input_shape, task.batch_size)
            for architecture in architectures
        ]
        with device_lock(self._device):
            measured = time_networks(timers)
        return [
            NetworkTime(
                fingerprint=graph.fingerprint,
                input_shape=graph.input_shapes[0][1:],
                widths=architecture.widths,
                noisy=one.is_disturbed or not is_settled,
                **{name: getattr(one, name) for name in ("median_ms", "p10_ms", "p90_ms", "n")},
            )
            for architecture, (one, is_settled) in zip(architectures, measured, strict=True)
        ]


class RemoteMeasurer:
    """Measures in a Ray actor, a process that has never trained. accelerator: Ray's name of a GPU; None for a CPU."""

    def __init__(self, accelerator: str | None, num_threads: int, measure_on: str | None) -> None:
        self._place = "CPU" if accelerator is None else accelerator
        resources = {} if accelerator is None else {f"accelerator_type:{accelerator}": 0.001}
        if measure_on is not None:
            self._place += f" of {measure_on}"
            resources[measure_on] = 0.001
        self._actor = (
            ray.remote(LocalMeasurer)
            .options(
                num_cpus=0,
                num_gpus=0 if accelerator is None else 1,
                resources=resources,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(num_threads), **TIMING_ENV}},
            )
            .remote("cpu" if accelerator is None else "cuda")
        )

    def conditions(self, task: Task) -> Conditions:
        """See Measurer."""
        return self._ask("conditions", task)

    def points(self, task: Task, points: Sequence[Point]) -> list[OpTime]:
        """See Measurer."""
        return self._ask("points", task, list(points))

    def networks(self, task: Task, widths: Sequence[Widths]) -> list[NetworkTime]:
        """See Measurer."""
        return self._ask("networks", task, list(widths))

    def stop(self) -> None:
        """End the process, also in the middle of a measurement; its caller then gets a MeasurerError."""
        ray.kill(self._actor)

    def _ask(self, name: str, *arguments: Any) -> Any:
        answer = getattr(self._actor, name).remote(*arguments)
        if name == "conditions" and not ray.wait([answer], timeout=WAIT_LOGGED_AFTER_S)[0]:
            logger.warning(
                "the measurement waits for a free %s: another program holds it, or its node is not up yet", self._place
            )
        try:
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, gator.GatorError):
                raise error.cause from None
            raise MeasurerError(f"{self._place}: {in_one_line(error.cause)}") from error
        except ray.exceptions.RayError as error:
            raise MeasurerError(
                f"{self._place}: the measurement process crashed ({in_one_line(error)}), most often because of insufficient memory"
            ) from error


def accelerators(measure_on: str | None) -> list[str | None]:
    """Return the kinds of GPUs of the nodes on which latency is measured; [None], a CPU, where they have none.

    measure_on: the resource that such nodes have; None for all nodes.

    Raises: LatencyTableError if no node has it, or a node has GPUs of a kind that Ray does not name.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if measure_on is not None:
        nodes = [node for node in nodes if node["Resources"].get(measure_on)]
        if not nodes:
            raise LatencyTableError(
                f"measure_on: no node of the cluster has the resource {measure_on}; start one with "
                f"`ray start --resources='{{\"{measure_on}\": 1}}'`, or name another resource in the cluster's YAML"
            )
    kinds: set[str] = set()
    for node in nodes:
        if node["Resources"].get("GPU"):
            kinds |= _kinds_of(node)
    return [*sorted(kinds)] or [None]


def _kinds_of(node: dict[str, Any]) -> set[str]:
    kinds = {name.partition(":")[2] for name in node["Resources"] if name.startswith("accelerator_type:")}
    if not kinds:
        raise LatencyTableError(
            f"node {node['NodeManagerAddress']} has GPUs of a kind that Ray does not name, so their table could be confused with that "
            "of another kind; start it with `ray start --resources='{\"accelerator_type:NAME\": 1}'`"
        )
    return kinds

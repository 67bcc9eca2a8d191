"""Building latency tables on every kind of accelerator of a cluster: what the verb `measure` does.

One Measurer for each kind, an actor of its own process on a node that has it. It measures one thing at a time, holds the
GPU as a whole, and is told what to measure in small portions; after each of them the table's file is complete and the
time left is known, so that a build that is stopped goes on where it was.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
import torch
from torch import Tensor, nn

import gator
from gator.latency import Conditions, Mode
from gator.latency_table import LatencyTable, NetworkTime, OpTime, Point, completed, time_op, time_points
from orchestrator.build_progress import Steps
from orchestrator.config import ModelConfig
from orchestrator.errors import LatencyTableError
from orchestrator.latency_files import read_table, table_path, table_text, write_table
from orchestrator.measure import TIMING_ENV, build_traced, device_lock, time_networks

Method = Literal["table", "halving"]
Widths = dict[str, int]
Step = Callable[[int, int, str], None]
Store = Callable[[LatencyTable], None]

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
NUM_CALIBRATION = 12
"""Whole networks that a table is calibrated with."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure: a network, and under which settings."""

    model: ModelConfig
    image_size: int
    batch_size: int
    dtype: str
    """PyTorch's name: float32."""
    mode: Mode
    num_threads: int
    method: Method


class Measurer(Protocol):
    """What measures on one device."""

    def conditions(self, task: Task) -> Conditions:
        """Return what the times of a task hold for on this device."""

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
        return gator.time_forward(
            nn.ReLU(), self._images(task), mode=task.mode, num_repeats=1, num_threads=task.num_threads
        ).conditions

    def points(self, task: Task, points: Sequence[Point]) -> list[OpTime]:
        """See Measurer."""
        with device_lock(self._device):
            return list(time_points(points, partial(time_op, conditions=self.conditions(task))))

    def networks(self, task: Task, widths: Sequence[Widths]) -> list[NetworkTime]:
        """See Measurer. Every network is timed in turn with all others; architectures of equal widths take equal time."""
        network, graph = build_traced(task.model, (3, task.image_size, task.image_size))
        network = network.to(self._device, getattr(torch, task.dtype))
        architectures = [
            gator.Architecture.from_keep(graph, {name: range(width) for name, width in one.items()}) for one in widths
        ]
        pruned = [gator.prune(network, graph, architecture) for architecture in architectures]
        with device_lock(self._device):
            measured = time_networks(pruned, self._images(task), mode=task.mode, num_threads=task.num_threads)
        return [
            NetworkTime(
                fingerprint=graph.fingerprint,
                input_shape=graph.input_shapes[0][1:],
                widths=architecture.widths,
                **{name: getattr(one, name) for name in ("median_ms", "p10_ms", "p90_ms", "n")},
            )
            for architecture, (one, _) in zip(architectures, measured, strict=True)
        ]

    def _images(self, task: Task) -> Tensor:
        shape = (task.batch_size, 3, task.image_size, task.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return images.to(self._device, getattr(torch, task.dtype))


class RemoteMeasurer:
    """Asks an actor of Ray, a process that has never trained."""

    def __init__(self, accelerator: str | None, num_threads: int, measure_on: str | None) -> None:
        resources = {} if accelerator is None else {f"accelerator_type:{accelerator}": 0.001}
        if measure_on is not None:
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

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, name).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def accelerators() -> list[str | None]:
    """Return the kinds of GPUs that the nodes have; [None], a CPU, where there are none."""
    names = [name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
    return [*sorted(names)] or [None]


def build_everywhere(tasks: Sequence[Task], folder: Path, measure_on: str | None, steps: Steps) -> list[Path]:
    """Build the tables of all tasks on every kind of accelerator, the kinds at the same time; return the files."""

    def build_on(accelerator: str | None) -> list[Path]:
        measurer = RemoteMeasurer(accelerator, tasks[0].num_threads, measure_on)
        return [build(task, measurer, folder, steps) for task in tasks]

    kinds = accelerators()
    with ThreadPoolExecutor(max_workers=len(kinds)) as pool:
        return [path for paths in pool.map(build_on, kinds) for path in paths]


def build(task: Task, measurer: Measurer, folder: Path, steps: Steps) -> Path:
    """Build one table, or what its file lacks, and return the file.

    Raises: LatencyTableError if the network cannot be traced, the mode is not for the device, a layer cannot be timed alone,
    or the file is damaged; what was measured before stays in the file.
    """
    if task.mode == "compile" and task.method == "table":
        raise LatencyTableError(
            "mode compile fuses calls with their neighbours, so that single calls do not add up; use --method halving"
        )
    try:
        _, graph = build_traced(task.model, (3, task.image_size, task.image_size))
        conditions = measurer.conditions(task)
    except gator.GatorError as error:
        raise LatencyTableError(f"{task.model.name} at {task.image_size} px: {error}") from error
    path = table_path(folder, task.model.name, task.image_size, conditions)
    table = read_table(path, conditions) if path.exists() else LatencyTable(conditions)
    step = partial(steps.step, f"{conditions.device}, batch {task.batch_size}")
    store = partial(write_table, path)
    try:
        if task.method == "table":
            table = _with_points(table, graph, task, measurer, step, store)
        _with_networks(table, graph, task, measurer, step, store)
    except gator.LatencyError as error:
        raise LatencyTableError(f"{task.model.name}: {error} (what was measured is kept in {path})") from error
    return path


def _with_points(
    table: LatencyTable, graph: gator.ChannelGraph, task: Task, measurer: Measurer, step: Step, store: Store
) -> LatencyTable:
    grown = table
    if num_left := table.turns_to_go(graph):
        step(0, num_left, "timings")
    for grown in completed(table, graph, partial(measurer.points, task)):
        num_done = sum(op.num_turns for op in grown.ops) - sum(op.num_turns for op in table.ops)
        store(grown)
        step(num_done, grown.turns_to_go(graph), "timings")
    return grown


def _with_networks(
    table: LatencyTable, graph: gator.ChannelGraph, task: Task, measurer: Measurer, step: Step, store: Store
) -> None:
    known = [dict(time.widths) for time in table.networks_of(graph)]
    wanted = halved_widths(graph) if task.method == "halving" else calibration_widths(graph)
    missing = [widths for widths in wanted if widths not in known]
    if missing:
        step(0, len(missing), "whole networks")
        store(table.with_networks(measurer.networks(task, missing)))


def calibration_widths(graph: gator.ChannelGraph, count: int = NUM_CALIBRATION) -> list[Widths]:
    """Return the widths of the networks for the calibration: the unpruned one, and random ones at all sizes, some blocks gone."""
    generator = torch.Generator().manual_seed(0)

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    architectures = [gator.Architecture.full(graph)]
    for number in range(count - 1):
        centre = 0.2 + 0.8 * (number + 1) / count
        keep: dict[str, range] = {
            group.name: range(max(1, round(min(1.0, centre * (0.7 + 0.6 * uniform())) * group.num_channels)))
            for group in graph.groups
        }
        keep |= {block.groups[0]: range(0) for block in graph.blocks if uniform() < 0.15}
        architectures.append(gator.Architecture.from_keep(graph, keep))
    return [architecture.widths for architecture in architectures]


def halved_widths(graph: gator.ChannelGraph) -> list[Widths]:
    """Return the unpruned widths, and those with one group halved, for each group."""
    full = {group.name: group.num_channels for group in graph.groups}
    return [full, *({**full, name: max(1, width // 2)} for name, width in full.items())]


def result_text(path: Path, task: Task) -> str:
    """Return what a finished table says of its network."""
    _, graph = build_traced(task.model, (3, task.image_size, task.image_size))
    return f"{path}: {table_text(graph, read_table(path))}"

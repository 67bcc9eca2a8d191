"""Building latency tables on every kind of accelerator of a cluster, for the command `measure`.

A measurer times a small portion of points at a time. After each portion the table's file is complete and the time left is
known, so a build that was stopped can resume.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import gator
from gator.latency.op_timing import completed
from gator.latency.table import CALL_RUNTIMES, LatencyTable
from orchestrator.errors import LatencyTableError, MeasurerError
from orchestrator.latency.build_progress import BuildProgress
from orchestrator.latency.measurers import Measurer, RemoteMeasurer, Task, Widths, accelerators
from orchestrator.latency.tables import read_table, table_path, table_text, write_table
from orchestrator.models.networks import build_traced
from orchestrator.storage.files import remove_old_leftovers

Step = Callable[[int, int, str], None]
Store = Callable[[LatencyTable], None]
NUM_CALIBRATION = 12
"""Whole networks that calibrate a table."""


def build_everywhere(
    tasks: Sequence[Task], folder: Path, measure_on: str | None, progress: BuildProgress
) -> list[tuple[Path, Task]]:
    """Build the tables of all tasks on every kind of accelerator, the kinds at the same time; return the files.

    A kind that fails does not stop the measurements of the others.

    Raises: LatencyTableError, see build and accelerators; MeasurerError, with what was measured kept.
    """

    def build_on(measurer: RemoteMeasurer) -> list[tuple[Path, Task]]:
        return [(build(task, measurer, folder, progress), task) for task in tasks]

    remove_old_leftovers(folder)
    measurers = [RemoteMeasurer(kind, tasks[0].profile.num_threads, measure_on) for kind in accelerators(measure_on)]
    with ThreadPoolExecutor(max_workers=len(measurers)) as pool:
        try:
            builds = [pool.submit(build_on, measurer) for measurer in measurers]
            wait(builds)
        finally:  # after an interrupt too: the threads end when the processes that they wait for are gone
            for measurer in measurers:
                measurer.stop()
    return [built for one in builds for built in one.result()]


def build(task: Task, measurer: Measurer, folder: Path, progress: BuildProgress) -> Path:
    """Build one table, or add the missing points to its file, and return the file.

    The table of a runtime that fuses calls has the times of PyTorch's for those it does not time alone, from a table of its own.

    Raises: LatencyTableError if the network cannot be traced, the runtime is not for the device, a layer cannot be timed alone,
    or the file is damaged; MeasurerError if the device or its process fails. What was measured before stays in the file.
    """
    try:
        _, graph = build_traced(task.model, task.input_shape)
        conditions = measurer.conditions(task)
    except gator.GatorError as error:
        raise LatencyTableError(f"{task.model.name} at {task.image_size} px: {error}") from error
    path = table_path(folder, task.model, task.image_size, conditions)
    table = read_table(path, conditions) if path.exists() else LatencyTable(conditions)
    if (
        conditions.runtime not in CALL_RUNTIMES
    ):  # what it fuses cannot be timed apart: PyTorch's calls, fitted to its whole networks
        calls = read_table(build(_with_calls(task), measurer, folder, progress))
        table = with_calls_of(table, calls)
    step = partial(progress.step, f"{conditions.device}, batch {task.batch_size}")
    store = partial(write_table, path)
    try:
        table = _with_points(table, own_calls(table, graph), task, measurer, step, store)
        _with_networks(table, graph, task, measurer, step, store)
    except (gator.LatencyError, MeasurerError) as error:
        kind = MeasurerError if isinstance(error, MeasurerError) else LatencyTableError
        kept = f"{path} has all results so far; rerun the same command to resume" if path.exists() else "no results yet"
        raise kind(f"{task.model.name}: {error} ({kept})") from error
    return path


def with_calls_of(table: LatencyTable, calls: LatencyTable) -> LatencyTable:
    """Return the table with its own times, and those of `calls` for the kinds that its runtime does not time alone."""
    own = [time for time in table.ops if table.is_own(time.kind)]
    return replace(table, ops=(*own, *(time for time in calls.ops if not table.is_own(time.kind))))


def own_calls(table: LatencyTable, graph: gator.ChannelGraph) -> gator.ChannelGraph:
    """Return the graph with only those calls that the table's runtime times alone."""
    return replace(graph, ops=tuple(op for op in graph.ops if table.is_own(op.kind)))


def _with_calls(task: Task) -> Task:
    """Return the task in the runtime of PyTorch that has times of single calls."""
    return replace(task, profile=task.profile.model_copy(update={"runtime": "auto", "layout": "auto"}))


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
    missing = [widths for widths in calibration_widths(graph, table.width_step) if widths not in known]
    if missing:
        step(0, len(missing), "whole networks")
        store(table.with_networks(measurer.networks(task, missing)))


def calibration_widths(graph: gator.ChannelGraph, step: int = 1, count: int = NUM_CALIBRATION) -> list[Widths]:
    """Return the widths of the calibration networks: the unpruned one, and random ones of all sizes, some without a block.

    step: widths are multiples of this, or that of the whole group.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    architectures = [gator.Architecture.full(graph)]
    for number in range(count - 1):
        centre = 0.2 + 0.8 * (number + 1) / count
        keep: dict[str, range] = {
            group.name: range(in_steps(min(1.0, centre * (0.7 + 0.6 * uniform())) * group.num_channels, group, step))
            for group in graph.groups
        }
        keep |= {block.groups[0]: range(0) for block in graph.blocks if uniform() < 0.15}
        architectures.append(gator.Architecture.from_keep(graph, keep))
    return [architecture.widths for architecture in architectures]


def in_steps(width: float, group: gator.ChannelGroup, step: int) -> int:
    """Return the nearest width of a group that is a multiple of step; at least one step, at most the whole group."""
    return min(group.num_channels, max(step, round(width / step) * step))


def result_text(path: Path, task: Task) -> str:
    """Return the description of a network by its finished table."""
    _, graph = build_traced(task.model, task.input_shape)
    return f"{path}: {table_text(graph, read_table(path))}"

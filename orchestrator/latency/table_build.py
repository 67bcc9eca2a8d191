"""Building latency tables on every kind of accelerator of a cluster: what the verb `measure` does.

A measurer is told what to time in small portions. After each of them the table's file is complete and the time left is
known, so that a build that is stopped goes on where it was.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch

import gator
from gator.latency.op_timing import completed
from gator.latency.table import LatencyTable
from orchestrator.errors import LatencyTableError, MeasurerError
from orchestrator.latency.build_progress import Steps
from orchestrator.latency.measurers import Measurer, RemoteMeasurer, Task, Widths, accelerators
from orchestrator.latency.tables import read_table, table_path, table_text, write_table
from orchestrator.models.networks import build_traced
from orchestrator.storage.files import remove_old_leftovers

Step = Callable[[int, int, str], None]
Store = Callable[[LatencyTable], None]
NUM_CALIBRATION = 12
"""Whole networks that a table is calibrated with."""


def build_everywhere(
    tasks: Sequence[Task], folder: Path, measure_on: str | None, steps: Steps
) -> list[tuple[Path, Task]]:
    """Build the tables of all tasks on every kind of accelerator, the kinds at the same time; return the files.

    A kind that fails does not keep the others from being measured to their end.

    Raises: LatencyTableError, see build and accelerators; MeasurerError, with what was measured kept.
    """

    def build_on(measurer: RemoteMeasurer) -> list[tuple[Path, Task]]:
        return [(build(task, measurer, folder, steps), task) for task in tasks]

    remove_old_leftovers(folder)
    measurers = [RemoteMeasurer(kind, tasks[0].num_threads, measure_on) for kind in accelerators(measure_on)]
    with ThreadPoolExecutor(max_workers=len(measurers)) as pool:
        try:
            builds = [pool.submit(build_on, measurer) for measurer in measurers]
            wait(builds)
        finally:  # also of an interrupt: the threads end when the processes they wait for are gone
            for measurer in measurers:
                measurer.stop()
    return [built for one in builds for built in one.result()]


def build(task: Task, measurer: Measurer, folder: Path, steps: Steps) -> Path:
    """Build one table, or what its file lacks, and return the file.

    Raises: LatencyTableError if the network cannot be traced, the mode is not for the device, a layer cannot be timed alone,
    or the file is damaged; MeasurerError if the device or its process fails. What was measured before stays in the file.
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
    path = table_path(folder, task.model, task.image_size, conditions)
    table = read_table(path, conditions) if path.exists() else LatencyTable(conditions)
    step = partial(steps.step, f"{conditions.device}, batch {task.batch_size}")
    store = partial(write_table, path)
    try:
        if task.method == "table":
            table = _with_points(table, graph, task, measurer, step, store)
        _with_networks(table, graph, task, measurer, step, store)
    except (gator.LatencyError, MeasurerError) as error:
        kind = MeasurerError if isinstance(error, MeasurerError) else LatencyTableError
        kept = (
            f"what was measured is kept in {path}, and the same command goes on" if path.exists() else "nothing is kept"
        )
        raise kind(f"{task.model.name}: {error} ({kept})") from error
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

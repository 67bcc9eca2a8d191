"""Timing networks so that the times can be trusted: alone on the device, made again when disturbed, in turns, in a process that
never trained.

Cores share caches and memory with whatever trains beside them: on 2 cores the same network took up to twice as long while
another trial trained, also by the CPU time of a process of its own. So nothing is timed on a CPU while anything trains.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor, nn

import gator
from orchestrator.cluster import ClusterConfig
from orchestrator.config import ProfileConfig
from orchestrator.errors import MeasurerError, in_one_line
from orchestrator.paths import open_lock

NUM_REPEATS_OF_ESTIMATE = 20
MIN_TURNS, MAX_TURNS = 5, 15
"""In turns, every network is timed so many times, each time after all the others: more often until all are settled."""
SETTLED = 0.05
"""A network is settled when its two fastest turns lie within this share of each other."""
MAX_ATTEMPTS = 3
"""A measurement that was disturbed is made again, so often at most."""

# glibc gives large blocks back to the kernel when they are freed, and asks for them again in the next forward pass:
# page faults in the timing. 32 MiB is the largest threshold that every glibc accepts.
TIMING_ENV = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

T = TypeVar("T")


def time_calmly(network: nn.Module, images: Tensor, **settings: Any) -> gator.LatencyMeasurement:
    """Return the calmest of up to MAX_ATTEMPTS measurements: the first that is not noisy, else the one of least spread."""
    attempts: list[gator.LatencyMeasurement] = []
    while len(attempts) < MAX_ATTEMPTS:
        attempts.append(gator.time_forward(network, images, **settings))
        if not attempts[-1].is_noisy:
            return attempts[-1]
    return min(attempts, key=lambda measured: measured.spread)


def time_networks(
    networks: Sequence[nn.Module], images: Tensor, *, num_repeats: int = NUM_REPEATS_OF_ESTIMATE, **settings: Any
) -> list[tuple[gator.LatencyMeasurement, bool]]:
    """Return each network's fastest turn, and whether it is settled; num_repeats: in a turn.

    Whatever else runs can only add time, for as long as it runs: beside six busy processes on 2 cores the turns of one
    network lay between 0.85 and 1.7 ms, and the fastest of 5 between 0.79 and 0.95 (16 copies of it, 14 of them so).
    """
    turns: list[list[gator.LatencyMeasurement]] = [[] for _ in networks]
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and all(map(_is_settled, turns)):
            break
        for network, done in zip(networks, turns, strict=True):
            done.append(gator.time_forward(network, images, num_repeats=num_repeats, **settings))
    return [(_fastest(done), _is_settled(done)) for done in turns]


def _fastest(turns: Sequence[gator.LatencyMeasurement]) -> gator.LatencyMeasurement:
    return min(turns, key=lambda measured: measured.median_ms)


def _is_settled(turns: Sequence[gator.LatencyMeasurement]) -> bool:
    fastest_ms, second_ms = sorted(measured.median_ms for measured in turns)[:2]
    return second_ms <= (1 + SETTLED) * fastest_ms


@contextmanager
def device_lock(device: torch.device) -> Iterator[None]:
    """Hold a device of this node while measuring: of all processes of this user that ask, one does at a time.

    A file lock, which the system takes back from a process that dies. A GPU goes by its UUID: cuda:0 is another one in
    each process that Ray gave one to.    Raises: RunDirError if the file is a link.
    """
    which = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
    name = re.sub(r"\W", "_", f"gator_measure_{os.getuid()}_{which}")
    # where everybody may write: a link there would lead whoever opens it to a file of its own
    with open_lock(Path(tempfile.gettempdir()) / f"{name}.lock", mode=0o600) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measuring_device(cluster: ClusterConfig) -> str:
    """Return the device that networks are timed on: cuda, or cpu."""
    return "cuda" if cluster.gpus_to_measure else "cpu"


def in_own_process(
    function: Callable[..., T], *arguments: Any, profile: ProfileConfig, cluster: ClusterConfig, num_gpus: float = 0
) -> T:
    """Return what the function returns in a new process, on a node where networks are measured; here without Ray.

    A process that has trained is no place to time a network: its heap is in pieces, and its allocator set otherwise.
    arguments: plain values. Raises: what the function raises; MeasurerError if the process dies twice.
    """
    if not ray.is_initialized():
        return function(*arguments)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus, "max_calls": 1, "max_retries": 1}
    if cluster.measure_on is not None:
        options["resources"] = {cluster.measure_on: 0.001}
    options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(profile.num_threads), **TIMING_ENV}}
    task = ray.remote(**options)(function)
    try:
        result: T = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise MeasurerError(
            f"the process that runs {function.__name__.strip('_')} was lost twice ({in_one_line(error)}); out of memory is the most "
            "frequent reason; what is recorded is kept, and the same command goes on"
        ) from error
    return result

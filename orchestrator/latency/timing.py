"""Timing networks reliably: alone on the device, repeated when disturbed, in turns, in a process that never trained.

Cores share caches and memory with whatever trains next to them: on 2 cores the same network took up to twice as long while
another trial trained, also by the CPU time of a separate process. So nothing is timed on a CPU while anything trains.
"""

import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import gator
from orchestrator.latency.record import Latency, measured_latency
from orchestrator.latency.runtimes import Timer
from orchestrator.storage.files import lock, open_lock

NUM_REPEATS_OF_ESTIMATE = 20
MIN_TURNS, MAX_TURNS = 5, 15
"""Turns of every network, each after all other networks: at least the first number, more until all networks are settled."""
SETTLED = 0.05
"""A network is settled when its two fastest turns differ by at most this share."""
MAX_ATTEMPTS = 3
"""Of a measurement that is disturbed each time."""


def time_calmly(timer: Timer, num_repeats: int) -> gator.LatencyMeasurement:
    """Return the calmest of up to MAX_ATTEMPTS measurements: the first that is not noisy, else the one of least spread."""
    attempts: list[gator.LatencyMeasurement] = []
    while len(attempts) < MAX_ATTEMPTS:
        attempts.append(timer.time(num_repeats=num_repeats))
        if not attempts[-1].is_noisy:
            return attempts[-1]
    return min(attempts, key=lambda measured: measured.spread)


def time_networks(
    timers: Sequence[Timer], num_repeats: int = NUM_REPEATS_OF_ESTIMATE
) -> list[tuple[gator.LatencyMeasurement, bool]]:
    """Return each network's fastest turn, and whether it is settled; num_repeats: in a turn.

    Other programs can only add time: next to six busy processes on 2 cores the turns of one network took between 0.85 and
    1.7 ms, and the fastest of 5 between 0.79 and 0.95 (16 copies of it, 14 of them settled).
    """
    turns: list[list[gator.LatencyMeasurement]] = [[] for _ in timers]
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and all(map(_is_settled, turns)):
            break
        for timer, done in zip(timers, turns, strict=True):
            done.append(timer.time(num_repeats=num_repeats))
    return [(min(done, key=lambda measured: measured.median_ms), _is_settled(done)) for done in turns]


def _is_settled(turns: Sequence[gator.LatencyMeasurement]) -> bool:
    fastest_ms, second_ms = sorted(measured.median_ms for measured in turns)[:2]
    return second_ms <= (1 + SETTLED) * fastest_ms


@contextmanager
def device_lock(device: torch.device) -> Iterator[None]:
    """Hold a device of this node while measuring: one process of this user at a time.

    A file lock, which the system releases when its process dies. A GPU is named by its UUID: cuda:0 is a different GPU in
    each process that Ray gave one to.    Raises: RunDirError if the file is a link.
    """
    which = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
    name = re.sub(r"\W", "_", f"gator_measure_{os.getuid()}_{which}")
    # Everybody may write to this folder: a link there would make this process open another file.
    path = Path(tempfile.gettempdir()) / f"{name}.lock"
    with open_lock(path, mode=0o600) as file:
        lock(file, path, waits=True)
        yield


def time_in_turns(timers: Sequence[Timer], num_repeats: int, device: torch.device) -> list[Latency]:
    """Return the latency of each network in its fastest turn; num_repeats: of each network, over MIN_TURNS turns."""
    with device_lock(device):
        measured = time_networks(timers, math.ceil(num_repeats / MIN_TURNS))
    return [
        measured_latency(one, noisy=one.is_disturbed or not is_settled, file_sha256=timer.file_sha256)
        for timer, (one, is_settled) in zip(timers, measured, strict=True)
    ]

"""Timing: a process that never trained, again when disturbed, one at a time on a device."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from torch import nn

import gator
from orchestrator.cluster.processes import TIMING_ENV, in_own_process
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import ProfileConfig
from orchestrator.errors import MeasurerError, RunDirError
from orchestrator.latency.runtimes import Timer
from orchestrator.latency.timing import device_lock, time_calmly

FRESH_AGAINST_TRAINED = """
import json
import torch
from orchestrator.config.trial import ProfileConfig
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.timing import time_networks
from torchvision.models import resnet18

def timed():
    timing = Timing.on(torch.device("cpu"), ProfileConfig())
    ((measured, _),) = time_networks([timing.timer(network, (3, 96, 96), 8)], num_repeats=10)
    return measured.median_ms

torch.set_num_threads(1)
network, images = resnet18(num_classes=10), torch.randn(8, 3, 96, 96)
fresh = timed()
optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
for _ in range(5):
    network(images).square().mean().backward()
    optimizer.step()
print(json.dumps([fresh, timed()]))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_network_takes_as_long_in_a_fresh_process_as_after_training() -> None:
    """With glibc's own thresholds a fresh process may pay for page faults: seen were 25 ms against 11.5."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **TIMING_ENV}
    command = [sys.executable, "-c", FRESH_AGAINST_TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    fresh_ms, trained_ms = json.loads(done.stdout)
    assert fresh_ms == pytest.approx(trained_ms, rel=0.25)  # fastest turns; what else runs can still move them


def test_function_runs_here_without_ray() -> None:
    profile, cluster = ProfileConfig(), ClusterConfig()
    assert in_own_process(lambda number: (os.getpid(), number), 3, profile=profile, cluster=cluster) == (os.getpid(), 3)


def test_a_process_that_is_lost_is_told_by_what_it_was_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_lost(task: object) -> None:
        raise ray.exceptions.WorkerCrashedError

    def _measure_it() -> None: ...

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: SimpleNamespace(remote=function))
    monkeypatch.setattr(ray, "get", is_lost)
    with pytest.raises(
        MeasurerError, match=r"runs measure_it crashed twice \(WorkerCrashedError: .*rerun the same command to resume"
    ):
        in_own_process(_measure_it, profile=ProfileConfig(), cluster=ClusterConfig())


def test_what_is_timed_apart_asks_for_the_kind_of_gpu_of_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster of several kinds the unpruned network would else be timed on any of them."""
    asked: list[dict] = []

    def remote(**options: Any) -> Any:
        asked.append(options)
        return lambda function: SimpleNamespace(remote=function)

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda result: result)
    cluster = ClusterConfig(resources_per_worker={"CPU": 4, "GPU": 1, "accelerator_type:A10G": 0.001})
    assert in_own_process(lambda: 3, profile=ProfileConfig(), cluster=cluster, num_gpus=1) == 3
    assert (asked[0]["num_gpus"], asked[0]["resources"]) == (1, {"accelerator_type:A10G": 0.001})


def test_a_disturbed_measurement_is_made_again() -> None:
    template = gator.time_forward(nn.Identity(), torch.zeros(1), num_repeats=1)
    calm = dataclasses.replace(template, is_warm=True, median_ms=1.0, p10_ms=1.0, p90_ms=1.0)
    spreads = iter([0.9, 0.5, 0.0, 0.0])
    timer = Timer(time=lambda num_repeats: dataclasses.replace(calm, p90_ms=1 + next(spreads)))
    assert time_calmly(timer, num_repeats=1).spread == 0.0
    spreads = iter([0.9, 0.5, 0.7])
    found = time_calmly(timer, num_repeats=1)
    assert (found.spread, found.is_noisy) == (0.5, True)


def test_a_lock_that_is_a_link_leaves_alone_what_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "precious").write_text("thesis")
    (tmp_path / f"gator_measure_{os.getuid()}_cpu.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunDirError, match=r"gator_measure_.* is a link"), device_lock(torch.device("cpu")):
        pass
    assert (tmp_path / "precious").read_text() == "thesis"


def test_a_device_is_held_by_one_at_a_time() -> None:
    seen: list[str] = []

    def second() -> None:
        with device_lock(torch.device("meta")):
            seen.append("second")

    with device_lock(torch.device("meta")):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(timeout=0.2)
        seen.append("first")
    waiting.join()
    assert seen == ["first", "second"]

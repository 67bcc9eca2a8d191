"""What measures: on which kinds of accelerators, and what is said when its process waits, fails or is lost."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor, nn

from orchestrator.config.trial import ModelConfig, ProfileConfig
from orchestrator.errors import LatencyTableError, MeasurerError
from orchestrator.latency import measurers as measurers_measurers
from orchestrator.latency.measurers import LocalMeasurer, RemoteMeasurer, Task, accelerators
from orchestrator.latency.tables import read_table
from orchestrator.models import networks as measurers_networks
from tests.orchestrator.tiny_trial import TINY

TASK = Task(model=TINY.model, image_size=8, profile=ProfileConfig(batch_sizes=(2,)))


def node(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "NodeManagerAddress": address, "Resources": {"CPU": 8.0, **resources}}


H100, L4 = {"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 1.0, "accelerator_type:L4": 1.0}


@pytest.mark.parametrize(
    ("nodes", "measure_on", "kinds"),
    [
        ([node("a")], None, [None]),
        ([node("a"), node("b", **H100), node("c", **L4), node("d", **H100)], None, ["H100", "L4"]),
        ([node("a", **H100), node("b", alive=False, **L4)], None, ["H100"]),
        ([node("a", **H100), node("b", **L4, quiet=1.0)], "quiet", ["L4"]),  # trials train on the H100
        ([node("a", **H100), node("b", quiet=1.0)], "quiet", [None]),
    ],
)
def test_the_kinds_are_those_of_the_nodes_that_measure(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], measure_on: str | None, kinds: list[str | None]
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert accelerators(measure_on) == kinds


def test_gpus_without_a_name_and_a_resource_that_no_node_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", **H100), node("10.0.0.7", GPU=2.0)])
    with pytest.raises(LatencyTableError, match=r"node 10.0.0.7 has GPUs of a kind that Ray does not name"):
        accelerators(None)
    with pytest.raises(LatencyTableError, match=r"no node of the cluster has the resource quiet; start one with"):
        accelerators("quiet")


class Greedy(nn.Module):
    """Asks for more memory than there is, but not while it is traced."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            torch.empty(2**60)
        return self.second(self.first(x)).mean((2, 3))


def greedy(num_classes: int) -> nn.Module:
    """Return a network that cannot run."""
    return Greedy(num_classes)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, object_store_memory=150 * 2**20, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_who_waits_for_a_device_is_told_and_can_stop(
    ray_here: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measurers_measurers, "WAIT_LOGGED_AFTER_S", 1.0)
    measurer, failures = RemoteMeasurer(None, 1, measure_on="quiet"), []

    def ask() -> None:
        try:
            measurer.conditions(TASK)
        except MeasurerError as error:
            failures.append(str(error))

    with caplog.at_level(logging.WARNING):
        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.1)
    assert caplog.messages == [
        "the measurement waits for a free CPU of quiet: another program holds it, or its node is not up yet"
    ]
    measurer.stop()
    asking.join(timeout=60)
    assert failures
    assert failures[0].startswith("CPU of quiet: the measurement process crashed")


@pytest.mark.slow
def test_what_a_network_raises_is_said_in_a_line(ray_here: None) -> None:
    measurer = RemoteMeasurer(None, 1, measure_on=None)
    task = Task(
        model=ModelConfig(name=f"{__name__}:greedy", num_classes=4),
        image_size=8, profile=ProfileConfig(batch_sizes=(2,)),
    )  # fmt: skip
    with pytest.raises(MeasurerError, match=r"^CPU: RuntimeError: .*allocate"):
        measurer.networks(task, [{"first": 4}])
    measurer.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_build_that_is_stopped_keeps_what_it_has_and_goes_on(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    command = [
        sys.executable, "-m", "orchestrator.measure", "--model", "resnet8_cifar", "--kwargs", "width=4",
        "--image-size", "16", "--out", str(tmp_path),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as building:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.1)
        building.send_signal(signum)
        _, said = building.communicate(timeout=120)
    assert building.returncode == code, said
    assert (
        "measure: stopped; finished work is saved. Rerun the same command to resume: python -m orchestrator.measure"
        in said
    )
    (path,) = tmp_path.glob("resnet8_cifar-width=4_16px_b1_*.parquet")
    kept = read_table(path)
    assert kept.ops
    assert not kept.networks
    if signum == signal.SIGINT:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        assert "latency share  quotient" in done.stdout
        assert {op.point for op in kept.ops} <= {op.point for op in read_table(path).ops}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", ["eager", "cuda_graph"])
def test_a_gpu_measures_calls_and_networks(runtime: Any) -> None:
    task = Task(
        model=TINY.model, image_size=8, profile=ProfileConfig(batch_sizes=(2,), dtype="float16", runtime=runtime)
    )
    measurer = LocalMeasurer("cuda")
    assert measurer.conditions(task).device == torch.cuda.get_device_name()
    full = {
        group.name: group.num_channels for group in measurers_networks.build_traced(task.model, (3, 8, 8))[1].groups
    }
    (network,) = measurer.networks(task, [full])
    assert 0 < network.p10_ms <= network.median_ms

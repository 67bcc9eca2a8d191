"""How networks are timed: the profile's runtime, dtype and layout, the same for all that is compared."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from orchestrator.cluster.processes import TIMING_ENV
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import ProfileConfig
from orchestrator.errors import ConfigError
from orchestrator.latency.record import measured_latency
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.timing import time_networks
from orchestrator.models.networks import build_traced
from orchestrator.trial import feasibility
from tests.orchestrator.tiny_trial import TINY

SHAPE = (3, 8, 8)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "asked", "settings"),
    [
        ("cpu", {}, ("eager", "float32", "contiguous")),
        ("cuda", {}, ("cuda_graph", "float16", "channels_last")),
        ("cuda", {"runtime": "eager", "dtype": "float32"}, ("eager", "float32", "channels_last")),
        ("cpu", {"layout": "channels_last"}, ("eager", "float32", "channels_last")),
        ("cuda", {"runtime": "onnxruntime"}, ("onnxruntime", "float32", "contiguous")),
        ("cuda", {"runtime": "tensorrt"}, ("tensorrt", "float16", "contiguous")),
    ],
)
def test_what_the_profile_leaves_open_goes_by_the_device(
    device: str, asked: dict[str, Any], settings: tuple[str, str, str]
) -> None:
    timing = Timing.on(torch.device(device), ProfileConfig.model_validate(asked))
    assert (timing.runtime, timing.dtype, timing.layout) == settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mode": "cuda_graph"}, "mode is now called runtime; write runtime: cuda_graph"),
        (
            {"runtime": "onnxruntime", "dtype": "float16"},
            "dtype float16 with runtime onnxruntime; expected auto or float32",
        ),
        ({"runtime": "tensorrt", "layout": "channels_last"}, "layout channels_last with runtime tensorrt"),
    ],
)
def test_a_profile_that_no_runtime_has_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ProfileConfig.model_validate(values)


@pytest.mark.parametrize(
    ("runtime", "missing", "named"),
    [
        ("cuda_graph", [], "runtime cuda_graph needs a GPU, but this cluster times networks on CPUs"),
        ("onnxruntime", ["onnxscript"], "runtime onnxruntime needs onnxscript; pip install onnxscript on every node"),
    ],
)
def test_a_runtime_that_is_not_there_is_refused_before_anything_trains(
    runtime: Any, missing: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feasibility, "missing_packages", lambda names: missing)
    with pytest.raises(ConfigError, match=named):
        feasibility.check_runtime(ProfileConfig(runtime=runtime), ClusterConfig())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_network_of_any_layout_is_timed_in_that_of_the_profile(layout: Any) -> None:
    """A trial trains channels last on a GPU, the unpruned network is built contiguous."""
    timing = Timing.on(CPU, ProfileConfig(layout=layout))
    network = nn.Conv2d(3, 4, 3)
    found = [
        timing.timer(network.to(memory_format=trained), SHAPE, 2).time(num_repeats=1).conditions
        for trained in (torch.contiguous_format, torch.channels_last)
    ]
    assert found[0] == found[1]
    assert (found[0].layout, found[0].batch_size) == (layout, 2)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)  # the trial's own is left as it is


def test_a_network_is_compiled_once_for_all_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the ninth network of one class, from which on torch continues in eager mode without an error."""
    num_compiled, num_calls = 0, 0

    def backend(graph_module: torch.fx.GraphModule, _: list[Any]) -> Any:
        nonlocal num_compiled
        num_compiled += 1

        def call(*inputs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return graph_module.forward(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    timing = Timing.on(CPU, ProfileConfig(runtime="compile"))
    timers = [timing.timer(nn.Sequential(nn.Conv2d(3, width, 3)), SHAPE, 2) for width in range(1, 10)]
    turns = [[timer.time(num_repeats=1) for timer in timers] for _ in range(3)]
    assert num_compiled == 9
    assert num_calls == sum(1 + measured.num_warmup for turn in turns for measured in turn)  # none in eager mode
    assert turns[0][0].conditions.runtime == "compile"


TIMED_AGAIN = """
import json, sys, torch
from pathlib import Path
from orchestrator.config.trial import ProfileConfig
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.timing import time_networks
timer = Timing.on(torch.device("cpu"), ProfileConfig(runtime="onnxruntime")).file_timer(Path(sys.argv[1]), (3, 8, 8), 4)
((measured, _),) = time_networks([timer], num_repeats=200)
print(json.dumps([measured.median_ms, measured.conditions.fingerprint, timer.file_sha256]))
"""


def test_the_exported_file_is_what_is_timed(tmp_path: Path) -> None:
    """A fresh process times the same bytes under the same conditions; how far the two agree is for a quiet machine to say."""
    network, _ = build_traced(TINY.model, SHAPE)
    timing, file = Timing.on(CPU, ProfileConfig(runtime="onnxruntime")), tmp_path / "network.onnx"
    timer = timing.timers(network.eval(), SHAPE, [1, 4], file)[4]
    ((measured, is_settled),) = time_networks([timer], num_repeats=200)
    latency = measured_latency(measured, noisy=not is_settled, file_sha256=timer.file_sha256)
    conditions = json.loads(str(latency.conditions))
    assert conditions["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (conditions["runtime"], conditions["batch_size"], conditions["clock"]) == ("onnxruntime", 4, "process_cpu")
    assert conditions["versions"]["onnxruntime"]
    command = [sys.executable, "-c", TIMED_AGAIN, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **TIMING_ENV})
    again_ms, _, sha256 = json.loads(done.stdout)
    assert sha256 == conditions["file_sha256"]
    assert again_ms > 0

import json
from typing import Any

import pytest
import torch
from torch import nn

import gator
from orchestrator import measure
from orchestrator.config import ProfileConfig
from orchestrator.measure import (
    DeviceClock,
    Latency,
    LatencyProbe,
    ModelClock,
    build_traced,
    example_images,
    make_clock,
    measure_latencies,
)
from tests.orchestrator.tiny_trial import TINY, tiny

SHAPE = (3, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, gator.ChannelGraph]:
    return build_traced(TINY.model, SHAPE)


def half(graph: gator.ChannelGraph) -> gator.Architecture:
    return gator.Architecture.from_keep(graph, {group.name: range(group.num_channels // 2) for group in graph.groups})


def test_model_clock_counts_ten_million_macs_a_millisecond(traced: Any) -> None:
    network, graph = traced
    macs, architecture = gator.MacsCost(graph), half(graph)
    latency = ModelClock(macs).measure(network, architecture, batch_size=3, num_repeats=5)
    expected = 3 * macs(architecture) / 1e7
    assert latency == Latency(median_ms=expected, p10_ms=expected, p90_ms=expected, device="model")


def test_device_clock_times_the_network_it_is_given(traced: Any) -> None:
    network, graph = traced
    shapes = []
    handle = network.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    latency = DeviceClock(SHAPE, num_threads=1).measure(network, half(graph), batch_size=5, num_repeats=7)
    handle.remove()
    assert set(shapes) == {(5, *SHAPE)}
    assert len(shapes) >= 7
    assert 0 < latency.p10_ms <= latency.median_ms <= latency.p90_ms
    assert network.training


def test_probe_times_the_architecture_and_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_traces, timed = 0, []

    def count_and_build(*args: Any) -> tuple[nn.Module, gator.ChannelGraph]:
        nonlocal num_traces
        num_traces += 1
        return build_traced(*args)

    def note(self: DeviceClock, network: nn.Module, architecture: gator.Architecture, **settings: int) -> Latency:
        timed.append((sum(parameter.numel() for parameter in network.parameters()), settings))
        return Latency(median_ms=1.0, p10_ms=0.5, p90_ms=2.0, device="a processor")

    monkeypatch.setattr(measure, "build_traced", count_and_build)
    monkeypatch.setattr(DeviceClock, "measure", note)
    probe, (_, graph) = LatencyProbe(num_threads=1), build_traced(TINY.model, SHAPE)
    for architecture in (gator.Architecture.full(graph), half(graph)):
        text = json.dumps(architecture.to_json())
        answer = probe.measure(TINY.model.model_dump_json(), text, SHAPE, 2, 9)
        assert answer == {"median_ms": 1.0, "p10_ms": 0.5, "p90_ms": 2.0, "device": "a processor"}
    params = gator.ParamsCost(graph)
    settings = {"batch_size": 2, "num_repeats": 9}
    assert timed == [(params.full, settings), (params(half(graph)), settings)]
    assert num_traces == 1


def test_columns_name_the_further_batch_sizes(traced: Any) -> None:
    network, graph = traced
    profile = ProfileConfig(batch_sizes=(2, 1, 32), clock="model")
    clock, architecture = ModelClock(gator.MacsCost(graph)), gator.Architecture.full(graph)
    columns = measure_latencies(clock, network, architecture, profile)
    one_ms = gator.MacsCost(graph).full / 1e7
    assert columns == {
        "latency_ms": 2 * one_ms,
        "latency_p10_ms": 2 * one_ms,
        "latency_p90_ms": 2 * one_ms,
        "latency_device": "model",
        "latency_ms_b1": one_ms,
        "latency_ms_b32": 32 * one_ms,
    }


def test_profile_chooses_the_clock(traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = traced
    macs, wall = gator.MacsCost(graph), tiny(profile__clock="wall")
    assert type(make_clock(TINY, SHAPE, macs, CPU)) is ModelClock
    assert type(make_clock(TINY, SHAPE, macs, torch.device("cuda"))) is ModelClock
    assert type(make_clock(wall, SHAPE, macs, torch.device("cuda"))) is DeviceClock
    assert type(make_clock(wall, SHAPE, macs, CPU)) is DeviceClock  # no Ray, hence no probe
    monkeypatch.setattr(measure.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(measure.ray, "get_actor", lambda name: name)
    assert type(make_clock(wall, SHAPE, macs, CPU)) is measure.ProbeClock


def test_example_images_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assert example_images(SHAPE, 2).shape == (2, *SHAPE)
    assert torch.equal(torch.get_rng_state(), before)

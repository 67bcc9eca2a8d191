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


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> LatencyProbe:
    """A probe whose networks take as many milliseconds as they have parameters; every reading is noted in `timed`."""

    def note(self: DeviceClock, network: nn.Module, architecture: gator.Architecture, **settings: int) -> Latency:
        num_params = sum(parameter.numel() for parameter in network.parameters())
        timed.append((num_params, settings))
        slow = 100.0 if len(timed) == 2 else 1.0  # something disturbs the second reading
        return Latency(median_ms=slow * num_params, p10_ms=0.5, p90_ms=2.0, device="a processor")

    timed: list[tuple[int, dict[str, int]]] = []
    monkeypatch.setattr(DeviceClock, "measure", note)
    probe = LatencyProbe(num_threads=1)
    probe.timed = timed  # type: ignore[attr-defined]
    return probe


def as_json(architecture: gator.Architecture) -> str:
    return json.dumps(architecture.to_json())


def test_probe_times_the_architecture_and_traces_once(probe: Any, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    num_traces = 0

    def count_and_build(*args: Any) -> tuple[nn.Module, gator.ChannelGraph]:
        nonlocal num_traces
        num_traces += 1
        return build_traced(*args)

    monkeypatch.setattr(measure, "build_traced", count_and_build)
    _, graph = traced
    params = gator.ParamsCost(graph)
    model = TINY.model.model_dump_json()
    full = probe.measure(model, as_json(gator.Architecture.full(graph)), 2, 9)
    assert full == {"median_ms": params.full, "p10_ms": 0.5, "p90_ms": 2.0, "device": "a processor"}
    probe.measure(model, as_json(half(graph)), 2, 9)
    settings = {"batch_size": 2, "num_repeats": 9}
    assert probe.timed == [(params.full, settings), (params(half(graph)), settings)]
    assert num_traces == 1


def test_networks_are_timed_in_turns_and_one_disturbed_reading_does_not_count(probe: Any, traced: Any) -> None:
    _, graph = traced
    params = gator.ParamsCost(graph)
    architectures = [gator.Architecture.full(graph), half(graph)]
    model = TINY.model.model_dump_json()
    first, second = probe.measure_in_turns([(model, as_json(architecture)) for architecture in architectures], 2, 50)
    assert (first["median_ms"], second["median_ms"]) == (params.full, params(half(graph)))
    assert [num for num, _ in probe.timed] == [params.full, params(half(graph))] * 5
    assert all(settings == {"batch_size": 2, "num_repeats": 10} for _, settings in probe.timed)


def test_estimates_rise_with_the_macs_and_meet_what_was_timed(probe: Any, traced: Any) -> None:
    _, graph = traced
    model = TINY.model.model_dump_json()
    full_ms = probe.estimate(model, as_json(gator.Architecture.full(graph)), 2)
    num_timed = len(probe.timed)
    half_ms = probe.estimate(model, as_json(half(graph)), 2)
    odd = gator.Architecture.from_keep(
        graph, {group.name: range(max(1, group.num_channels - 1)) for group in graph.groups}
    )
    odd_ms = probe.estimate(model, as_json(odd), 2)
    assert len(probe.timed) == num_timed  # the curve is taken once
    assert full_ms == gator.ParamsCost(graph).full
    assert half_ms == gator.ParamsCost(graph)(half(graph))
    assert half_ms < odd_ms < full_ms


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

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import gator
from orchestrator.config.trial import ProfileConfig
from orchestrator.latency.curve import Curve, take_curve
from orchestrator.latency.record import Latency
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.sources import ComputedLatency, PredictedLatency, TimedLatency, make_source, measure_latencies
from orchestrator.latency.timing import time_in_turns
from orchestrator.models.networks import build_traced, example_images
from tests.orchestrator.tiny_trial import TINY, tiny

SHAPE = (3, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, gator.ChannelGraph]:
    return build_traced(TINY.model, SHAPE)


def half(graph: gator.ChannelGraph) -> gator.Architecture:
    return gator.Architecture.from_keep(graph, {group.name: range(group.num_channels // 2) for group in graph.groups})


def test_computed_latency_counts_ten_million_macs_a_millisecond(traced: Any) -> None:
    network, graph = traced
    macs, architecture = gator.MacsCost(graph), half(graph)
    latency = ComputedLatency(macs).measure(network, architecture, batch_size=3, num_repeats=5)
    expected = 3 * macs(architecture) / 1e7
    assert latency == Latency(median_ms=expected, p10_ms=expected, p90_ms=expected, device="model")


def test_timed_latency_times_the_network_it_is_given(traced: Any) -> None:
    network, graph = traced
    shapes = []
    handle = network.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    latency = TimedLatency(SHAPE, ProfileConfig()).measure(network, half(graph), batch_size=5, num_repeats=7)
    handle.remove()
    assert set(shapes) == {(5, *SHAPE)}
    assert len(shapes) >= 7
    assert 0 < latency.p10_ms <= latency.median_ms <= latency.p90_ms
    conditions = json.loads(latency.conditions)
    assert (conditions["batch_size"], conditions["dtype"], conditions["clock"], conditions["n"]) == (
        5,
        "float32",
        "process_cpu",
        7,
    )
    assert len(conditions["fingerprint"]) == 12
    assert network.training


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Networks take as many milliseconds as they have parameters, every third reading twice as many; their parameters are noted."""

    def note(network: nn.Module, images: torch.Tensor, **settings: int) -> gator.LatencyMeasurement:
        num_params = sum(parameter.numel() for parameter in network.parameters())
        readings.append(num_params)
        disturbance = 2.0 if len(readings) % 3 == 1 else 1.0
        return replace(real, median_ms=disturbance * num_params, p10_ms=0.5, p90_ms=2.0)

    real = gator.time_forward(nn.ReLU(), torch.zeros(1), num_repeats=1)
    readings: list[int] = []
    monkeypatch.setattr(gator, "time_forward", note)
    return readings


def test_networks_are_timed_in_turns_and_disturbed_readings_do_not_count(timed: list[int], traced: Any) -> None:
    network, graph = traced
    architectures = [gator.Architecture.full(graph), half(graph)]
    timing = Timing.on(CPU, ProfileConfig())
    timers = [timing.timer(gator.prune(network, graph, architecture), SHAPE, 2) for architecture in architectures]
    params = gator.ParamsCost(graph)
    first, second = time_in_turns(timers, num_repeats=50, device=CPU)
    assert (first.median_ms, first.p10_ms, first.p90_ms, first.noisy) == (params.full, 0.5, 2.0, False)
    assert (second.median_ms, second.noisy) == (params(half(graph)), False)
    assert timed == [params.full, params(half(graph))] * 5


def test_turns_go_on_until_the_fastest_two_agree_and_say_noisy_if_they_never_do(
    monkeypatch: pytest.MonkeyPatch, traced: Any
) -> None:
    network, _ = traced
    real = gator.time_forward(nn.ReLU(), torch.zeros(1), num_repeats=1)

    def time_readings(readings_ms: list[float]) -> tuple[Latency, int]:
        left = iter(readings_ms)
        monkeypatch.setattr(gator, "time_forward", lambda *_, **__: replace(real, median_ms=next(left)))
        (latency,) = time_in_turns(
            [Timing.on(CPU, ProfileConfig()).timer(network, SHAPE, 2)], num_repeats=50, device=CPU
        )
        return latency, len(readings_ms) - len(list(left))

    settled, num_turns = time_readings([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 9.0, 4.1, 1.0])
    assert (settled.median_ms, settled.noisy, num_turns) == (4.0, False, 8)
    restless, num_turns = time_readings([0.9**turn for turn in range(20)])
    assert (restless.median_ms, restless.noisy, num_turns) == (0.9**14, True, 15)


def test_curve_meets_what_was_timed_and_rises_with_the_macs(timed: Any, traced: Any) -> None:
    network, graph = traced
    macs, params = gator.MacsCost(graph), gator.ParamsCost(graph)
    curve = Curve.from_json(take_curve(network, graph, TINY.profile).to_json())
    odd = gator.Architecture.from_keep(
        graph, {group.name: range(max(1, group.num_channels - 1)) for group in graph.groups}
    )
    source = PredictedLatency(curve, macs)
    full_ms, odd_ms, half_ms = (
        source.estimate(network, architecture, batch_size=4).median_ms
        for architecture in (gator.Architecture.full(graph), odd, half(graph))
    )
    assert (full_ms, half_ms) == (params.full, params(half(graph)))
    assert half_ms < odd_ms < full_ms
    assert source.measure(network, odd, batch_size=4, num_repeats=9) == Latency(
        median_ms=odd_ms
    )  # no spread, no device


def test_disturbed_curve_still_rises(monkeypatch: pytest.MonkeyPatch, traced: Any) -> None:
    times_ms = iter([1.0, 3.0, 2.0, 4.0, 5.0] * 5)
    real = gator.time_forward(nn.ReLU(), torch.zeros(1), num_repeats=1)
    monkeypatch.setattr(gator, "time_forward", lambda *_, **__: replace(real, median_ms=next(times_ms)))
    curve = take_curve(*traced, ProfileConfig(batch_sizes=(1,)))
    assert list(curve.points[1][1]) == [1.0, 3.0, 3.0, 4.0, 5.0]


def test_columns_name_the_further_batch_sizes(traced: Any) -> None:
    network, graph = traced
    profile = ProfileConfig(batch_sizes=(2, 1, 32), clock="model")
    source, architecture = ComputedLatency(gator.MacsCost(graph)), gator.Architecture.full(graph)
    columns = measure_latencies(source, network, architecture, profile)
    one_ms = gator.MacsCost(graph).full / 1e7
    assert columns == {
        "latency_ms": 2 * one_ms,
        "latency_source": "computed",
        "latency_p10_ms": 2 * one_ms,
        "latency_p90_ms": 2 * one_ms,
        "latency_device": "model",
        "latency_noisy": None,
        "latency_conditions": None,
        **dict.fromkeys(("latency_ms_b1", "latency_p10_ms_b1", "latency_p90_ms_b1"), one_ms),
        **dict.fromkeys(("latency_ms_b32", "latency_p10_ms_b32", "latency_p90_ms_b32"), 32 * one_ms),
    }


def test_a_row_is_noisy_where_the_latency_of_any_batch_size_is(traced: Any) -> None:
    network, graph = traced

    class Given:
        def measure(self, network: Any, architecture: Any, *, batch_size: int, num_repeats: int) -> Latency:
            return Latency(median_ms=1.0, noisy={1: False, 32: True}[batch_size])

    def is_noisy(*batch_sizes: int) -> bool:
        profile = ProfileConfig(batch_sizes=batch_sizes)
        return measure_latencies(Given(), network, gator.Architecture.full(graph), profile)["latency_noisy"]

    assert (is_noisy(1), is_noisy(1, 32)) == (False, True)


def test_profile_and_curve_choose_the_latency_source(traced: Any) -> None:
    _, graph = traced
    macs, wall, curve = gator.MacsCost(graph), tiny(profile__clock="wall"), Curve({1: ([0.0], [1.0])})
    assert type(make_source(TINY, SHAPE, macs, curve)) is ComputedLatency
    assert type(make_source(TINY, SHAPE, macs, None)) is ComputedLatency
    assert type(make_source(wall, SHAPE, macs, None)) is TimedLatency
    assert type(make_source(wall, SHAPE, macs, curve)) is PredictedLatency  # timed apart


def test_example_images_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assert example_images(SHAPE, 2).shape == (2, *SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_curve_says_by_how_much_it_misses_its_own_points() -> None:
    straight = Curve({1: ([0.0, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 5.0])})
    assert straight.error(1) == pytest.approx(0.0)
    # without the middle point 2 would be predicted, where 4 was timed
    assert Curve({8: ([0.0, 1.0, 2.0], [1.0, 4.0, 3.0])}).error(8) == pytest.approx(0.5)

"""Ops, tables of their times, and the cost made of them. Times come from formulas; one test times a real network."""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import swin_transformer

import gator
from gator.graph.ops import PRODUCTS, OpKind
from gator.latency.forward import time_forward
from gator.latency.grid import next_points
from gator.latency.measurement import Conditions, LatencyMeasurement
from gator.latency.op_timing import OpChain, completed, example_inputs, time_op, time_points
from gator.latency.table import NUM_TURNS, LatencyTable, NetworkTime, OpTime, Point, largest_widths

CPU = torch.device("cpu")


class Residual(nn.Module):
    """Two blocks of 32 channels on 8 x 8, and a classifier: two groups that only a block has, and the highway."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.norm2 = nn.Conv2d(64, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))


@pytest.fixture(scope="module")
def network() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def graph(network: Residual) -> gator.ChannelGraph:
    return gator.trace(network, torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    return time_forward(nn.ReLU(), torch.zeros(4, 3, 8, 8), num_repeats=1).conditions


def timer(formula: Callable[[OpKind, int, int], float]) -> Callable[[Point], LatencyMeasurement]:
    """Return a timer that needs no clock."""
    template = time_forward(nn.ReLU(), torch.zeros(4, 3, 8, 8), num_repeats=1)

    def measure(point: Point) -> LatencyMeasurement:
        ms = formula(*point)
        return dataclasses.replace(template, median_ms=ms, p10_ms=ms, p90_ms=ms)

    return measure


def table_of(
    graph: gator.ChannelGraph, conditions: Conditions, formula: Callable[[OpKind, int, int], float]
) -> LatencyTable:
    return list(completed(LatencyTable(conditions), graph, functools.partial(time_points, timer=timer(formula))))[-1]


def bilinear(kind: OpKind, num_in: int, num_out: int) -> float:
    return 0.01 + (0.001 * num_in * num_out if kind.has_two_widths else 0.002 * num_in)


def narrowed(graph: gator.ChannelGraph, share: float, gone: tuple[str, ...] = ()) -> gator.Architecture:
    keep = {group.name: range(math.ceil(share * group.num_channels)) for group in graph.groups}
    return gator.Architecture.from_keep(graph, keep | dict.fromkeys(gone, ()))


# --- ops --------------------------------------------------------------------------------------------------------------


def test_every_call_that_takes_time_is_recorded(graph: gator.ChannelGraph) -> None:
    names = [op.kind.name for op in graph.ops]
    block = ["conv2d", "batch_norm", "relu", "conv2d", "batch_norm", "add"]
    assert names == ["conv2d", "batch_norm", "relu", *block, *block, "mean", "linear"]
    assert [op.block for op in graph.ops] == [None] * 3 + ["blocks.0"] * 6 + ["blocks.1"] * 6 + [None] * 2
    assert graph.ops[3].module == "blocks.0.conv1"


@pytest.mark.parametrize("gone", [(), ("blocks.0.conv1",)], ids=["narrowed", "a block gone"])
def test_widths_of_the_ops_are_those_of_the_pruned_network(
    network: Residual, graph: gator.ChannelGraph, gone: tuple[str, ...]
) -> None:
    architecture = narrowed(graph, 0.4, gone)
    small = gator.trace(gator.prune(network, graph, architecture), torch.zeros(1, 3, 8, 8))
    widths = torch.tensor([*architecture.widths.values(), 1]).double()
    full = torch.tensor([*(group.num_channels for group in small.groups), 1]).double()
    expected = [(op.kind, float(op.num_in @ full), float(op.num_out @ full)) for op in small.ops]
    found = [
        (op.kind, float(op.num_in @ widths), float(op.num_out @ widths))
        for op in graph.ops
        if op.block not in architecture.removed_blocks
    ]
    assert found == expected


def transformers() -> dict[str, nn.Module]:
    """Attention as one call; as products in windows with a table of biases; as Einstein sums."""
    torch.manual_seed(0)
    block, merging = swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2
    return {
        "vit": models.VisionTransformer(16, 8, 1, 4, 32, 64, num_classes=4),
        "swin": models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=4),
        "swin v2": models.SwinTransformer(
            [4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=4, block=block, downsample_layer=merging
        ),
        "maxvit": models.MaxVit((32, 32), 8, 2, [16, 32], [1, 1], 4, 0.0, num_classes=4),
    }


@pytest.mark.parametrize("name", transformers())
def test_attention_is_timed_by_its_heads(name: str) -> None:
    network, images = transformers()[name].eval(), torch.zeros(1, 3, *((16, 16) if name == "vit" else (32, 32)))
    graph = gator.trace(network, images)
    architecture = narrowed(graph, 0.5)
    small = gator.trace(gator.prune(network, graph, architecture), images)
    widths = torch.tensor([*architecture.widths.values(), 1]).double()
    full = torch.tensor([*(group.num_channels for group in small.groups), 1]).double()
    products = [op for op in graph.ops if op.kind.name in PRODUCTS]
    assert products
    assert all(op.num_in[:-1].any() for op in products)
    assert [float(op.num_in @ widths) for op in products] == [
        float(op.num_in @ full) for op in small.ops if op.kind.name in PRODUCTS
    ]
    for op in graph.ops:
        num_in, num_out = round(float(op.num_in @ widths)), round(float(op.num_out @ widths))
        OpChain(op.kind, num_in, num_out, CPU, torch.float32)(*example_inputs(op.kind, num_in, 1, CPU, torch.float32))


def test_a_sum_is_timed_on_its_larger_operand() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale, self.head = nn.Conv2d(3, 8, 1), nn.Parameter(torch.ones(8, 1, 1)), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale * self.conv(x))

    kind = gator.trace(Scaled(), torch.zeros(1, 3, 4, 4)).ops[1].kind
    assert (kind.name, kind.shape) == ("mul", (0, 4, 4))
    assert [tensor.shape for tensor in example_inputs(kind, 5, 2, CPU, torch.float32)] == [(2, 5, 4, 4), (5, 1, 1)]


def test_depthwise_convolution_has_one_width_and_keeps_its_grouping() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 1))
    op = gator.trace(net, torch.zeros(1, 3, 8, 8)).ops[1]
    assert not op.kind.has_two_widths
    assert op.kind.arguments["per_group"] == [1, 1]
    chain = OpChain(op.kind, 5, 5, CPU, torch.float32)
    assert [weight.shape for weight in chain.weights[0]] == [(5, 1, 3, 3), (5,)]


def test_an_op_that_is_not_timed_is_refused_by_name() -> None:
    with pytest.raises(gator.LatencyError, match=r"grid_sampler on .*this op cannot be timed alone"):
        OpChain(OpKind("grid_sampler", (0, 8, 8), "{}"), 4, 4, CPU, torch.float32)


# --- the grid ---------------------------------------------------------------------------------------------------------

CONV = OpKind("conv2d", (0, 8, 8), '{"bias": false, "groups": 1, "kernel": [1, 1]}')


def measured_points(formula: Callable[[int, int], float], most_in: int, most_out: int) -> dict[tuple[int, int], float]:
    times: dict[tuple[int, int], float] = {}
    while points := next_points(CONV, most_in, most_out, times):
        times.update({point: formula(*point) for point in points})
    return times


def test_grid_is_dense_where_the_time_bends() -> None:
    bent = measured_points(lambda num_in, _: 1.0 + max(0, num_in - 192), 256, 64)
    straight = measured_points(lambda num_in, _: 1.0 + num_in, 256, 64)
    lines = {num_in for num_in, num_out in bent if num_out == 1}
    assert {num_in for num_in, num_out in straight if num_out == 1} == {1, 64, 128, 256}
    assert lines == {1, 64, 128, 256, 192}


@pytest.mark.parametrize("step", [1, 8, 32])
def test_hardware_step_is_found_in_the_table(conditions: Conditions, step: int) -> None:
    times = measured_points(lambda _, num_out: 1.0 + 0.1 * math.ceil(num_out / step) * step, 64, 256)
    points = [(CONV, *point) for point in times]
    table = LatencyTable(conditions).with_ops(
        time_points(points, timer(lambda _, num_in, num_out: times[num_in, num_out]))
    )
    assert table.hardware_step(CONV, 64, 256) == step


def test_a_table_of_onnx_runtime_has_layers_at_multiples_of_4(
    graph: gator.ChannelGraph, conditions: Conditions
) -> None:
    table = LatencyTable(dataclasses.replace(conditions, runtime="onnxruntime"))
    assert (table.width_step, table.is_own(CONV), table.is_own(OpKind("relu", (0, 8, 8), "{}"))) == (4, True, False)
    points = next_points(CONV, 3, 102, {}, step=4)
    assert {num_in for num_in, _ in points} == {1, 2, 3}  # an axis that ends below a step
    assert {num_out for _, num_out in points if num_out % 4} == {102, 102 - 32, 102 - 16, 102 - 8, 102 - 4}
    assert table.hardware_step(CONV, 3, 102) == 4
    assert LatencyTable(dataclasses.replace(conditions, runtime="compile")).width_step == 1


def test_the_fastest_turn_of_a_point_counts(conditions: Conditions) -> None:
    durations_ms = iter([1.0, 10.0, 9.0, 90.0, 1.1, 11.0])  # the second of three turns is disturbed
    points = [(CONV, 1, 1), (CONV, 2, 2)]
    table = LatencyTable(conditions)
    for _ in range(3):
        table = table.with_ops(time_points(points, timer(lambda *_: next(durations_ms))))
    assert [(op.point, op.median_ms, op.num_turns) for op in table.ops] == [(points[0], 1.0, 3), (points[1], 10.0, 3)]


@pytest.mark.parametrize(
    ("turns_ms", "noisy"),
    [
        ([1.0], True),
        ([1.0, 1.04, 2.0], False),
        ([1.0, 1.04, 0.9], True),  # the fastest of all stands alone
        ([1.0, 1.04, 0.9, 3.0, 0.93], False),
        ([1.0, 1.1, 1.2], True),
    ],
)
def test_a_point_is_noisy_until_two_turns_agree_on_its_least_time(
    conditions: Conditions, turns_ms: list[float], noisy: bool
) -> None:
    durations_ms, table = iter(turns_ms), LatencyTable(conditions)
    for _ in turns_ms:
        table = table.with_ops(time_points([(CONV, 1, 1)], timer(lambda *_: next(durations_ms))))
    assert [(op.median_ms, op.noisy) for op in table.ops] == [(min(turns_ms), noisy)]


def test_a_machine_that_is_slow_for_a_while_spoils_no_point(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    calls = itertools.count()
    slow_for_a_while = table_of(graph, conditions, lambda *point: bilinear(*point) * (2 if next(calls) < 90 else 1))
    calm = table_of(graph, conditions, bilinear)
    assert {op.num_turns for op in slow_for_a_while.ops} == {NUM_TURNS}
    assert {op.point: op.median_ms for op in slow_for_a_while.ops}.items() >= {
        op.point: op.median_ms for op in calm.ops
    }.items()


def test_disturbed_times_still_rise(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    generator = torch.Generator().manual_seed(0)
    table = table_of(
        graph, conditions, lambda *point: bilinear(*point) * float(1 + torch.rand((), generator=generator))
    )
    for kind, (most_in, most_out) in largest_widths(graph).items():
        times_AB = table.grid(kind, most_in, most_out).times_ms
        assert bool((times_AB.diff(dim=0) >= 0).all())
        assert bool((times_AB.diff(dim=1) >= 0).all())


def test_a_build_that_was_stopped_resumes(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    whole = table_of(graph, conditions, bilinear)
    asked: list[Point] = []

    def measure(points: Sequence[Point]) -> Iterator[OpTime]:
        asked.extend(points)
        return time_points(points, timer(bilinear))

    part = next(completed(LatencyTable(conditions), graph, measure, portion=7))
    assert len(part.ops) == len(asked) == 7
    *_, rest = completed(part, graph, measure, portion=7)
    assert rest.times == whole.times
    assert set(Counter(asked).values()) == {NUM_TURNS}
    assert rest.turns_to_go(graph) == 0


def test_one_table_holds_two_networks(conditions: Conditions) -> None:
    """Two networks share a kind of call, one with more inputs, the other with more outputs: nobody timed both at their most."""

    def graph_of(*widths: int) -> gator.ChannelGraph:
        layers = [nn.Conv2d(one, other, 1) for one, other in itertools.pairwise((3, *widths, 4))]
        return gator.trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))

    first, second = graph_of(16, 64), graph_of(64, 16)
    merged = table_of(first, conditions, bilinear).with_ops(table_of(second, conditions, bilinear).ops)
    for graph in (first, second):
        alone = gator.LatencyCost(graph, table_of(graph, conditions, bilinear))
        assert merged.due(graph) == []
        assert gator.LatencyCost(graph, merged).full == pytest.approx(alone.full, rel=1e-12)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_layer_that_the_table_lacks_is_named(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    table = table_of(graph, conditions, bilinear)
    without = dataclasses.replace(table, ops=tuple(op for op in table.ops if op.kind.name != "linear"))
    with pytest.raises(gator.LatencyError, match=r"has linear on \(C\).*which 'head' runs .*, not at all"):
        gator.LatencyCost(graph, without)


def test_a_table_that_ends_below_the_network_is_refused(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    table = table_of(graph, conditions, bilinear)
    wide = nn.Sequential(nn.Conv2d(3, 80, 3, padding=1), nn.BatchNorm2d(80), nn.Conv2d(80, 4, 1))
    with pytest.raises(gator.LatencyError, match="'0' runs from 3 to 80 channels, only up to 3 to 32"):
        gator.LatencyCost(gator.trace(wide, torch.zeros(1, 3, 8, 8)), table)


def test_half_a_grid_is_refused(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    table = table_of(graph, conditions, bilinear)
    ops = tuple(op for op in table.ops if (op.num_in, op.num_out) != (1, 1))
    with pytest.raises(gator.LatencyError, match="only in part, because its measurement was stopped"):
        gator.LatencyCost(graph, dataclasses.replace(table, ops=ops))


# --- the cost ---------------------------------------------------------------------------------------------------------


def test_cost_is_the_sum_over_the_calls(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    cost = gator.LatencyCost(graph, table_of(graph, conditions, bilinear))
    block_ms = 6 * 0.01 + 0.002 * (64 + 64 + 32 + 32) + 0.001 * 2 * 32 * 64
    rest_ms = 5 * 0.01 + 0.002 * 3 * 32 + 0.001 * (3 * 32 + 32 * 10)
    assert cost.unit == "ms"
    assert cost.full == pytest.approx(2 * block_ms + rest_ms)
    one_gone = gator.Architecture.from_keep(graph, {"blocks.1.conv1": ()})
    assert cost(one_gone) == pytest.approx(block_ms + rest_ms)


def test_bilinear_times_are_met_between_the_lines(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    cost = gator.LatencyCost(graph, table_of(graph, conditions, bilinear))
    stem, first, second = 21, 37, 50
    block_ms = sum(6 * 0.01 + 0.002 * 2 * (stem + inner) + 0.001 * 2 * stem * inner for inner in (first, second))
    rest_ms = 5 * 0.01 + 0.002 * 3 * stem + 0.001 * (3 * stem + stem * 10)
    keep = {"stem.0": range(stem), "blocks.0.conv1": range(first), "blocks.1.conv1": range(second)}
    assert cost(gator.Architecture.from_keep(graph, keep)) == pytest.approx(block_ms + rest_ms)


def test_gradient_is_that_of_the_widths(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    cost = gator.LatencyCost(graph, table_of(graph, conditions, bilinear))
    widths = torch.tensor([20.5, 30.5, 40.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cost.of, (widths,))
    gradient = cost.relative_gradient(widths)  # the secant of what is linear in each width alone is its derivative
    (expected,) = torch.autograd.grad(cost.of(widths), widths)
    torch.testing.assert_close(gradient, expected / cost.full)


def test_secant_spans_a_hardware_step(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    def stepped(kind: OpKind, num_in: int, num_out: int) -> float:
        return 1.0 + 0.1 * math.ceil(num_out / 16) * 16 if kind.has_two_widths else 1.0

    cost = gator.LatencyCost(graph, table_of(graph, conditions, stepped))
    assert cost.hardware_steps() == {"stem.0": 16, "blocks.0.conv1": 16, "blocks.1.conv1": 16}
    gradient = cost.relative_gradient(torch.tensor([32.0, 64.0, 64.0], dtype=torch.float64))
    assert bool((gradient > 0).all())


def test_calibration_finds_the_factors_and_states_its_error(graph: gator.ChannelGraph, conditions: Conditions) -> None:
    table = table_of(graph, conditions, bilinear)
    plain = gator.LatencyCost(graph, table)
    assert plain.calibration.mean_error is None
    shares, gone = (1.0, 0.9, 0.7, 0.5, 0.4, 0.3), ((), ("blocks.0.conv1",))
    architectures = [narrowed(graph, share, names) for share in shares for names in gone]
    widths = torch.tensor([list(architecture.widths.values()) for architecture in architectures]).double()
    sums = plain._sums(widths)
    times_ms = (sums @ sums.new_tensor([1.3, 0.8, 0.02])).tolist()
    networks = [network_time(graph, *pair) for pair in zip(architectures, times_ms, strict=True)]
    cost = gator.LatencyCost(graph, table.with_networks(networks))
    assert (cost.calibration.num_networks, str(cost.calibration)[:10]) == (12, "mean error")
    assert 0 <= cost.calibration.mean_error < 0.01  # the prior holds a little against the data
    assert [cost(one) for one in architectures] == pytest.approx(times_ms, rel=0.02)
    assert plain(architectures[0]) < 0.9 * times_ms[0]


def network_time(graph: gator.ChannelGraph, architecture: gator.Architecture, median_ms: float) -> NetworkTime:
    return NetworkTime(
        fingerprint=graph.fingerprint,
        input_shape=graph.input_shapes[0][1:],
        widths=architecture.widths,
        median_ms=median_ms,
        p10_ms=median_ms,
        p90_ms=median_ms,
        n=1,
    )


def test_a_group_whose_time_follows_its_macs_has_the_quotient_1(
    graph: gator.ChannelGraph, conditions: Conditions
) -> None:
    def by_macs(kind: OpKind, num_in: int, num_out: int) -> float:
        positions = math.prod(kind.shape[1:])
        return (
            positions * math.prod(kind.arguments["kernel"]) * num_in * num_out
            if kind.name == "conv2d"
            else (num_in * num_out if kind.name == "linear" else 0.0)
        )

    cost = gator.LatencyCost(graph, table_of(graph, conditions, by_macs))
    quotients = {name: share.quotient for name, share in cost.shares().items()}
    assert quotients == pytest.approx(dict.fromkeys(graph.by_name, 1.0))


def test_latency_is_a_cost_like_any_other(network: Residual, graph: gator.ChannelGraph, conditions: Conditions) -> None:
    cost = gator.LatencyCost(graph, table_of(graph, conditions, bilinear))
    mixed = gator.MixedCost({cost: 1.0, gator.MacsCost(graph): 1.0})
    half = narrowed(graph, 0.5)
    expected = (cost(half) / cost.full + gator.MacsCost(graph)(half) / gator.MacsCost(graph).full) / 2
    assert mixed(half) == pytest.approx(expected)
    gated = gator.GatedModel(network, graph)
    gate_loss = gator.GateLoss(cost, target=0.6 * cost.full)
    gated(torch.zeros(4, 3, 8, 8))
    assert gate_loss(gated, progress=0.0).ndim == 0


def test_a_table_whose_times_do_not_depend_on_widths_is_refused(
    graph: gator.ChannelGraph, conditions: Conditions
) -> None:
    """As on a GPU in eager mode: blocks can go, so a target seems within reach, but gates would not learn."""
    flat = gator.LatencyCost(graph, table_of(graph, conditions, lambda *_: 0.01))
    with pytest.raises(gator.GateError, match=r"does not fall when 3 of its 3 groups get narrower.*runtime cuda_graph"):
        gator.GateLoss(flat, target=0.8 * flat.full)
    gator.GateLoss(gator.MixedCost({flat: 1.0, gator.MacsCost(graph): 1.0}), target_ratio=0.8)


def test_a_target_below_what_is_reachable_tells_the_lowest_in_ms(
    graph: gator.ChannelGraph, conditions: Conditions
) -> None:
    cost = gator.LatencyCost(graph, table_of(graph, conditions, bilinear))
    lowest_ms = cost(gator.Architecture.from_keep(graph, {"stem.0": (0,), "blocks.0.conv1": (), "blocks.1.conv1": ()}))
    with pytest.raises(gator.GateError, match=rf"lowest that can be reached is {lowest_ms:.4g} ms"):
        gator.GateLoss(cost, target=0.5 * lowest_ms)


# --- a clock ----------------------------------------------------------------------------------------------------------


def test_a_real_table_of_a_small_network(network: Residual, graph: gator.ChannelGraph, conditions: Conditions) -> None:
    real = functools.partial(time_op, conditions=conditions, num_repeats=2)
    *_, table = completed(LatencyTable(conditions), graph, functools.partial(time_points, timer=real))
    cost = gator.LatencyCost(graph, table)
    measured_ms = time_forward(network, torch.zeros(4, 3, 8, 8), num_repeats=20).median_ms
    assert 0.2 < cost.full / measured_ms < 5  # not calibrated, on a machine that may be busy
    assert cost(narrowed(graph, 0.25)) < cost.full


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", ["eager", "cuda_graph"])
def test_a_real_table_on_a_gpu(network: Residual, graph: gator.ChannelGraph, runtime: str) -> None:
    images = torch.zeros(4, 3, 8, 8, device="cuda", dtype=torch.float16)
    conditions = time_forward(nn.ReLU(), images, runtime=runtime, num_repeats=1).conditions
    real = functools.partial(time_op, conditions=conditions, num_repeats=2)
    *_, table = completed(LatencyTable(conditions), graph, functools.partial(time_points, timer=real))
    assert (table.conditions.device_type, table.conditions.dtype) == ("cuda", "float16")
    assert gator.LatencyCost(graph, table).full > 0

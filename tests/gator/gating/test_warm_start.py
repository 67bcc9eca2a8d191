"""A stage that goes on from an earlier one: the same network, the same gates, the same reference cost."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gator
from gator.gating.warm_start import continue_from, put_back
from tests.gator.law import random_keep
from tests.gator.zoo import ZOO, randomised

NAMES = ("basic", "bottleneck")


def stage(name: str, empty: float = 0.3) -> tuple[nn.Module, gator.ChannelGraph, gator.Architecture, Tensor]:
    """Return a network in float64, its graph, an architecture that lacks channels and blocks, and images."""
    case = ZOO[name]
    model = randomised(case.build())
    inputs = torch.randn(case.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(model, inputs)
    return model, graph, gator.Architecture.from_keep(graph, random_keep(graph, 0, empty)), inputs


def retrained(pruned: nn.Module) -> nn.Module:
    """Return the network with other weights, as fine-tuning leaves them."""
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return pruned


@pytest.mark.parametrize("name", NAMES)
def test_next_stage_starts_as_the_network_that_the_last_one_left(name: str) -> None:
    model, graph, architecture, inputs = stage(name)
    assert architecture.removed_blocks
    pruned = retrained(gator.prune(model, graph, architecture)).eval()
    fresh = randomised(ZOO[name].build())
    gated = gator.GatedModel(fresh, graph).double()
    continue_from(gated, fresh, pruned, architecture, torch.zeros(graph.num_channels))
    assert torch.allclose(gated.eval()(inputs), pruned(inputs), rtol=1e-10, atol=1e-12)
    assert gated.architecture() == architecture


def test_gates_are_kept_and_clamped_to_their_starting_value() -> None:
    model, graph, _, _ = stage("basic")
    gated = gator.GatedModel(model, graph, gator.GateConfig(init_keep_prob=0.9)).double()  # logit(0.9) = 2.1972246
    logits = torch.linspace(0.0, 6.0, graph.num_channels, dtype=torch.float64)
    full = gator.Architecture.full(graph)
    continue_from(gated, model, copy.deepcopy(model), full, logits)
    assert torch.allclose(gated.gates.logits_C, logits.clamp(max=2.1972246), atol=1e-6)


def test_gates_that_started_apart_are_clamped_each_to_its_own_start() -> None:
    model, graph, _, _ = stage("basic")
    gated = gator.GatedModel(model, graph, gator.GateConfig(magnitude_spread=5.0)).double()
    start = gated.gates.logits_C.detach().clone()
    assert start.min() < 5 < start.max()
    full = gator.Architecture.full(graph)
    continue_from(gated, model, copy.deepcopy(model), full, torch.full((graph.num_channels,), 5.0))
    assert torch.equal(gated.gates.logits_C, start.clamp(max=5.0))


def test_target_of_the_next_stage_is_a_share_of_the_unpruned_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    graph = gator.trace(model, images)
    cost = gator.MacsCost(graph)
    half = gator.Architecture.from_keep(graph, {graph.groups[0].name: range(24), graph.groups[1].name: range(20)})
    start = gator.prune(model, graph, half)
    gated = gator.GatedModel(model, graph)
    continue_from(gated, model, start, half, torch.full((graph.num_channels,), 9.0))
    loss, steps = gator.GateLoss(cost, target_ratio=0.2), 120
    optimizer = torch.optim.SGD(gated.param_groups(lr=0.05, cost=cost), momentum=0.9)
    for step in range(steps):
        (cross_entropy(gated(images), labels) + loss(gated, step / (steps - 1))).backward()
        optimizer.step()
        optimizer.zero_grad()
    architecture = gated.architecture()
    assert cost(architecture) / cost.full == pytest.approx(0.2, rel=0.03)  # 32 channels: one is 3 % of what remains
    assert all(set(kept) <= set(half.keep[name]) for name, kept in architecture.keep.items())


def test_what_was_closed_keeps_the_weights_that_the_model_had() -> None:
    model, graph, architecture, _ = stage("basic", empty=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    put_back(model, graph, architecture, retrained(gator.prune(model, graph, architecture)))
    group = next(group for group in graph.groups if len(architecture.keep[group.name]) < group.num_channels)
    closed = sorted(set(range(group.num_channels)) - set(architecture.keep[group.name]))
    dim = next(dim for dim in group.dims if dim.tensor.endswith("weight"))
    entries = dim.entries(torch.tensor(closed))
    after, earlier = (state[dim.tensor].index_select(dim.dim, entries) for state in (model.state_dict(), before))
    assert torch.equal(after, earlier)
    assert not torch.equal(model.state_dict()[dim.tensor], before[dim.tensor])


def test_pruned_network_of_another_architecture_is_refused() -> None:
    model, graph, architecture, _ = stage("basic")
    with pytest.raises(gator.PruneError, match=r"expected \(.*\) by its architecture; give the two of one stage"):
        put_back(model, graph, architecture, copy.deepcopy(model))


def test_logits_of_another_network_are_refused() -> None:
    model, graph, architecture, _ = stage("basic")
    pruned = gator.prune(model, graph, architecture)
    with pytest.raises(gator.GateError, match=r"have shape \(3,\), expected finite numbers of shape"):
        continue_from(gator.GatedModel(model, graph), model, pruned, architecture, torch.zeros(3))

"""What a cut must compute, by other means than gator's own: the unpruned network, the readers of closed channels zeroed."""

import copy
from collections.abc import Callable

import torch
from torch import nn

import gator
from tests.gator.law import assert_law, close, random_keep


def with_readers_zeroed(model: nn.Module, graph: gator.ChannelGraph, keep: dict[str, list[int]]) -> nn.Module:
    """Return a copy of the network in which no convolution or linear layer reads a closed channel.

    Holds for networks without normalisation over channels, and for groups that keep a channel.
    """
    zeroed = copy.deepcopy(model)
    weights = dict(zeroed.named_parameters())
    for group in graph.groups:
        closed = [channel for channel in range(group.num_channels) if channel not in keep[group.name]]
        readers = {f"{module}.weight" for module, side in group.layers if side == "in"}
        for dim in (dim for dim in group.dims if dim.tensor in readers and dim.dim == 1):
            weights[dim.tensor].data.index_fill_(1, dim.entries(torch.tensor(closed, dtype=torch.int64)), 0.0)
    return zeroed


def assert_exact(
    build: Callable[[], nn.Module], shape: tuple[int, ...] = (2, 3, 8, 8), larger: tuple[int, ...] | None = None
) -> gator.ChannelGraph:
    """Assert the law and the oracle for three cuts of a network, at the traced size and at another one; return its graph."""
    torch.manual_seed(0)
    model = build().double().eval()
    generator = torch.Generator().manual_seed(1)
    inputs = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    assert graph.groups, graph.text
    for seed in range(3):
        keep = random_keep(graph, seed)
        pruned, architecture = assert_law(model, graph, inputs, keep)
        oracle = with_readers_zeroed(model, graph, keep)
        with torch.no_grad():
            assert close(pruned(inputs), oracle(inputs))
            if larger is not None:
                images = torch.randn(larger, generator=generator, dtype=torch.float64)
                gated = gator.GatedModel(model, graph).eval()
                gated.load_architecture(architecture)
                assert close(pruned(images), oracle(images))
                assert close(gated(images), oracle(images))
    return graph

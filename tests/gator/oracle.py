"""What a cut must compute, by other means than gator's own: the unpruned network, the readers of closed channels zeroed."""

import copy
from collections.abc import Callable

import torch
from torch import nn

import gator
from tests.gator.law import close, random_keep


def with_readers_zeroed(model: nn.Module, graph: gator.ChannelGraph, keep: dict[str, list[int]]) -> nn.Module:
    """Return a copy of the network in which no convolution or linear layer reads a closed channel.

    A group that a product reads, not a layer, is zero where it is written. Holds for networks without normalisation over
    channels, and for groups that keep a channel.
    """
    zeroed = copy.deepcopy(model)
    weights = dict(zeroed.named_parameters())
    for group in graph.groups:
        closed = [channel for channel in range(group.num_channels) if channel not in keep[group.name]]
        readers = {f"{module}.weight" for module, side in group.layers if side == "in"}
        dims = [dim for dim in group.dims if dim.tensor in readers and dim.dim == 1] or group.dims
        for dim in dims:
            weights[dim.tensor].data.index_fill_(dim.dim, dim.entries(torch.tensor(closed, dtype=torch.int64)), 0.0)
    return zeroed


def assert_exact(
    build: Callable[[], nn.Module], shape: tuple[int, ...] = (2, 3, 8, 8), larger: tuple[int, ...] | None = None
) -> gator.ChannelGraph:
    """Assert for three cuts that masked and pruned outputs are the oracle's, also for images of another size; return the graph."""
    torch.manual_seed(0)
    model = build().double().eval()
    graph = gator.trace(model, torch.zeros(shape, dtype=torch.float64))
    assert graph.groups, graph.text
    gated = gator.GatedModel(model, graph).eval()
    for seed in range(3):
        keep = random_keep(graph, seed)
        architecture = gator.Architecture.from_keep(graph, keep)
        gated.load_architecture(architecture)
        pruned, oracle = gator.prune(model, graph, architecture), with_readers_zeroed(model, graph, keep)
        for size in (shape, larger or shape):
            generator = torch.Generator().manual_seed(seed)
            inputs = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                expected = oracle(inputs)
                assert close(pruned(inputs), expected)
                assert close(gated(inputs), expected)
    return graph

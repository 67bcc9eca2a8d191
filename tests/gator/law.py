"""The law of pruning, as assertions: the cut network computes what the masked one does, and costs what it is said to."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import gator
from gator.costs.counter import count_macs

TOLERANCE = 1e-10  # float64; what was seen is 4e-15


def random_keep(graph: gator.ChannelGraph, seed: int, empty: float = 0.0) -> dict[str, list[int]]:
    """Return a random half of every group, at least one channel; a share `empty` of the removable groups keeps none."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        kept = (torch.rand(group.num_channels, generator=generator) < 0.5).nonzero().flatten().tolist() or [0]
        is_empty = group.block is not None and bool(torch.rand((), generator=generator) < empty)
        keep[group.name] = [] if is_empty else kept
    return keep


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a network returns: one, or several in tuples and dicts; None is left out."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif outputs is not None:
        for part in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors_of(part)


def close(one: Any, other: Any) -> bool:
    """Whether two outputs agree to TOLERANCE, relative to the largest value."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in pairs)


def counted_macs(model: nn.Module, inputs: Tensor) -> int:
    """Return all MACs that torch counts while the first image runs."""
    return sum(count_macs(model, inputs)[""].values())


def assert_law(
    model: nn.Module, graph: gator.ChannelGraph, inputs: Tensor, keep: dict[str, list[int]]
) -> tuple[nn.Module, gator.Architecture]:
    """Assert that masked and pruned outputs agree, that costs are those of the pruned network, and that it trains."""
    architecture = gator.Architecture.from_keep(graph, keep)
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    assert gated.architecture() == architecture
    pruned = gator.prune(model, graph, architecture)
    with torch.no_grad():
        assert close(gated(inputs), pruned(inputs))
    assert counted_macs(pruned, inputs) == gator.MacsCost(graph)(architecture) + gator.AttentionCost(graph)(
        architecture
    )
    assert not graph.uncounted
    assert sum(p.numel() for p in pruned.parameters()) == gator.ParamsCost(graph)(architecture)
    trained = copy.deepcopy(pruned).train()
    sum(part.sum() for part in tensors_of(trained(torch.cat([inputs, inputs])))).backward()
    assert all(p.grad is not None for p in trained.parameters())
    return pruned, architecture

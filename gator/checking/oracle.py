"""An oracle for pruning: the unpruned network itself, whose weights alone silence the closed channels.

It runs the network's own forward pass, so it shares no code with the pruned or the gated network. What it needs of the graph is which
entries of which tensors belong to a channel, and which of them are read ("in").

- A closed channel is zero in the weights that read it, so it adds nothing to any sum. It is zero in those that write it too, for sums
  without a weight (norms, products of two values).
- Where a normalisation averages over channels, it has to average over the open ones only. There closed channels become copies of open ones,
  as many of each: mean and variance over all channels are then those over the open ones.
- The parameters of a removed branch are all zero.

It is not exact, and returns None, where channels that are averaged cannot be copied evenly, or where no weight reads a channel.
"""

import copy

import torch
from torch import Tensor, nn

from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelDim, ChannelGraph, ChannelGroup


@torch.no_grad()
def silenced(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> nn.Module | None:
    """Return a copy of the unpruned network that computes what the pruned one has to; None where that cannot be had."""
    source_C = _sources(graph, architecture)
    if not _is_exact(graph, architecture, source_C):
        return None
    oracle = copy.deepcopy(model)
    tensors = {**dict(oracle.named_parameters()), **dict(oracle.named_buffers())}
    averaged = averaged_groups(graph)
    for group in graph.groups:
        begin = graph.offsets[group.name]
        sources = source_C[begin : begin + group.num_channels] - begin
        closed = (sources != torch.arange(group.num_channels)).nonzero().flatten()
        for dim in group.dims:
            _silence(tensors[dim.tensor], dim, closed, sources[closed] if group.name in averaged else None)
    for block in graph.blocks:
        if block.name in architecture.removed_blocks:
            for name in block.tensors & dict(oracle.named_parameters()).keys():
                tensors[name].zero_()
    return oracle


def averaged_groups(graph: ChannelGraph) -> set[str]:
    """Return the groups over whose channels a normalisation takes its statistics."""
    group_of_channel = graph.group_of_channel()
    channels = [site.channels[site.channels >= 0] for site in graph.sites if site.normalises]
    return {graph.groups[int(number)].name for line in channels for number in group_of_channel[line].unique()}


def _sources(graph: ChannelGraph, architecture: Architecture) -> Tensor:
    """Return (channels of the graph,) int64: each kept channel itself, and for each closed one a kept one of its group in turn."""
    sources = torch.arange(graph.num_channels)
    for group in graph.groups:
        kept = torch.tensor(architecture.keep[group.name], dtype=torch.int64)
        begin, closed = graph.offsets[group.name], torch.ones(group.num_channels, dtype=torch.bool)
        closed[kept] = False
        places = begin + closed.nonzero().flatten()
        turns = torch.arange(len(places)) % max(len(kept), 1)
        sources[places] = begin + (kept[turns] if len(kept) else (torch.arange(len(places)) + 1) % group.num_channels)
    return sources


def _is_exact(graph: ChannelGraph, architecture: Architecture, source_C: Tensor) -> bool:
    kept_C = graph.mask_of(architecture.keep)
    copies_C = torch.bincount(source_C, minlength=graph.num_channels)
    for site in graph.sites:
        if site.normalises:
            own = site.channels[site.channels >= 0]
            counts = copies_C[own][kept_C[own]].unique().tolist()
            if len(counts) > 1 or (counts not in ([], [1]) and len(own) < len(site.channels)):
                return False
    return not any(len(architecture.keep[g.name]) < g.num_channels and not _is_read(g) for g in graph.groups)


def _is_read(group: ChannelGroup) -> bool:
    return any("in" in dim.sides for dim in group.dims)


def _silence(tensor: Tensor, dim: ChannelDim, closed: Tensor, sources: Tensor | None) -> None:
    """Overwrite the entries of closed channels: by those of other channels in what writes them, if given, else by zero."""
    entries = dim.entries(closed).to(tensor.device)
    if sources is not None and dim.sides != ("in",):
        tensor.index_copy_(dim.dim, entries, tensor.index_select(dim.dim, dim.entries(sources).to(tensor.device)))
    elif not dim.tensor.endswith("running_var"):
        tensor.index_fill_(dim.dim, entries, 0)

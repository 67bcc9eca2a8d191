"""An oracle for pruning: the unpruned network itself, whose weights alone silence the closed channels.

It runs the network's own forward pass, so it shares no code with the pruned or the gated network. What it needs of the graph is which
entries of which tensors belong to a channel, and which of them are read ("in").

- A closed channel is zero in the weights that read it, so it adds nothing to any sum. It is zero in those that write it too, for sums
  without a weight (norms, products of two values).
- Where a normalisation averages over channels, it has to average over the open ones only. There closed channels become copies of open ones,
  as many of each: mean and variance over all channels are then those over the open ones.
- A module that ends a removed branch returns zeros; if none does, the parameters of the branch are all zero.

It is not exact, and returns None, where channels that are averaged cannot be copied evenly, or are also summed without a weight, in a
product of two values, or by the weight that writes them; where a softmax goes over channels; where no weight reads a channel; or where
a removed branch without parameters is not zero.
"""

import copy

import torch
from torch import Tensor, nn

from gator.graph.architecture import Architecture
from gator.graph.graph import Block, ChannelDim, ChannelGraph, ChannelGroup, GateSite

_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten.log_softmax.int)
_DIRECTIONS = (".weight_v", ".parametrizations.weight.original1")
"""Of weight_norm(), which divides them by their norms: the factor of a closed channel is zero, its direction must not be."""
_SUMS = ("sum", "norm", "linalg_vector_norm")


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
        sources = source_C[begin : begin + group.num_channels]
        closed = (sources != torch.arange(begin, begin + group.num_channels)).nonzero().flatten()
        is_copied = (sources[closed] >= 0) & (group.name in averaged)
        for dim in group.dims:
            _silence(tensors[dim.tensor], dim, closed[~is_copied], None)
            _silence(tensors[dim.tensor], dim, closed[is_copied], sources[closed[is_copied]] - begin)
    for block in graph.blocks:
        if block.name in architecture.removed_blocks:
            for name in block.tensors & dict(oracle.named_parameters()).keys():
                tensors[name].zero_()
            end = _end(graph, block)
            if end.step is None:
                oracle.get_submodule(end.module).register_forward_hook(lambda module, args, output: output * 0)
    return oracle


def _end(graph: ChannelGraph, block: Block) -> GateSite:
    """Return the value that is zero when a branch is removed."""
    return next(site for site in graph.sites if site.block == block.name)


def averaged_groups(graph: ChannelGraph) -> set[str]:
    """Return the groups over whose channels a normalisation takes its statistics."""
    group_of_channel = graph.group_of_channel()
    channels = [site.channels[site.channels >= 0] for site in graph.sites if site.normalises]
    return {graph.groups[int(number)].name for line in channels for number in group_of_channel[line].unique()}


def _sources(graph: ChannelGraph, architecture: Architecture) -> Tensor:
    """Return (channels of the graph,) int64: each kept channel itself, for each closed one a kept one in turn, -1 if there is none.

    That is one of its group with the same role: a part of a group may be averaged without the rest.
    """
    kept_C, role_C, sources = graph.mask_of(architecture.keep), _roles(graph), torch.arange(graph.num_channels)
    for group in graph.groups:
        begin = graph.offsets[group.name]
        own = torch.arange(begin, begin + group.num_channels)
        for role in role_C[own].unique():
            alike = own[role_C[own] == role]
            kept, closed = alike[kept_C[alike]], alike[~kept_C[alike]]
            sources[closed] = kept[torch.arange(len(closed)) % len(kept)] if len(kept) else -1
    return sources


def _roles(graph: ChannelGraph) -> Tensor:
    """Return (channels of the graph,) int64: equal for channels that occur in the same gate sites."""
    occurs = torch.zeros(graph.num_channels, len(graph.sites) + 1, dtype=torch.int64)  # unique() takes no empty rows
    for number, site in enumerate(graph.sites):
        own = site.channels[site.channels >= 0]
        occurs[:, number].index_add_(0, own, torch.ones_like(own))
    return occurs.unique(dim=0, return_inverse=True)[1]


def _is_exact(graph: ChannelGraph, architecture: Architecture, source_C: Tensor) -> bool:
    cut = {group.name for group in graph.groups if len(architecture.keep[group.name]) < group.num_channels}
    removed = [_end(graph, block) for block in graph.blocks if block.name in architecture.removed_blocks]
    if not all(end.step is None or _has_weight(graph, end) for end in removed):
        return False
    copied = cut & averaged_groups(graph)
    sums_copies = bool(copied) and (
        _sums_channels(graph)
        or bool(copied & _multiplied_groups(graph))
        or any(_is_tied(graph, dim) for name in copied for dim in graph.by_name[name].dims)
    )
    if not all(_is_read(graph.by_name[name]) for name in cut) or sums_copies or _has_softmax(graph, cut):
        return False
    kept_C = graph.mask_of(architecture.keep)
    copies_C = torch.bincount(source_C[source_C >= 0], minlength=graph.num_channels)
    return all(_is_even(site, kept_C, copies_C, source_C) for site in graph.sites if site.normalises)


def _multiplied_groups(graph: ChannelGraph) -> set[str]:
    """Return the groups whose channels a product of two computed values may sum over, such as that of queries and keys."""
    widths = [width[:-1] for product in graph.products for width in product.macs.widths]
    return {graph.groups[number].name for width in widths for number in width.nonzero().flatten().tolist()}


def _is_tied(graph: ChannelGraph, dim: ChannelDim) -> bool:
    """Whether a weight writes channels in one layer and sums them in another, unlike a depthwise one."""
    shape = graph.parameters.get(dim.tensor, ())
    is_depthwise = dim.dim == 0 and len(shape) > 2 and shape[1] == 1
    return {"in", "out"} <= {*dim.sides} and not is_depthwise


def _has_weight(graph: ChannelGraph, end: GateSite) -> bool:
    """Whether the step that ends a branch reads a parameter, with which it is zero."""
    steps = {step.name: step for step in graph.plans[end.module].steps}
    return bool(steps[end.step].attributes())  # type: ignore[index]


def _is_even(site: GateSite, kept_C: Tensor, copies_C: Tensor, source_C: Tensor) -> bool:
    """Whether what a normalisation averages over is each kept channel equally often, once if there are channels outside all groups."""
    own = site.channels[site.channels >= 0]
    counts = copies_C[own][kept_C[own]].unique().tolist()
    has_static = len(own) < len(site.channels)
    if not counts:
        return not has_static  # nothing is left to average
    return len(counts) == 1 and bool((source_C[own] >= 0).all()) and (counts == [1] or not has_static)


def _has_softmax(graph: ChannelGraph, cut: set[str]) -> bool:
    """Whether a softmax goes over channels of these groups: it has a share for each copy."""
    found = {
        (path, step.name) for path, plan in graph.plans.items() for step in plan.steps if step.function in _SOFTMAX
    }
    own = [site.channels for site in graph.sites if site.normalises and (site.module, site.step) in found]
    channels = torch.cat([torch.empty(0, dtype=torch.int64), *own]).unique()
    groups = graph.group_of_channel()[channels[channels >= 0]].unique()
    return bool(cut & {graph.groups[int(number)].name for number in groups})


def _sums_channels(graph: ChannelGraph) -> bool:
    """Whether a sum or norm leaves no channels."""
    return any(op.kind.name in _SUMS and not bool(op.num_out[:-1].any()) for op in graph.ops)


def _is_read(group: ChannelGroup) -> bool:
    return any("in" in dim.sides for dim in group.dims)


def _silence(tensor: Tensor, dim: ChannelDim, closed: Tensor, sources: Tensor | None) -> None:
    """Overwrite the entries of closed channels: by those of other channels in what writes them, if given, else by zero."""
    entries = dim.entries(closed).to(tensor.device)
    if sources is not None and dim.sides != ("in",):
        tensor.index_copy_(dim.dim, entries, tensor.index_select(dim.dim, dim.entries(sources).to(tensor.device)))
    elif not dim.tensor.endswith("running_var") and not (dim.dim == 0 and dim.tensor.endswith(_DIRECTIONS)):
        tensor.index_fill_(dim.dim, entries, 0)

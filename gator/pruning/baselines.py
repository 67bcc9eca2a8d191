"""Baselines: plain ways to choose channels, each at a stated share of the cost, to compare a learned choice with.

    uniform     every group keeps the same share of its channels, those with the largest weights
    random      channels are closed in random order, whatever their group
    magnitude   channels are closed by rising size of their weights, relative to the mean of their group

None of them removes a block: every group keeps at least one channel.

    tensor legend: C channels of all groups in graph order, G groups
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gator.costs.base import CostModel
from gator.errors import GateError
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph, full_widths

BaselineKind = Literal["uniform", "random", "magnitude"]
TOLERANCE = 0.01
"""Share of the target by which the cost may end below it."""


def baseline(
    kind: BaselineKind, model: nn.Module, cost: CostModel, target_ratio: float, *, seed: int = 0
) -> Architecture:
    """Return the architecture that a baseline chooses at this share of the full cost.

    The cost ends at most 1 % below the target, and above it only if every channel that could still close is larger
    than the missing share. model: the network that cost.graph was traced from. seed: for random alone.
    Raises: GateError if the share is out of range or below what one channel in each group costs.
    """
    scores: dict[BaselineKind, Callable[[], Tensor]] = {
        "uniform": lambda: _share_kept(magnitudes(model, cost.graph), cost.graph),
        "random": lambda: torch.rand(cost.graph.num_channels, generator=torch.Generator().manual_seed(seed)),
        "magnitude": lambda: relative_magnitudes(model, cost.graph),
    }
    return close_in_order(cost, scores[kind]().argsort(stable=True), target_ratio)


def close_in_order(cost: CostModel, order_C: Tensor, target_ratio: float) -> Architecture:
    """Return the architecture that remains when channels close one after another until the cost is at the target.

    order_C: (C,) int64, all channels, the first to close first. A channel that is too large for the missing share, or the
    last of its group, is skipped.
    """
    graph, target = cost.graph, target_ratio * cost.full
    _check_target(cost, target_ratio)
    widths_G, group_C = full_widths(graph), graph.group_of_channel().tolist()
    keep_C = torch.ones(graph.num_channels, dtype=torch.bool)
    now = cost.full
    for channel in order_C.tolist():
        if now <= target:
            break
        group = group_C[channel]
        if widths_G[group] == 1:
            continue
        widths_G[group] -= 1
        after = float(cost.of(widths_G))
        if after < target * (1 - TOLERANCE):
            widths_G[group] += 1
            continue
        keep_C[channel], now = False, after
    return Architecture.from_keep(graph, graph.keep_of(keep_C))


def magnitudes(model: nn.Module, graph: ChannelGraph) -> Tensor:
    """Return (C,) float64: the sum of absolute weights, of all convolutions and linear layers, that go with a channel.

    Both the layers that write the channel and those that read it count; norms and biases do not.
    """
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.dim() > 1}
    sizes = []
    for group in graph.groups:
        size = torch.zeros(group.num_channels, dtype=torch.float64)
        for dim in (dim for dim in group.dims if dim.tensor in weights):
            per_entry = weights[dim.tensor].transpose(0, dim.dim).flatten(1).abs().sum(dim=1).to("cpu", torch.float64)
            size += per_entry[dim.index].sum(dim=1)
        sizes.append(size)
    return torch.cat(sizes)


def relative_magnitudes(model: nn.Module, graph: ChannelGraph) -> Tensor:
    """Return (C,) float64: magnitudes() over the mean of their group, which makes groups of different layers comparable."""
    sizes_C, group_C = magnitudes(model, graph), graph.group_of_channel()
    mean_G = torch.zeros(len(graph.groups), dtype=sizes_C.dtype).index_add(0, group_C, sizes_C) / full_widths(graph)
    return sizes_C / mean_G[group_C].clamp(min=torch.finfo(sizes_C.dtype).tiny)


def _share_kept(scores_C: Tensor, graph: ChannelGraph) -> Tensor:
    """Return the share of its group that ranks at or below each channel: closing by it narrows all groups alike."""
    parts = scores_C.split([group.num_channels for group in graph.groups])
    return torch.cat([(part.argsort(stable=True).argsort().double() + 1) / len(part) for part in parts])


def _check_target(cost: CostModel, target_ratio: float) -> None:
    if not 0 < target_ratio <= 1:
        raise GateError(f"the baseline's target is {target_ratio:.4g} of the full cost, expected a share in (0, 1]")
    narrowest = float(cost.of(torch.ones_like(full_widths(cost.graph)))) / cost.full
    if target_ratio < narrowest:
        raise GateError(
            f"the baseline's target is {target_ratio:.4g} of the full cost, but one channel in each group costs "
            f"{narrowest:.4g}; raise the target"
        )

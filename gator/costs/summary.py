"""The summary of a channel graph: how much of each cost its groups can remove, as numbers, text and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gator.costs.base import CostModel
from gator.costs.counted import AttentionCost, MacsCost, ParamsCost
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph, full_widths


@dataclass(frozen=True)
class CostSummary:
    """How much of one cost, or of the sum of several, the groups of a graph can remove."""

    full: float
    """Cost of the unpruned network, in the cost's unit."""
    reachable: float
    """1 - C(every group at one channel) / C(full), in [0, 1]."""
    per_group: tuple[float, ...]
    """In graph order: the cost that is saved when this group alone is at one channel. A layer between two groups counts for
    both, so the sum may exceed `full`."""

    @classmethod
    def of(cls, *costs: CostModel) -> "CostSummary":
        """Return the summary of the sum of costs of one graph, which have one unit."""
        full, widths = sum(cost.full for cost in costs), full_widths(costs[0].graph)

        def saved(fewer: Tensor) -> float:
            return full - sum(float(cost.of(fewer)) for cost in costs)

        alone = (widths.index_fill(0, torch.tensor(number), 1) for number in range(len(widths)))
        reachable = saved(torch.ones_like(widths)) / full if full else 0.0
        return cls(full, reachable, tuple(map(saved, alone)))

    @classmethod
    def of_macs(cls, graph: ChannelGraph) -> "CostSummary":
        """Return the summary of all MACs: of layers and of all other products."""
        return cls.of(MacsCost(graph), AttentionCost(graph))


@dataclass(frozen=True)
class Summary:
    """A graph and what its groups cost. str() is what print(graph) shows."""

    graph: ChannelGraph
    macs: CostSummary
    """Of all MACs: of layers and of all other products."""
    params: CostSummary

    def __str__(self) -> str:
        graph, macs, params = self.graph, self.macs, self.params
        shapes = ", ".join(map(str, graph.input_shapes))
        parts = [
            f"{graph.model} on inputs of {shapes}",
            f"groups: {len(graph.groups)}, of {graph.num_channels:,} channels; removable blocks: {len(graph.blocks)}",
            f"reachable: {macs.reachable:.2%} of {macs.full:,.0f} MACs an image, "
            f"{params.reachable:.2%} of {params.full:,.0f} parameters (gone when every group is at one channel)",
        ]
        if graph.products:
            products = AttentionCost(graph).full
            parts.append(f"of these in products without a layer, such as attention's: {products:,.0f} MACs an image")
        if graph.uncounted:
            parts.append(f"not among the MACs, of unknown widths: {', '.join(dict.fromkeys(graph.uncounted))}")
        if not graph.layers and not graph.products:
            parts.append(f"nothing to prune: {graph.why_empty}")
        if graph.groups:
            parts += ["", "MACs and params of a group: gone when it alone is at one channel", *self._group_table()]
        if graph.locked:
            locked = [(group.name, f"{group.num_channels:,}", group.reason) for group in graph.locked]
            parts += ["", *text_table(("locked", "channels", "reason"), locked)]
        return "\n".join(parts)

    def _group_table(self) -> list[str]:
        header = ("group", "channels", "MACs", "", "params", "", "members")
        rows = [
            (
                *(group.name, f"{group.num_channels:,}"),
                *(f"{macs:,.0f}", _share(macs, self.macs.full), f"{params:,.0f}", _share(params, self.params.full)),
                group.members,
            )
            for group, macs, params in zip(self.graph.groups, self.macs.per_group, self.params.per_group, strict=True)
        ]
        return text_table(header, rows)


def summarise(graph: ChannelGraph) -> Summary:
    """Return what the groups of a graph cost and how much of the network they reach.

    >>> from torch import nn
    >>> import gator
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    >>> summary = summarise(gator.trace(net, torch.zeros(1, 3, 10, 10)))
    >>> summary.macs.full, summary.macs.per_group     # 9 taps * 100 positions * (3*8 + 8*4), of which 7 channels of 8 go
    (50400.0, (44100.0,))
    >>> summary.macs.reachable
    0.875
    >>> print(summary)
    Sequential on inputs of (1, 3, 10, 10)
    groups: 1, of 8 channels; removable blocks: 0
    reachable: 87.50% of 50,400 MACs an image, 86.82% of 516 parameters (gone when every group is at one channel)
    <BLANKLINE>
    MACs and params of a group: gone when it alone is at one channel
    group  channels    MACs         params         members
    0             8  44,100  87.5%     448  86.8%  0:out, 2:in
    <BLANKLINE>
    locked  channels  reason
    2              4  output of the model
    """
    return Summary(graph, CostSummary.of_macs(graph), CostSummary.of(ParamsCost(graph)))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return aligned lines: the first and the last column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True))
        lines.append("  ".join([cells[0].ljust(widths[0]), *numbers, cells[-1]]).rstrip())
    return lines


def widths_csv(graph: ChannelGraph, architecture: Architecture) -> str:
    """Return a CSV with a line per channel group, in the order of the network.

    before, after: channels. macs_share, params_share: what the unpruned network saves when this group alone is at one
    channel; a layer between two groups counts for both. removed_block: the residual block that was removed with the group.
    """
    macs, params = CostSummary.of_macs(graph), CostSummary.of(ParamsCost(graph))
    gone = set(architecture.removed_blocks)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "before", "after", "macs_share", "params_share", "removed_block"])
    for group, macs_alone, params_alone in zip(graph.groups, macs.per_group, params.per_group, strict=True):
        after = len(architecture.keep[group.name])
        shares = (f"{macs_alone / macs.full:.4f}", f"{params_alone / params.full:.4f}")
        block = group.block if group.block in gone else ""
        writer.writerow([group.name, group.num_channels, after, *shares, block])
    return text.getvalue()
